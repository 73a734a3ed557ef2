"""The console script: exit codes and what it prints."""

import argparse
import os
import re
import subprocess
import sys

import pytest

import triton_conv
from triton_conv import cli, cost, explain, explain_words, functional
from triton_conv.check import CASES, DTYPES


@pytest.fixture(autouse=True)
def plain_torch(monkeypatch):
    """Plain torch on the CPU, unless a test says otherwise."""
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)


def test_check_passes_and_says_that_no_kernel_ran(capsys):
    assert cli.main(["check", "--cases", "5", "--device", "cpu"]) == 0
    printed = capsys.readouterr().out
    assert f"all {len(CASES) + 5} cases passed" in printed
    assert "no kernel was tested" in printed
    for dtype in ("float32", "bfloat16", "int8", "complex64"):
        assert re.search(rf"^{dtype} +y ", printed, re.MULTILINE)


def test_one_case_is_singular(capsys):
    assert cli.main(["check", "--only", "1", "--role", "wgrad", "--device", "cpu"]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith("1 case, seed 7;")
    assert "\n1 case passed, 1 tensor compared;" in printed


def test_check_says_when_the_interpreter_ran(capsys, monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert cli.main(["check", "--only", "0", "--role", "fprop", "--device", "cpu"]) == 0
    assert "Triton's kernels in its interpreter" in capsys.readouterr().out


def test_check_fails_with_a_command_that_repeats_the_failure(capsys, monkeypatch):
    right = functional.conv3d
    monkeypatch.setattr(functional, "conv3d", lambda *args, **kwargs: right(*args, **kwargs) + 1)
    assert cli.main(["check", "--cases", "0", "--dtype", "float64", "--role", "fprop", "--device", "cpu"]) == 1
    printed = capsys.readouterr().out
    assert "FAILED 2: conv3d" in printed
    command = "triton-conv check --only 2 --seed 7 --device cpu --dtype float64 --role fprop"
    assert command in printed
    assert "Case(transposed=False" in printed
    assert cli.main(command.split()[1:]) == 1
    assert "\n1 of 1 case failed, 1 tensor compared;" in capsys.readouterr().out


def test_check_reports_exceptions(capsys, monkeypatch):
    def broken(*args, **kwargs):
        raise RuntimeError("no such kernel")

    monkeypatch.setattr(functional, "conv2d", broken)
    assert cli.main(["check", "--only", "1", "--device", "cpu"]) == 1
    assert "RuntimeError: no such kernel" in capsys.readouterr().out


@pytest.mark.parametrize("role", ["fprop", "dgrad", "wgrad"])
def test_check_of_a_role_compares_its_tensors_only(role, capsys):
    assert cli.main(["check", "--cases", "0", "--dtype", "float32", "--role", role, "--device", "cpu"]) == 0
    tensors = set(re.findall(r"^float32 +(\w+) ", capsys.readouterr().out, re.MULTILINE))
    assert tensors == ({"dw"} if role == "wgrad" else {"y", "dx"})


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["fold"], "invalid choice: 'fold'"),
        (["check", "--dtype", "float31"], "'float31' is not one of float32, float16"),
        (["check", "--cases", "-1"], "-1 is negative"),
        (["check", "--role", "egrad"], "invalid choice: 'egrad'"),
        (["demo", "--epochs", "0"], "0 is not positive"),
        (["demo", "--epochs", "many"], "'many' is not a whole number"),
        (["check", "--cases", "1e3"], "'1e3' is not a whole number"),
        (["explain", "8,64", "8x64"], "argument input: '8,64' is not a shape: write 8x64x56x56"),
        (["explain", "8x64x-1", "8x64"], "'8x64x-1' is not a shape"),
        (["explain", "8x", "8x64"], "'8x' is not a shape"),
        (["explain", "1x1x5", "1x1x3", "--stride", "2x1"], "'2x1' is not one value or one per axis: write 2 or 2,1"),
        (["explain", "1x1x5", "1x1x3", "--padding", "1:2:3"], "'1:2:3' is not a padding: write 1, or one value or"),
        (["explain", "1x1x5", "1x1x3", "--padding", "some"], "'some' is not a padding"),
        (["audit", "--layer", "cake"], "argument --layer: 'cake' is not one of 3x3,"),
        (["audit", "--arch", "91"], "invalid choice: 91"),
        (["audit", "--jobs", "0"], "0 is not positive"),
        (["explain", "1x1x5", "1x1x3", "--device", "abacus"], "'abacus' is not one of A100"),
    ],
)
def test_bad_arguments(argv, message, capsys):
    with pytest.raises(SystemExit) as exit_of:
        cli.main(argv)
    assert exit_of.value.code == 2
    printed = capsys.readouterr().err
    assert message in printed
    assert not re.search(r"invalid _\w+ value", printed)


def test_without_a_command_the_help_is_shown(capsys):
    assert cli.main([]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    for word in ("usage: triton-conv", "demo", "check", "explain", "audit", "--version"):
        assert word in printed.err


def test_version(capsys):
    with pytest.raises(SystemExit) as exit_of:
        cli.main(["--version"])
    assert exit_of.value.code == 0
    assert capsys.readouterr().out == f"triton-conv {triton_conv.__version__}\n"


@pytest.mark.parametrize("command", ["demo", "check", "explain", "audit"])
def test_every_option_has_help(command):
    (commands,) = (a for a in cli._parser()._actions if isinstance(a, argparse._SubParsersAction))
    actions = commands.choices[command]._actions
    assert all(action.help for action in actions), [a.dest for a in actions if not a.help]
    for action in actions:
        if action.dest == "dtype":
            assert all(str(dtype).removeprefix("torch.") in action.help for dtype in DTYPES)


def test_explain_shows_the_call_then_its_plans(capsys):
    argv = "explain 8x64x56x57 64x32x3x3 --padding 2:0,1 --stride 1 --groups 2 --dtype bfloat16 --channels-last --bias"
    assert cli.main(argv.split()) == 0
    first, *rest = capsys.readouterr().out.splitlines()
    assert first == (
        "conv2d input 8x64x56x57 weight 64x32x3x3 output 8x64x56x57 bfloat16 channels_last bias "
        "padding 2:0,1 groups 2 on NVIDIA H200"
    )
    titles = [rest[n - 1] for n, line in enumerate(rest) if line.startswith("kernel ")]
    assert titles == ["forward", "input gradient", "weight gradient"]
    assert "four" not in "".join(rest)


def test_explain_says_what_the_plans_of_a_transposed_convolution_are(capsys):
    argv = "explain 8x64x56x56 64x128x4x4 --transposed --stride 2 --padding 1 --output-padding 1,0"
    assert cli.main(argv.split()) == 0
    first, second, *rest = capsys.readouterr().out.splitlines()
    assert first == (
        "conv_transpose2d input 8x64x56x56 weight 64x128x4x4 output 8x128x113x112 float32 "
        "stride 2 padding 1 output_padding 1,0 on NVIDIA H200"
    )
    assert second == "It is the input gradient of a convolution; the geometries are that convolution's."
    plans = [(rest[n - 1], line.split()[-1]) for n, line in enumerate(rest) if line.startswith("kernel ")]
    assert plans == [
        ("forward (input gradient of the convolution)", "(dgrad)"),
        ("input gradient (the convolution itself)", "(fprop)"),
        ("weight gradient (weight gradient of the convolution)", "(wgrad)"),
    ]


def test_explain_predicts_times_and_says_that_nobody_measured_them(capsys):
    argv = "explain 32x256x56x56 256x256x3x3 --padding 1 --dtype bfloat16 --channels-last"
    assert cli.main(argv.split()) == 0
    printed = capsys.readouterr().out
    limits = re.findall(r"^roofline   116 GFLOP, 104 MB: at least 117 us, by matrix rate$", printed, re.MULTILINE)
    assert len(limits) == 3
    times = re.findall(
        r"^time       (\S+) us predicted, not measured: (\d+)% of that limit; tiles", printed, re.MULTILINE
    )
    assert len(times) == 3
    for predicted, share in times:
        assert round(100 * 117 / float(predicted)) == pytest.approx(int(share), abs=1)


def test_explain_says_where_there_is_no_prediction(monkeypatch):
    p = explain.plans((8, 64, 28, 28), (64, 64, 3, 3), padding=1)["forward"]
    monkeypatch.delitem(cost.TILES, p.kernel)
    limit, time = explain_words.times(p).splitlines()
    assert limit.startswith("roofline ")
    assert time == "time       not predicted: there is no model of this kernel"


def test_explain_adds_the_time_of_the_fold():
    shapes, options = ((8, 64, 28, 28), (64, 64, 3, 3)), {"padding": 1, "padding_mode": "circular"}
    p = explain.plans(*shapes, **options)["input gradient"]
    assert p.seconds > p.prediction.seconds > p.roofline.seconds
    assert p.roofline.bytes == 4 * (2 * 8 * 64 * 28 * 28 + 64 * 64 * 9)  # dx counts without its border


def test_explain_says_that_a_complex_convolution_is_four(capsys):
    assert cli.main(["explain", "2x3x9", "4x3x3", "--dtype", "complex64"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("conv1d input 2x3x9 weight 4x3x3 output 2x4x7 complex64")
    assert "one of four real convolutions" in lines[1]


def explained(capsys, argv):
    assert cli.main(["explain", *argv.split()]) == 0
    return capsys.readouterr().out.splitlines()


def titles(lines):
    return [lines[n - 1] for n, line in enumerate(lines) if line.startswith("kernel ")]


def test_explain_shows_what_is_fused_and_saved(capsys):
    lines = explained(capsys, "8x64x28x28 64x64x3x3 --padding 1 --activation silu --residual before --scale")
    assert lines[0].endswith("padding 1 activation silu residual before scale on NVIDIA H200")
    saved = "Saved for backward: input, weight, scale, what silu is applied to, 1.61 MB more, written by the same "
    assert lines[1] == f"{saved}kernel."
    assert "epilogue   scale, residual, silu; what silu is applied to is kept" in lines
    assert titles(lines) == ["forward", "input gradient", "weight gradient", "activation gradient"]
    assert "the output, which costs nothing" in explained(capsys, "8x64x28x28 64x64x3x3 --activation relu")[1]


def test_explain_shows_branches(capsys):
    argv = "2x64x33x33 32x64x1x1 --bias --dtype bfloat16 --channels-last --branch 32x64x3x3/padding=2:1,1/dilation=6"
    first, *rest = explained(capsys, f"{argv.replace('2:1,1', '6')} --branch 16x64x3x3/padding=1:1,1")
    assert first == ("multi_conv2d input 2x64x33x33 bfloat16 channels_last bias combine concatenate on NVIDIA H200")
    assert rest[:3] == [
        "branch 0: weight 32x64x1x1",
        "branch 1: weight 32x64x3x3 padding 6 dilation 6",
        "branch 2: weight 16x64x3x3 padding 1:1,1",
    ]
    assert titles(rest) == ["forward", "input gradient", *(f"weight gradient of branch {i}" for i in range(3))]
    assert sum(line.startswith("time ") and "predicted, not measured" in line for line in rest) == 5


def test_explain_shows_deformable_convolutions(capsys):
    lines = explained(capsys, "2x64x14x14 64x64x3x3 --padding 1 --deform --offset-groups 2 --no-mask")
    assert lines[0] == (
        "deform_conv2d input 2x64x14x14 weight 64x64x3x3 without mask float32 padding 1 offset_groups 2 on NVIDIA H200"
    )
    assert titles(lines) == ["forward", "input gradient", "offset and mask gradient", "weight gradient"]
    assert sum(line.startswith("roofline ") for line in lines) == 4


def test_explain_shows_streaming_convolutions(capsys):
    lines = explained(capsys, "1x32x1x16x16 32x32x3x3x3 --padding 1 --dtype bfloat16 --channels-last --context 2")
    assert lines[:2] == [
        "causal_conv3d input 1x32x1x16x16 weight 32x32x3x3x3 context of 2 frames bfloat16 channels_last padding 1 "
        "on NVIDIA H200",
        "Saved for backward: input, context and weight.",
    ]
    assert titles(lines) == ["forward", "input gradient", "weight gradient"]
    assert explained(capsys, "1x32x9 32x32x3 --context 2")[0].startswith("causal_conv1d ")


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ("--deform --context 2", "argument --deform: does not go with --context"),
        ("--deform --groups 2", "argument --deform: does not go with --groups"),
        ("--context 2 --transposed", "argument --context: does not go with --transposed"),
        ("--context 2 --activation relu", "argument --context: does not go with --activation"),
        ("--causal --padding 1", "argument --causal: does not go with --padding"),
        ("--causal --activation relu", "argument --causal: has --activation silu or none"),
        ("--no-mask", "argument --no-mask: only --deform has one"),
        ("--sum", "argument --sum: only --branch has one"),
        ("--activation silu --negative-slope 1", "argument --negative-slope: only --activation leaky_relu has one"),
        ("--branch 8x8x3x3", "expected all branches to have the same output extents"),
    ],
)
def test_explain_says_which_options_do_not_go_together(options, why, capsys):
    assert cli.main(["explain", "1x8x8x8", "8x8x1x1", *options.split()]) == 2
    assert why in capsys.readouterr().err


def test_explain_says_what_is_no_branch(capsys):
    with pytest.raises(SystemExit):
        cli.main(["explain", "1x8x8x8", "8x8x1x1", "--branch", "8x8x3x3/pad=1"])
    assert "'pad=1' is not one of padding, dilation, stride, groups with a value" in capsys.readouterr().err


def test_explain_reports_what_is_no_convolution(capsys):
    assert cli.main(["explain", "8x64", "64x64"]) == 2
    assert "expected a weight of 3, 4 or 5 dimensions" in capsys.readouterr().err
    assert cli.main(["explain", "8x64x9", "64x64x3", "--output-padding", "1"]) == 2
    assert "argument --output-padding: only a transposed" in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments",
    [
        ["check", "--only", "1", "--device", "cpu"],
        ["explain", "1x1x5", "1x1x3"],
        ["--help"],
        ["configs", "show", "--device", "H200", "--kernel", "box"],
        ["tune", "8x64x56x56", "64x64x3x3", "--dry-run", "--device", "H200"],
    ],
    ids=lambda arguments: arguments[0],
)
def test_a_reader_that_went_away_is_no_error(arguments):
    read, write = os.pipe()
    os.close(read)
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    command = [sys.executable, "-m", "triton_conv", *arguments]
    done = subprocess.run(command, stdout=write, stderr=subprocess.PIPE, text=True, check=False, env=environment)
    os.close(write)
    assert done.stderr == ""
    assert done.returncode == 141


def test_a_missing_gpu_is_named(capsys, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert cli.main(["check", "--device", "cuda"]) == 2
    assert capsys.readouterr().err == "triton-conv: error: argument --device: PyTorch sees no CUDA device\n"


def test_interpreting_on_a_gpu_is_a_contradiction(capsys, monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "")
    assert cli.main(["demo", "--interpret", "--device", "cuda"]) == 2
    assert capsys.readouterr().err == "triton-conv: error: argument --device: --interpret runs on the CPU\n"
    assert os.environ["TRITON_INTERPRET"] == ""


@pytest.mark.parametrize("package", ["sklearn", "matplotlib", "tqdm"])
def test_demo_names_a_missing_extra_in_one_line(package, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, package, None)  # importing it fails
    assert cli.main(["demo"]) == 2
    message = f"demo needs {package}: in a checkout, pip install -e '.[demo]'"
    assert capsys.readouterr().err == f"triton-conv: error: {message}\n"


def test_check_does_without_tqdm(capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "tqdm", None)
    assert cli.main(["check", "--cases", "0", "--role", "fprop", "--device", "cpu"]) == 0
    assert f"100 of {len(CASES)} cases\n" in capsys.readouterr().out


def test_running_the_package_as_a_module():
    """A fresh process: the interpreter is chosen before Triton is imported, and nothing heavy is needed to say no."""
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    command = [sys.executable, "-m", "triton_conv", "check", "--only", "1", "--role", "fprop", "--device", "cpu"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "Triton's kernels in its interpreter" in done.stdout
