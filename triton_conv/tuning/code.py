"""What the compiler makes of a plan, for any NVIDIA target and without a GPU.

Kernels are compiled through Triton's own launcher with stand-ins for tensors, so that arguments are specialised
exactly as in a launch; registers, spills and instructions are then read from the binary, and what became of the main
loop from the last of Triton's own intermediate languages.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.driver import CudaLauncher

from .. import devices
from ..explain import AnyPlan

TARGETS = {80: devices.A100, 90: devices.H200, 100: devices.B200, 120: devices.RTX_5090}

# Resident warps and blocks of a multiprocessor: NVIDIA, cuda_occupancy.h and CUDA Programming Guide 13 (2025).
_WARPS = {80: 64, 90: 64, 100: 64, 120: 48}
_BLOCKS = {80: 32, 90: 32, 100: 32, 120: 24}
TENSOR_MEMORY = 512  # columns of a multiprocessor of sm_100: PTX ISA 8.7, tcgen05.alloc

MATRIX = {"HMMA", "HGMMA", "UTCHMMA", "QMMA", "QGMMA", "UTCQMMA", "IMMA", "IGMMA", "UTCIMMA", "DMMA"}


# On global memory, with and without the old value, and by the bulk copy engine: CUDA Binary Utilities 13. Those on
# shared memory (ATOMS) also hand out tensor memory on sm_100; sums by them would show in Triton's own language.
ATOMIC = ("ATOM", "ATOMG", "RED", "REDG", "UTMAREDG")


@dataclass(frozen=True)
class Code:
    """A compiled kernel.

    registers      of a thread
    spill_bytes    of a thread: its stack frame and its local memory, which nothing else here uses
    spills         loads and stores of them in the code
    shared         bytes of shared memory of a block
    tensor_memory  columns of tensor memory of a block (sm_100)
    warps          of a block
    resident       blocks that a multiprocessor has room for at a time
    matrix         the matrix instruction, "" without one
    rows           of the dot's first operand, 0 without a dot
    operands       where a warp-group dot (sm_90) or a tensor-memory dot (sm_100) reads: "shared" where both operands
                   come from shared memory, "registers" where one passes through registers, "" for other instructions
    tma_loads, tma_stores  bulk tensor copies in the code
    copies, narrow_copies  asynchronous copies in the code of 16 bytes a thread, and of fewer
    wide_loads, wide_stores  plain loads and stores in the code of 16 bytes a thread
    ahead          steps of the main loops that their loads run ahead of their use, the least of them
    atomics        instructions that add to memory in whatever order programs or threads come by
    """

    registers: int
    spill_bytes: int
    spills: int
    shared: int
    tensor_memory: int
    warps: int
    resident: int
    matrix: str
    rows: int
    operands: str
    tma_loads: int
    tma_stores: int
    copies: int
    narrow_copies: int
    wide_loads: int
    ahead: int
    wide_stores: int = 0
    atomics: int = 0


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


def compiled_kernels(plan: AnyPlan, names: Collection[str] = ()) -> Iterator[tuple[Any, Any]]:
    """(launch, compiled kernel) of what the plan launches, of all names or of these; within `compiling_for`."""
    dtypes = {operand: getattr(torch, dtype) for operand, dtype in plan.dtypes.items()}
    for launch in plan.launches:
        if not names or launch.name in names:
            yield launch, launch.compile(dtypes)


def stub(kernel: Any) -> None:
    """Compiles the C function that launches a kernel, into Triton's cache.

    Triton 3.6 asks the host's compiler for one at the first launch of each signature; later ones need none. Where it
    cannot be compiled now, as without NVIDIA's driver, the launch will compile it, or say why not.
    """
    with suppress(Exception):
        CudaLauncher(kernel.src, kernel.metadata)


def read(kernel: Any, arch: int) -> Code:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        command = [triton.knobs.nvidia.cuobjdump.path, "-sass", "-res-usage", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    usage = re.search(r"REG:(\d+) STACK:(\d+) .*LOCAL:(\d+)", text)
    if usage is None:
        raise RuntimeError(f"cuobjdump reported no registers: {text[:200]!r}")
    registers, stack, local = map(int, usage.groups())
    counts = Counter(re.findall(r"\b[A-Z]{3,}\b", text))
    narrow = len(re.findall(r"\bLDGSTS\b(?!\S*\.128)", text))
    ir, metadata = kernel.asm["ttgir"], kernel.metadata
    tensor_memory = getattr(metadata, "tmem_size", 0) or 0
    return Code(
        registers=registers,
        spill_bytes=stack + local,
        spills=counts["LDL"] + counts["STL"],
        shared=metadata.shared,
        tensor_memory=tensor_memory,
        warps=metadata.num_warps,
        resident=resident_blocks(registers, metadata.num_warps, metadata.shared, tensor_memory, arch),
        matrix=" ".join(sorted(MATRIX & set(counts))),
        rows=_rows(ir),
        operands=_operands(ir),
        tma_loads=counts["UTMALDG"],
        tma_stores=counts["UTMASTG"],
        copies=counts["LDGSTS"] - narrow,
        narrow_copies=narrow,
        wide_loads=len(re.findall(r"\bLDG\.\S*\.128\b", text)),
        ahead=min(steps_ahead(ir), default=0),
        wide_stores=len(re.findall(r"\bSTG\.\S*\.128\b", text)),
        atomics=sum(counts[name] for name in ATOMIC) + len(re.findall(r"\btt\.atomic_|\bdescriptor_reduce", ir)),
    )


def resident_blocks(registers: int, warps: int, shared: int, tensor_memory: int, arch: int) -> int:
    """Blocks that a multiprocessor has room for at a time; the arithmetic is that of NVIDIA's cuda_occupancy.h.

    Registers are handed out to warps by 256, by a quarter of the multiprocessor each; shared memory by 128 bytes, of
    which the driver takes 1024 for itself.
    """
    device = TARGETS[arch]
    if shared > device.shared_per_block or tensor_memory > TENSOR_MEMORY:
        return 0
    of_a_warp = -(-registers * 32 // 256) * 256
    warps_by_registers = device.registers // 4 // of_a_warp * 4
    limits = [_BLOCKS[arch], _WARPS[arch] // warps, warps_by_registers // warps]
    limits.append(device.shared_per_multiprocessor // (-(-(shared + 1024) // 128) * 128))
    if tensor_memory:
        limits.append(TENSOR_MEMORY // tensor_memory)
    return min(limits)


def _rows(ir: str) -> int:
    found = re.search(r"(?:tt\.dot|warp_group_dot|tc_gen5_mma) .*?: \S*?<(\d+)x", ir)
    return int(found[1]) if found else 0


def _operands(ir: str) -> str:
    dots = re.findall(r"warp_group_dot .*?: (\S+)<.*?> \* (\S+)<", ir) + re.findall(
        r"tc_gen5_mma .*?: (\S+)<.*?>, (\S+)<", ir
    )
    if not dots:
        return ""
    return "shared" if all(side == "!ttg.memdesc" for dot in dots for side in dot) else "registers"


_LOOP = re.compile(r"( *)(?:%\S+ = )?scf\.for ")
_LOAD = re.compile(r"\b(?:tt\.load|async_copy_global_to_local|async_tma_copy_global_to_local)\b.*loc\((#\w+)\)$")
_DOT = re.compile(r"\b(?:tt\.dot|warp_group_dot|tc_gen5_mma)\b.*loc\((#\w+)\)$")


def steps_ahead(ir: str) -> list[int]:
    """For each innermost loop with a dot: by how many steps its loads run ahead of their use, the least of them.

    Pipelining copies a load, with its location in the source, once in front of the loop for every step that it is
    ahead, and once more for each step that is peeled off the loop together with its dot.
    """
    lines, found, last = ir.splitlines(), [], 0
    for start, line in enumerate(lines):
        loop = _LOOP.match(line)
        if not loop:
            continue
        end = next(n for n in range(start + 1, len(lines)) if lines[n].startswith(loop[1] + "}"))
        if any(map(_LOOP.match, lines[start + 1 : end])):
            continue
        body = [line for line in lines[start + 1 : end] if re.match(loop[1] + r"  \S", line)]
        if _found(_DOT, body):
            before = lines[last:start]
            loads, dots = _found(_LOAD, before), _found(_DOT, before)
            peeled = max(dots[where] for where in _found(_DOT, body))
            found.append(min((loads[where] for where in _found(_LOAD, body)), default=0) - peeled)
            last = end
    return found


def _found(what: re.Pattern, lines: Sequence[str]) -> Counter:
    """How often something is found at each location in the source."""
    return Counter(found[1] for line in lines if (found := what.search(line)))
