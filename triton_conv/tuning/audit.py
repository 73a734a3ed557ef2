"""What the compiler makes of a plan, for any NVIDIA target and without a GPU.

Kernels are compiled through Triton's own launcher with stand-ins for tensors, so that arguments are specialised
exactly as in a launch; registers, spills and instructions are then read from the binary.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget

from .. import plan

INSTRUCTIONS = ("HMMA", "HGMMA", "DMMA", "IMMA", "UTCHMMA", "UTMALDG", "UTMASTG", "LDGSTS", "LDG", "STG", "LDSM")
SPILLS = ("LDL", "STL")
MATRIX_INSTRUCTIONS = {80: "HMMA", 90: "HGMMA", 100: "UTCHMMA"}


@dataclass(frozen=True)
class Code:
    """A compiled kernel: registers a thread, bytes of shared memory a block, spilled accesses, instruction counts.

    `narrow_copies` counts asynchronous copies of less than 16 bytes a thread.
    `operands` says where a warp-group dot (sm_90) or a tensor-memory dot (sm_100) reads: "shared" where both operands
    come from shared memory, "registers" where one passes through registers, "" for other instructions.
    """

    registers: int
    shared: int
    spills: int
    instructions: dict[str, int]
    narrow_copies: int
    operands: str

    def __str__(self) -> str:
        counts = "  ".join(f"{name} {n}" for name, n in self.instructions.items())
        where = f"  operands in {self.operands}" if self.operands else ""
        return f"registers {self.registers}  shared {self.shared}  spills {self.spills}  {counts}{where}"


class _NoDevice:
    """A driver that knows its target and nothing else: enough to compile, not to launch."""

    def __init__(self, arch: int):
        self.target = GPUTarget("cuda", arch, 32)

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:
        return 1000 + self.target.arch  # kernels are cached by device: not one that exists, nor another target's

    def get_current_stream(self, device: int | None = None) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")


@contextmanager
def compiling_for(arch: int) -> Iterator[None]:
    """Within it, `JITFunction.warmup` compiles for this compute capability (80, 90, 100, 120)."""
    if triton.knobs.runtime.interpret:
        raise RuntimeError("kernels are being interpreted: unset TRITON_INTERPRET before triton_conv's first launch")
    driver = triton.runtime.driver
    before = driver._active
    driver.set_active(_NoDevice(arch))
    try:
        yield
    finally:
        driver._active = before


def compile_plan(p: plan.Plan, arch: int) -> list[tuple[str, Code]]:
    """(kernel name, code) of every kernel that the plan launches."""
    with compiling_for(arch):
        return [(name, _read(kernel)) for name, kernel in compiled_kernels(p)]


def compiled_kernels(p: plan.Plan) -> Iterator[tuple[str, Any]]:
    """(kernel name, compiled kernel) of every kernel that the plan launches; within `compiling_for`."""
    dtypes = dict.fromkeys(("x", "w", "y", "bias"), getattr(torch, p.dtype))
    dtypes["workspace"] = getattr(torch, p.workspace_dtype)
    for launch in p.launches:
        yield launch.name, launch.compile(dtypes)


def _read(kernel) -> Code:
    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        sass = _run(tools / "cuobjdump", "-sass", file.name)
        usage = _run(tools / "cuobjdump", "-res-usage", file.name)
    found = re.findall(r"\b(" + "|".join(INSTRUCTIONS + SPILLS) + r")\b", sass)
    registers = re.search(r"REG:(\d+)", usage)
    if registers is None:
        raise RuntimeError(f"cuobjdump reported no register count: {usage[:200]!r}")
    return Code(
        registers=int(registers[1]),
        shared=kernel.metadata.shared,
        spills=sum(found.count(name) for name in SPILLS),
        instructions={name: found.count(name) for name in INSTRUCTIONS if name in found},
        narrow_copies=len(re.findall(r"\bLDGSTS\b(?!\S*\.128)", sass)),
        operands=_operands(kernel.asm["ttgir"]),
    )


def _operands(ir: str) -> str:
    dots = re.findall(r"warp_group_dot .*?: (\S+)<.*?> \* (\S+)<", ir) + re.findall(
        r"tc_gen5_mma .*?: (\S+)<.*?>, (\S+)<", ir
    )
    if not dots:
        return ""
    return "shared" if all(side == "!ttg.memdesc" for dot in dots for side in dot) else "registers"


def _run(*command) -> str:
    result = subprocess.run([str(c) for c in command], capture_output=True, text=True, check=True)
    return result.stdout + result.stderr
