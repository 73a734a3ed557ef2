"""`triton-conv report`: says what is wrong and where, names the kernel, and tells nothing private."""

import getpass
import os
import platform
import re
import stat
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from triton_conv import cli
from triton_conv.kernels.launch import Launch
from triton_conv.tuning import built, differences, report

BOX = ["report", "2x16x8x8", "16x16x3x3", "--padding", "1", "--dtype", "bfloat16", "--channels-last"]


pytestmark = pytest.mark.usefixtures("kernels")


def reported(capsys, *arguments):
    code = cli.main(arguments)
    said = capsys.readouterr()
    assert said.err == ""
    return code, said.out


@pytest.fixture
def planted(monkeypatch):
    """The box kernel writes a wrong value into the last column of channel 3 of what it computes."""
    right = Launch.run

    def run(self, tensors):
        right(self, tensors)
        if self.name == "box":
            written = tensors["x" if "x" in tensors and "dgrad" in str(self.arguments) else "y"]
            written[:, 3, :, -1] += 100

    monkeypatch.setattr(Launch, "run", run)


def test_a_right_result_is_called_so(capsys):
    code, text = reported(capsys, "report", "1x2x4x4", "3x2x3x3", "--bias")
    assert code == 0
    assert text.startswith("# triton_conv report: nothing here is wrong\n")
    for title in ("Machine", "Plans", "Values", "Kernels, each by itself", "Again"):
        assert f"\n## {title}\n" in text
    assert re.search(r"^gradient of weight +0\.\d+ +0\.\d+ +yes", text, re.MULTILINE)
    assert "TRITON_INTERPRET=1 triton-conv report 1x2x4x4 3x2x3x3 --bias" in text
    assert re.search(r"^source +[0-9a-f]{16}$", text, re.MULTILINE)
    assert f"torch              {torch.__version__}" in text


def test_a_planted_error_is_found_and_its_kernel_named(capsys, planted):
    code, text = reported(capsys, *BOX)
    assert code == 1
    first, values = text.partition("\n")[0], text.partition("## Values")[2]
    assert "wrong: output," in first
    assert "forward by box" in first
    assert "forward by gather" not in first  # the plain kernel is right, so the box kernel is at fault
    assert "16 of 2048 elements are wrong, at N all 2; K 3 of 16; P all 8; Q 7 of 8" in values
    assert re.search(r"^\[0, 3, 0, 7\]  ours \S+  torch \S+  float64 \S+$", values, re.MULTILINE)
    assert re.search(r"gather +could run +16x16x16 .*\n +right", values)
    assert re.search(r"box +runs .*\n +16 of 2048 elements are not within rounding", values)


def test_results_that_change_from_run_to_run_are_named(capsys, monkeypatch):
    right, count = Launch.run, iter(range(1000))

    def run(self, tensors):
        right(self, tensors)
        tensors["y"].view(-1)[0] += next(count) * 2**-20

    monkeypatch.setattr(Launch, "run", run)
    code, text = reported(capsys, "report", "1x1x4", "1x1x4", "--dtype", "float64")
    assert code == 1
    assert "output differs from run to run" in text


@pytest.mark.parametrize(
    "line",
    [
        "2x4x7 4x3 --causal --bias --activation silu --initial-state",
        "1x4x5x5 4x1x3x3 --groups 4 --pointwise 3 --bias",
        "1x4x5x5 4x4x1x1 --branch 4x4x3x3/padding=1 --bias",
        pytest.param("1x4x4x4 4x4x3x3 --padding 1 --deform --bias", marks=pytest.mark.slow),
        "1x2x2x4x4 3x2x3x3x3 --context 2",
        "1x4x3x3 4x4x1x1 --activation gelu --residual before --scale --bias",
        "1x16x4x4 8x16x3x3 --dtype float8_e4m3fn --bias",
        "1x4x4x4 4x4x3x3 --dtype int8 --out-dtype int32",
        pytest.param(
            "1x2x4x4 2x3x2x2 --transposed --stride 2 --dtype complex64 --output-padding 1", marks=pytest.mark.slow
        ),
        "1x2x5 3x2x3 --padding 1 --padding-mode circular --dtype float16",
    ],
)
def test_every_kind_is_computed_and_right(capsys, line):
    code, text = reported(capsys, "report", *line.split())
    assert code == 0, text
    assert re.search(r"^output +\d", text, re.MULTILINE)


def test_nothing_private_is_said(capsys, monkeypatch, tmp_path):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    monkeypatch.setenv("TORCH_TOKEN", f"of-{platform.node()}")
    monkeypatch.setenv("TRITON_ALWAYS_COMPILE", "1")
    monkeypatch.setenv("MY_SECRET", "secret")
    _, text = reported(capsys, "report", "1x1x4", "1x1x4", "--out", str(tmp_path / "a.md"))
    assert "written to" in text
    written = (tmp_path / "a.md").read_text()
    assert "TRITON_CACHE_DIR set" in written
    assert "TORCH_TOKEN set" in written
    assert "TRITON_ALWAYS_COMPILE=1" in written
    private = {str(tmp_path), "MY_SECRET", "secret", str(Path.home()), str(Path.cwd()), platform.node(), "a.md"}
    assert [word for word in private | {getpass.getuser()} if len(word) > 4 and word in written] == []
    assert stat.S_IMODE(os.stat(tmp_path / "a.md").st_mode) == 0o600


def test_a_file_that_exists_is_not_written_over(capsys, tmp_path):
    path = tmp_path / "a.md"
    path.write_text("mine")
    assert cli.main(["report", "1x1x4", "1x1x4", "--out", str(path)]) == 2
    assert "argument --out" in capsys.readouterr().err
    assert path.read_text() == "mine"


def test_what_is_no_convolution_is_refused(capsys):
    assert cli.main(["report", "1x2x4", "1x1x9"]) == 2
    assert capsys.readouterr().err.startswith("triton-conv: error: ")


@pytest.mark.slow
def test_without_the_variable_kernels_are_interpreted_beside_plain_torch():
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "triton_conv", "report", "1x2x5x5", "4x2x3x3", "--device", "cpu"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment, timeout=300)
    assert done.returncode == 0, done.stderr
    before, _, after = done.stdout.partition("## In Triton's interpreter")
    assert "no kernel runs" in before
    assert "none of which runs here" in before
    assert "gather" in after
    assert re.search(r"^gradient of weight +0\.0\d+", after, re.MULTILINE)


def test_a_pattern_of_wrong_elements_is_put_into_words():
    wrong = torch.zeros(2, 4, 6, dtype=torch.bool)
    wrong[1, :, 3:] = True
    lines = differences.lines(wrong, "NKQ", torch.ones(2, 4, 6), torch.zeros(2, 4, 6), None)
    assert lines[0] == "12 of 48 elements are wrong, at N 1 of 2; K all 4; Q 3-5 of 6"
    assert lines[1].endswith("9-11 of 12")
    assert lines[2] == "[1, 0, 3]  ours 1  float64 0"
    assert len(lines) == 7


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_nan_where_a_number_belongs_is_infinitely_wrong(value):
    want, got = torch.ones(3, dtype=torch.float64), torch.tensor([1.0, value, 1.0])
    allowed = differences.bound(want, 4, torch.float32, ("ieee", torch.device("cpu")), 0.0)
    assert differences.share(got, want, allowed).tolist() == [0.0, float("inf"), 0.0]
    assert differences.share(want, want, allowed).max() == 0


def test_operands_are_those_of_the_seed():
    how = {"dtype": torch.float16, "channels_last": True}
    one, same, other = (built.built((2, 4, 5, 5), (4, 4, 3, 3), seed=seed, **how) for seed in (1, 1, 2))
    assert torch.equal(one.tensors["input"], same.tensors["input"])
    assert not torch.equal(one.tensors["input"], other.tensors["input"])
    assert one.tensors["input"].is_contiguous(memory_format=torch.channels_last)


def test_only_small_convolutions_are_interpreted():
    assert report.interpretable((2, 16, 8, 8), (16, 16, 3, 3))
    assert not report.interpretable((8, 64, 56, 56), (128, 64, 3, 3))
