"""How kernels of deformable convolutions are compiled, for targets this machine need not have."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).with_name("compile_deform.py")


def compiled(*arguments):
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, str(SCRIPT), *map(str, arguments)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)


@pytest.mark.slow
def test_fifty_image_sizes_compile_few_kernels():
    """Each once for each of two memory formats."""
    once = {"deform_cells": 2, "deform_dgrad": 2, "deform_offset": 2, "deform_wgrad": 2}
    assert compiled("sizes") == {"deform": 2, **once, "sum_slabs": 1}


@pytest.mark.parametrize(
    ("arch", "dtype"),
    [
        (90, "float16"),
        pytest.param(80, "bfloat16", marks=pytest.mark.slow),
        pytest.param(90, "float32", marks=pytest.mark.slow),
        pytest.param(100, "float16", marks=pytest.mark.slow),
    ],
)
def test_nothing_is_spilled_and_dots_are_matrix_instructions(arch, dtype):
    """And no order of additions is left to chance."""
    rows = compiled("code", arch, dtype)
    kernels = {"deform", "deform_cells", "deform_dgrad", "deform_offset", "deform_wgrad"}
    assert {kernel for kernel, *_ in rows} - {"sum_slabs"} == kernels
    for kernel, *problem, spilled, matrix, atomics in rows:
        assert (spilled, atomics) == (0, 0), (kernel, problem)
        multiplies = kernel not in ("deform_cells", "sum_slabs")
        assert matrix.endswith("MMA") == multiplies, (kernel, problem)
        if problem == [256, 256, 1] and multiplies and dtype != "float32":
            assert matrix == {80: "HMMA", 90: "HGMMA", 100: "UTCHMMA"}[arch], kernel
