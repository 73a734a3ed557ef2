"""The benchmark of what calls take the host, and what direct launches hand to compiled kernels."""

import json
import os
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

HERE = Path(__file__).parent

# Folders with other Tritons, as `pip install --no-deps --target` makes them.
TRITONS = [path for path in os.environ.get("TRITON_CONV_TEST_TRITONS", "").split(os.pathsep) if path]


@cache
def python(*arguments, triton=""):
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    places = [triton, str(HERE.parent), environment.get("PYTHONPATH", "")]
    environment["PYTHONPATH"] = os.pathsep.join(place for place in places if place)
    done = subprocess.run(
        [sys.executable, *arguments], env=environment, capture_output=True, text=True, check=False, cwd=HERE.parent
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.mark.parametrize("triton", ["", *TRITONS])
def test_direct_launches_have_the_public_ones_arguments(triton):
    found = json.loads(python(str(HERE / "direct_launches.py"), triton=triton))
    assert found["wrong"] == []
    kinds = [
        "activation_backward",
        "banded",
        "banded_wgrad",
        "box",
        "box_wgrad",
        "causal",
        "causal_backward",
        "causal_update",
        "depthwise",
    ]
    kinds += ["depthwise_wgrad", "fold", "gather", "separable", "shift", "sum_slabs", "wgrad"]
    assert found["kinds"] == kinds
    assert found["boxes"]


@pytest.mark.parametrize("triton", ["", *TRITONS])
def test_calls_that_are_not_remembered_are_launched_directly_too(triton):
    short = json.loads(python(str(HERE / "direct_launches.py"), triton=triton))["short"]
    assert len(short) == 7
    assert all(short.values()), short


@pytest.mark.parametrize("triton", ["", *TRITONS])
def test_launches_are_public_where_someone_wants_to_know(triton):
    public = json.loads(python(str(HERE / "direct_launches.py"), triton=triton))["public"]
    assert not public.pop("nothing")
    assert not public.pop("nothing again")
    assert len(public) == 6
    assert all(public.values()), public


def test_the_benchmark_shows_every_layer():
    lines = python("-m", "bench.host", "--calls", "2", "--batches", "3").splitlines()
    assert "stubbed" in lines[0]
    assert [line[:44].strip() for line in lines[1:7]] == [
        f"{who} {what}"
        for who in ("F.conv2d", "triton_conv.conv2d")
        for what in ("inference", "forward", "forward + backward")
    ]
    assert sum(line.startswith("short: ") for line in lines) == 6
    assert sum(line.startswith("long: ") for line in lines) == 8
    assert all(float(line[44:53]) > 0 for line in lines[1:-1])
    assert lines[-1].startswith("3 of 3 ")
    assert lines[-1].endswith(" 0 launches by Triton's binder")
