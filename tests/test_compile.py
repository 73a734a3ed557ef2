"""What the compiler makes of the default configs, for targets this machine need not have."""

import json
import os
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

from triton_conv.tuning.audit import MATRIX_INSTRUCTIONS

SCALAR = ("depthwise", "int64", "float32 ieee")
WHOLE_VECTORS = ("3x3", "1x1", "video", "3x3 stride 2", "24 channels", "72 to 200 channels", "transposed")
NARROW = ("grouped", "24 channels")
BOX_KERNELS = ("box", "box_wgrad")
MAIN_KERNELS = (*BOX_KERNELS, "gather", "wgrad")


@cache
def compiled(*arguments: str):
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    script = Path(__file__).with_name("compile_plans.py")
    result = subprocess.run(
        [sys.executable, str(script), *arguments], env=environment, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr[-3000:]
    return json.loads(result.stdout)


@pytest.fixture(params=[pytest.param(80, marks=pytest.mark.slow), 90, pytest.param(100, marks=pytest.mark.slow)])
def arch(request) -> int:
    return request.param


def test_no_default_config_spills_registers(arch):
    rows = compiled("code", str(arch))
    assert len(rows) > 40
    spilled = [(r["layer"], r["role"], r["kernel"], r["registers"], r["spills"]) for r in rows if r["spills"]]
    assert not spilled


def test_dots_use_the_matrix_instruction_of_the_target(arch):
    lost = []
    for row in compiled("code", str(arch)):
        if row["kernel"] not in MAIN_KERNELS or row["layer"] in SCALAR:
            continue
        wanted = MATRIX_INSTRUCTIONS[arch]
        if row["layer"] == "float64":
            wanted = "DMMA" if arch < 100 else None
        accepted = {wanted}
        if row["layer"] in NARROW:
            accepted.add("HMMA")  # tiles have fewer rows than the 64 of the wider instructions
        if wanted and not accepted & set(row["instructions"]):
            lost.append((row["layer"], row["role"], row["instructions"]))
    assert not lost


def test_channels_last_operands_are_copied_asynchronously_in_whole_vectors(arch):
    rows = [r for r in compiled("code", str(arch)) if r["layer"] in WHOLE_VECTORS]
    main = [r for r in rows if r["kernel"] in MAIN_KERNELS]
    assert len(main) == 3 * len(WHOLE_VECTORS)
    for row in main:
        copies = row["instructions"]
        assert copies.get("UTMALDG" if row["kernel"] in BOX_KERNELS else "LDGSTS"), row
        assert row["narrow_copies"] == 0, row


def test_box_operands_are_multiplied_from_shared_memory(arch):
    boxes = [r for r in compiled("code", str(arch)) if r["kernel"] in BOX_KERNELS]
    if arch < 90:
        assert not boxes
        return
    layers = {name: {r["layer"] for r in boxes if r["kernel"] == name} for name in BOX_KERNELS}
    assert layers["box"] >= {"3x3", "3x3 stride 2", "3x3 circular", "1x1", "video", "float32 tf32"}
    assert layers["box_wgrad"] >= {"3x3", "3x3 stride 2", "24 channels", "72 to 200 channels", "1x1", "video"}
    passing_through_registers = [(r["layer"], r["role"]) for r in boxes if r["operands"] != "shared"]
    assert not passing_through_registers
    assert all(r["instructions"].get("UTMASTG") for r in boxes if r["kernel"] == "box")


def test_classes_without_taps_are_not_forgotten(arch):
    assert compiled("classes", str(arch)) == []


def test_fifty_image_sizes_compile_few_kernels():
    """One for each role; a box kernel once more for each shape of box that images of these sizes want."""
    counts = compiled("sizes")
    boxes, runs = counts.pop("box channels_last"), counts.pop("box_wgrad channels_last")
    assert 1 <= boxes <= 6
    assert 1 <= runs <= 4
    assert counts == {
        "box contiguous": 0,
        "box_wgrad contiguous": 0,
        "gather channels_last": 1,
        "gather contiguous": 2,
        "wgrad channels_last": 1,
        "wgrad contiguous": 1,
        "fold channels_last": 1,
        "fold contiguous": 1,
    }
