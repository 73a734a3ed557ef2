"""The audit: what it reads from compiled kernels, what it finds wrong, and that nothing keeps it from saying so."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from itertools import product
from pathlib import Path

import pytest
import torch
import triton
from processes import interruptible

from triton_conv import cli, config, explain
from triton_conv.activation_plan import ActivationConfig
from triton_conv.causal_config import CausalConfig
from triton_conv.config import BoxConfig, Config, DepthwiseConfig
from triton_conv.deform_config import DeformRole
from triton_conv.geometry import Role
from triton_conv.tuning import audit
from triton_conv.tuning.audit import Row, Subject, Wanted, faults
from triton_conv.tuning.code import TARGETS, Code, resident_blocks
from triton_conv.tuning.layers import LAYERS

GOOD = Code(
    registers=128,
    spill_bytes=0,
    spills=0,
    shared=163840,
    tensor_memory=0,
    warps=4,
    resident=1,
    matrix="HGMMA",
    rows=128,
    operands="shared",
    tma_loads=8,
    tma_stores=2,
    copies=0,
    narrow_copies=0,
    wide_loads=0,
    ahead=3,
)
WANTED = Wanted(
    "HGMMA", "HMMA", pipelined=True, shared_operands=True, whole_vectors=True, tma_loads=True, tma_stores=True
)
ROW = Row(90, "3x3", 32, "fprop", "box", "bfloat16", BoxConfig((1, 1, 8, 16), 128, 64), WANTED, GOOD)


class Deadly:
    """What nobody can unpickle and live."""

    def __reduce__(self):
        return os._exit, (3,)


def plan_of(layer: str, role: Role, tiles: Config | BoxConfig, arch: int = 90):
    with config.explicit({role: tiles}):
        return next(s.plan for s in shipped(layer, arch) if s.plan.role is role)


def shipped(layer: str, arch: int = 90) -> list[Subject]:
    what = LAYERS[layer]
    plans = explain.plans(what.input, what.weight, bias=True, device=TARGETS[arch], **what.options)
    return [Subject(layer, plan) for plan in plans.values()]


FORWARD = {
    "spilling": ("3x3 circular", Config(256, 256, 64)),
    "too large": ("3x3", BoxConfig((1, 1, 8, 16), 128, 64, num_stages=8)),
    "no compiler can": ("3x3 circular", Config(2**15, 256, 64)),
    "gather of 1 stage": ("3x3 circular", Config(64, 64, 32, num_stages=1)),
    "gather of 3 stages": ("3x3 circular", Config(64, 64, 32, num_stages=3)),
    "box of 1 stage": ("3x3", BoxConfig((1, 1, 8, 16), 64, 64, num_stages=1)),
    "box of 3 stages": ("3x3", BoxConfig((1, 1, 8, 16), 64, 64, num_stages=3)),
    "few rows": ("3x3 circular", Config(64, 16, 64, filters_first=True)),
}


@pytest.fixture(scope="module")
def rows() -> dict[str, Row]:
    """Main kernels of one audit for sm_90: a layer as shipped, configs that do not ship, a compiler that dies."""
    subjects = shipped("3x3")
    for name, (layer, tiles) in FORWARD.items():
        subjects.append(Subject(name, plan_of(layer, Role.FPROP, tiles)))
    subjects.insert(2, Subject("deadly", replace(subjects[0].plan, reason=Deadly())))
    os.environ["TRITON_INTERPRET"] = "1"  # which compilers must not inherit
    try:
        found = dict(audit.audit(subjects, 90, jobs=2))
        assert os.environ["TRITON_INTERPRET"] == "1"
    finally:
        del os.environ["TRITON_INTERPRET"]
    assert sorted(found) == list(range(len(subjects)))
    return {f"{row.layer} {row.role}": row for rows in found.values() for row in rows if row.config is not None}


def test_a_shipped_layer_is_read_and_has_no_fault(rows):
    assert {role: rows[f"3x3 {role}"].kernel for role in ("fprop", "dgrad", "wgrad")} == {
        "fprop": "box",
        "dgrad": "box",
        "wgrad": "box_wgrad",
    }
    for role in ("fprop", "dgrad", "wgrad"):
        row = rows[f"3x3 {role}"]
        assert faults(row) == []
        assert row.code.atomics == 0
        assert row.code.matrix == "HGMMA"
        assert row.code.rows == row.config.BLOCK_N == 128
        assert row.code.operands == "shared"
        assert row.code.ahead == row.config.num_stages - 1
        assert row.code.tma_loads >= 2 * row.config.num_stages
        assert 64 <= row.code.registers <= 255
        assert row.code.shared > row.config.num_stages * (row.config.BLOCK_N + 128) * 32
        assert row.code.resident in (1, 2)
    assert rows["3x3 fprop"].code.tma_stores
    assert not rows["3x3 wgrad"].code.tma_stores


def test_a_spilling_config_is_caught(rows):
    row = rows["spilling fprop"]
    assert row.code.registers == 255
    assert row.code.spill_bytes > 100
    assert row.code.spills > row.code.spill_bytes // 16
    assert faults(row) == [f"spills {row.code.spill_bytes} bytes in {row.code.spills} accesses"]


def test_a_config_over_the_shared_memory_is_caught(rows):
    row = rows["too large fprop"]
    assert row.code.resident == 0
    assert f"needs {row.code.shared} bytes of shared memory, 232448 are there" in faults(row)


def test_what_does_not_compile_is_a_row(rows):
    row = rows["no compiler can fprop"]
    assert row.code is None
    assert "exceeds triton maximum tensor numel" in row.error
    assert faults(row) == [f"does not compile: {row.error}"]


def test_a_compiler_that_dies_is_a_row_and_takes_no_other_along(rows):
    assert faults(rows["deadly fprop"]) == ["does not compile: the compiler died"]
    assert [name for name, row in rows.items() if row.code is None] == ["deadly fprop", "no compiler can fprop"]


@pytest.mark.parametrize("kernel", ["gather", "box"])
def test_steps_ahead_are_stages_but_one(kernel, rows):
    """A box is a copy to shared memory with any number of stages: then instructions alone would not tell."""
    unpipelined, pipelined = rows[f"{kernel} of 1 stage fprop"], rows[f"{kernel} of 3 stages fprop"]
    assert (unpipelined.code.ahead, pipelined.code.ahead) == (0, 2)
    assert not unpipelined.wanted.pipelined
    assert faults(unpipelined) == []
    assert "its loads are not pipelined" in faults(replace(unpipelined, wanted=pipelined.wanted))


def test_dots_of_few_rows_get_the_older_instruction(rows):
    row = rows["few rows fprop"]
    assert (row.code.matrix, row.code.rows) == ("HMMA", 16)
    assert faults(row) == []
    assert faults(replace(row, code=replace(row.code, rows=64))) == ["its dot became no HGMMA instruction"]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({}, []),
        ({"spill_bytes": 48, "spills": 7}, ["spills 48 bytes in 7 accesses"]),
        ({"spills": 7}, ["spills 0 bytes in 7 accesses"]),
        ({"shared": 232448}, []),
        ({"shared": 232449}, ["needs 232449 bytes of shared memory, 232448 are there"]),
        ({"tensor_memory": 1024}, ["needs 1024 columns of tensor memory, 512 are there"]),
        ({"matrix": "HMMA"}, ["its dot became no HGMMA instruction"]),
        ({"matrix": ""}, ["its dot became no HGMMA instruction"]),
        ({"matrix": "", "rows": 16}, ["its dot became no HGMMA instruction"]),
        ({"matrix": "HMMA", "rows": 32, "operands": ""}, []),
        ({"matrix": "HGMMA HMMA"}, []),
        ({"ahead": 0}, ["its loads are not pipelined"]),
        ({"operands": "registers"}, ["an operand passes through registers"]),
        ({"operands": ""}, ["an operand passes through registers"]),
        ({"narrow_copies": 4}, ["copies fewer than 16 bytes at a time"]),
        ({"tma_loads": 0, "copies": 8}, ["loads no operand by the bulk copy engine"]),
        (
            {"tma_loads": 0},
            ["loads no operand asynchronously", "loads no operand by the bulk copy engine"],
        ),
        ({"tma_stores": 0}, ["does not store by the bulk copy engine"]),
        ({"atomics": 2}, ["has 2 atomic instructions, whose order differs from run to run"]),
    ],
    ids=str,
)
def test_every_fault_is_named(change, words):
    assert faults(replace(ROW, code=replace(GOOD, **change))) == words


ATOMICS = """
import json, torch, triton, triton.language as tl
from triton_conv.tuning.code import compiling_for, read

@triton.jit
def plain(x, y):
    at = tl.arange(0, 128)
    tl.store(y + at, tl.load(x + at))

@triton.jit
def added(x, y):
    at = tl.arange(0, 128)
    tl.atomic_add(y + at, tl.load(x + at))

@triton.jit
def counted(x, y):
    tl.store(x, tl.atomic_add(y, 1.0))

with compiling_for(90):
    kernels = [k.warmup(torch.float32, torch.float32, grid=(1,)) for k in (plain, added, counted)]
    print(json.dumps([read(k, 90).atomics for k in kernels]))
"""


def test_atomics_are_seen_whether_their_result_is_used_or_not(tmp_path):
    script = tmp_path / "atomics.py"  # kernels are read from files
    script.write_text(ATOMICS)
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, check=True, env=environment)
    plain, added, counted = json.loads(done.stdout)
    assert plain == 0
    assert added > 0
    assert counted > 0


def test_depthwise_kernels_want_loads_of_16_bytes():
    wanted = replace(ROW, wanted=Wanted(wide_loads=True))
    assert faults(replace(wanted, code=replace(GOOD, wide_loads=3))) == []
    assert faults(replace(wanted, code=GOOD)) == ["loads fewer than 16 bytes at a time"]
    both = replace(wanted, wanted=Wanted(wide_loads=True, wide_stores=True), code=replace(GOOD, wide_loads=3))
    assert faults(both) == ["stores fewer than 16 bytes at a time"]
    assert faults(replace(both, code=replace(both.code, wide_stores=1))) == []


def test_nothing_is_wanted_of_kernels_without_a_dot():
    bare = replace(GOOD, matrix="", rows=0, operands="", tma_loads=0, tma_stores=0, ahead=0)
    assert faults(replace(ROW, wanted=Wanted(), code=bare)) == []


# Multiprocessors of compute capability 8.0, 9.0, 10.0 and 12.0 as the CUDA runtime describes them.
PROPERTIES = {80: (2048, 163, 164), 90: (2048, 227, 228), 100: (2048, 227, 228), 120: (1536, 99, 100)}


@pytest.mark.parametrize("arch", PROPERTIES)
def test_resident_blocks_are_those_of_nvidias_own_arithmetic(arch, tmp_path):
    """Against cuda_occupancy.h, which comes with Triton."""
    compiler = shutil.which("c++")
    if compiler is None:
        pytest.skip("no C++ compiler")
    threads, block, multiprocessor = PROPERTIES[arch]
    cases = [
        (r, w, s) for r in (16, 33, 96, 128, 168, 255) for w in (1, 4, 8) for s in (0, 4096, 49151, 101376, 163840)
    ]
    source = tmp_path / "occupancy.cpp"
    source.write_text(
        f"""
#include <climits>
#include <cstdio>
#include "cuda_occupancy.h"
int main() {{
  cudaOccDeviceProp device;
  device.computeMajor = {arch // 10}; device.computeMinor = {arch % 10}; device.warpSize = 32;
  device.maxThreadsPerBlock = 1024; device.maxThreadsPerMultiprocessor = {threads};
  device.regsPerBlock = device.regsPerMultiprocessor = 65536; device.numSms = 100;
  device.sharedMemPerBlock = 49152; device.sharedMemPerBlockOptin = {block} * 1024;
  device.sharedMemPerMultiprocessor = {multiprocessor} * 1024; device.reservedSharedMemPerBlock = 1024;
  const int cases[][3] = {{{", ".join(f"{{{r}, {w}, {s}}}" for r, w, s in cases)}}};
  for (const auto& c : cases) {{
    cudaOccFuncAttributes kernel; cudaOccDeviceState state; cudaOccResult result;
    kernel.numRegs = c[0]; kernel.maxThreadsPerBlock = 1024; kernel.sharedSizeBytes = 0;
    kernel.maxDynamicSharedSizeBytes = {block} * 1024;
    kernel.shmemLimitConfig = FUNC_SHMEM_LIMIT_OPTIN; kernel.numBlockBarriers = 1;
    state.carveoutConfig = SHAREDMEM_CARVEOUT_MAX_SHARED;
    if (cudaOccMaxActiveBlocksPerMultiprocessor(&result, &device, &kernel, &state, 32 * c[1], c[2])) return 1;
    std::printf("%d\\n", result.activeBlocksPerMultiprocessor);
  }}
}}
"""
    )
    include = Path(triton.__file__).parent / "backends" / "nvidia" / "include"
    program = tmp_path / "occupancy"
    subprocess.run([compiler, "-std=c++11", f"-I{include}", str(source), "-o", str(program)], check=True)
    expected = subprocess.run([str(program)], capture_output=True, text=True, check=True).stdout.split()
    found = [resident_blocks(registers, warps, shared, 0, arch) for registers, warps, shared in cases]
    assert found == [int(n) for n in expected]
    assert len(set(found)) > 5


def test_tensor_memory_limits_resident_blocks():
    assert [resident_blocks(64, 4, 1024, columns, 100) for columns in (0, 128, 256, 512, 1024)] == [8, 4, 2, 1, 0]


def test_the_command_prints_a_row_for_each_launch_as_json(capsys):
    assert cli.main(["audit", "--layer", "3x3", "--role", "fprop", "--jobs", "1", "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed["triton"] == triton.__version__
    (row,) = printed["rows"]
    assert (row["arch"], row["layer"], row["role"], row["kernel"], row["faults"]) == (90, "3x3", "fprop", "box", [])
    assert row["config"]["BLOCK_N"] == 128
    assert row["code"]["matrix"] == "HGMMA"


def test_the_command_fails_and_says_why(capsys, monkeypatch):
    spilling = Subject("3x3 circular", plan_of("3x3 circular", Role.FPROP, FORWARD["spilling"][1]))
    monkeypatch.setattr(audit, "shipped", lambda arch: [spilling, *shipped("3x3")])
    assert cli.main(["audit", "--role", "fprop", "--kernel", "gather", "--jobs", "1"]) == 1
    printed = capsys.readouterr().out
    assert re.search(r"90 +3x3 circular +32 +fprop +gather +256x256x64 .* spills \d+ bytes in \d+ accesses", printed)
    assert "3x3 fprop" not in printed
    assert f"1 kernel compiled by Triton {triton.__version__}, 1 with a fault\n" in printed


def test_the_command_says_where_nothing_is_asked_for(capsys):
    assert cli.main(["audit", "--layer", "int64", "--role", "wgrad"]) == 2
    assert "no such layer has a plan of this role" in capsys.readouterr().err


def test_the_command_names_the_extra_it_needs(capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "rich", None)
    assert cli.main(["audit"]) == 2
    assert "audit needs rich: in a checkout, pip install -e '.[tuning]'" in capsys.readouterr().err


def test_an_interrupted_command_leaves_no_process_behind():
    command = [sys.executable, "-m", "triton_conv", "audit", "--jobs", "2"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    process = subprocess.Popen(command, **pipes, process_group=0, preexec_fn=interruptible)  # noqa: PLW1509
    compilers = set()
    while len(compilers) < 2 and process.poll() is None:
        time.sleep(0.1)
        compilers = {pid for pid in descendants(process.pid) if "spawn_main" in command_line(pid)}
    started = descendants(process.pid)
    os.kill(process.pid, signal.SIGINT)  # the parent alone, where a terminal would interrupt every process
    assert process.communicate(timeout=120)[1] == "triton-conv: interrupted\n"
    assert process.returncode == 130
    deadline = time.monotonic() + 10
    while any(command_line(pid) for pid in started) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert [command_line(pid) for pid in started if command_line(pid)] == []


def descendants(pid: int) -> set[int]:
    found = set()
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            parent = int(stat.read_text().rpartition(")")[2].split()[1])
        except OSError:  # it has ended meanwhile
            continue
        if parent == pid:
            found |= {int(stat.parent.name)} | descendants(int(stat.parent.name))
    return found


def command_line(pid: int) -> str:
    """Of a process; empty once it has ended."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_text()
    except OSError:
        return ""


# ---------------------------------------------------------------------------------------------------------------------
# Everything that ships; `triton-conv audit` shows the same as a table

WHOLE_VECTORS = ("3x3", "1x1", "video", "3x3 stride 2", "24 channels", "72 to 200 channels", "transposed 4x4")
DIRECT = {n for n, layer in LAYERS.items() if n.startswith("depthwise") and max(layer.weight[2:]) < 13}
BOXED = {"3x3", "3x3 stride 2", "3x3 circular", "1x1", "video", "float32 tf32"}
BOXED_GRADIENTS = {"3x3", "3x3 stride 2", "24 channels", "72 to 200 channels", "1x1", "video"}


@pytest.mark.slow
@pytest.mark.parametrize("arch", TARGETS)
def test_nothing_that_ships_has_a_fault(arch):
    subjects = audit.shipped(arch)
    found = [row for _, rows in audit.audit(subjects, arch) for row in rows]
    assert len(found) >= len(subjects) > 70
    assert [(row.layer, row.role, row.kernel, faults(row)) for row in found if faults(row)] == []
    main = [row for row in found if row.config is not None]
    summed = (ActivationConfig, CausalConfig, DepthwiseConfig)
    scalar = {row.layer for row in main if not row.wanted.matrix and not isinstance(row.config, summed)}
    doubles = {name for name, layer in LAYERS.items() if layer.options["dtype"] is torch.float64}
    exact = {name for name in LAYERS if name.endswith("float32 ieee") and not name.startswith("depthwise")}
    expected = {"int64", "deformable narrow"} | exact | (doubles - {"depthwise float64"} if arch >= 100 else set())
    assert scalar == expected
    assert {row.layer for row in main if isinstance(row.config, DepthwiseConfig)} >= DIRECT
    banded = {(row.layer, row.role) for row in main if row.kernel.startswith("banded")}
    assert banded >= {("depthwise 31x31", "fprop"), ("depthwise 31x31", "dgrad")}
    whole = [row for row in main if row.layer in WHOLE_VECTORS]
    assert {(row.layer, row.role) for row in whole} == set(product(WHOLE_VECTORS, ("fprop", "dgrad", "wgrad")))
    assert all(row.wanted.whole_vectors and row.wanted.pipelined for row in whole)
    boxed = {name: {row.layer for row in main if row.kernel == name} for name in ("box", "box_wgrad")}
    if arch == 80:
        assert boxed == {"box": set(), "box_wgrad": set()}
    else:
        assert boxed["box"] >= BOXED
        assert boxed["box_wgrad"] >= BOXED_GRADIENTS


def test_causal_convolutions_load_and_store_16_bytes_and_do_not_spill():
    """Of both layouts, forward, backward and a step of an update, with Mamba's channels."""
    subjects = [s for s in audit.shipped(90) if s.layer in ("causal", "causal contiguous")]
    rows = [row for _, found in audit.audit(subjects, 90, jobs=2) for row in found if row.config is not None]
    assert {(row.layer, row.role) for row in rows} == set(
        product(("causal", "causal contiguous"), ("forward", "backward", "update"))
    )
    assert [(row.layer, row.role, faults(row)) for row in rows if faults(row)] == []
    for row in rows:
        assert row.wanted.wide_loads == row.wanted.wide_stores == (row.role != "update")
        assert row.code.spill_bytes == row.code.copies == 0


def what_of(plan):
    """Role, kernel and config but for its slabs."""
    whole = replace(plan.config, splits=1) if hasattr(plan.config, "splits") else plan.config
    return plan.role, plan.kernel, whole


@pytest.mark.parametrize("arch", TARGETS)
def test_every_layer_is_planned_for_every_role(arch):
    subjects = audit.shipped(arch)
    for name, layer in LAYERS.items():
        roles = sorted({s.plan.role.value for s in subjects if s.layer == name})
        differentiable = layer.options["dtype"].is_floating_point and layer.options["dtype"].itemsize > 1
        expected = ["dgrad", "fprop", "wgrad"] if differentiable else ["fprop"]
        if "causal" in layer.options:
            expected = ["backward", "forward", "update"]
        elif "pointwise" in layer.options:
            expected = ["fprop"]
        elif "deform" in layer.options:
            expected = sorted(role.value for role in DeformRole)
        elif "activation" in layer.options:
            expected = ["activation gradient", *expected]
        assert roles == (expected if arch >= layer.since else [])
        plans = {what_of(s.plan) for s in subjects if s.layer == name}
        for images in (4, 1) if arch >= layer.since else ():
            for plan in explain.plans(
                (images, *layer.input[1:]), layer.weight, device=TARGETS[arch], bias=True, **layer.options
            ).values():
                assert what_of(plan) in plans
    dtypes = {layer.options["dtype"] for layer in LAYERS.values()}
    assert dtypes >= {torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.int8}
