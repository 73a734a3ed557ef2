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
    """One for each role; a box kernel once more for each shape of box that images of these sizes want.

    Contiguous depthwise images want another kernel for each number of columns that divides theirs, and their weight
    gradients one more where lanes do not end with the image; long filters want one for each shape of tile and vector.
    Other contiguous images may be small enough to be gathered as they lie or large enough to be copied first: both are
    here.
    """
    counts = compiled("sizes")
    few = {"box": 6, "box_wgrad": 4, "depthwise": 10, "depthwise_wgrad": 10, "gather": 3, "wgrad": 2, "fold": 1}
    few |= {"banded": 8, "banded_wgrad": 6}
    assert all(count <= few[name.split()[0]] for name, count in counts.items()), counts
    banded = {"banded", "banded_wgrad"}
    assert all(counts[f"{kernel} channels_last"] for kernel in few.keys() - banded), counts
    assert all(counts[f"{kernel} long"] for kernel in banded), counts
    once = ("gather channels_last", "wgrad channels_last", "fold channels_last", "fold contiguous")
    assert {name: counts[name] for name in once} == dict.fromkeys(once, 1)
    assert counts["depthwise channels_last"] == 2
    assert counts["depthwise_wgrad channels_last"] <= 3
