"""How kernels are compiled, for targets this machine need not have; `test_audit` has what comes out."""

import json
import os
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest


@cache
def compiled(*arguments: str):
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    script = Path(__file__).with_name("compile_plans.py")
    result = subprocess.run(
        [sys.executable, str(script), *arguments], env=environment, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr[-3000:]
    return json.loads(result.stdout)


@pytest.mark.parametrize(
    "arch", [pytest.param(80, marks=pytest.mark.slow), 90, pytest.param(100, marks=pytest.mark.slow)]
)
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
