"""`triton-conv tune`: what is tuned, what it prints, what it writes and how it ends; times are made up."""

import errno
import json
import multiprocessing
import os
import random
import re
import signal
import tempfile
import time
import warnings
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import pytest
import torch

from triton_conv import cli, stored
from triton_conv.devices import H200
from triton_conv.tuning import commands_tune
from triton_conv.tuning.measure import SimulatedBench
from triton_conv.tuning.store import Store
from triton_conv.tuning.tune import tune as tune_all

SHAPE = ["8x64x28x28", "64x64x3x3", "--padding", "1", "--dtype", "bfloat16", "--channels-last"]
FEW = ["--candidates", 5]
HOME = object()  # the directory that the home fixture gives


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    """No GPU, no launcher, and a user's store that is empty and of the test's own."""
    monkeypatch.setenv("TRITON_CONV_CACHE", str(tmp_path / "home"))
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "TRITON_INTERPRET"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    stored.forget()
    yield tmp_path / "home"
    stored.forget()


class Bench(SimulatedBench):
    """Says of its made-up times that they were measured."""

    def stamp(self, kernel):
        return {**super().stamp(kernel), "driver": "580.65"}


@pytest.fixture
def gpu(monkeypatch):
    """A GPU that makes its times up."""
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr(commands_tune.execute, "device_of", lambda device: H200)
    monkeypatch.setattr(commands_tune, "CudaBench", lambda index: Bench(H200))


def tune(*arguments):
    return cli.main(["tune", *map(str, arguments)])


def files(directory):
    return sorted(path.relative_to(directory).as_posix() for path in Path(directory).rglob("*.json"))


def rows(printed, role):
    return [line.split() for line in printed.splitlines() if f" {role} " in line]


def test_a_dry_run_of_resnet50_needs_no_gpu(capsys, home):
    assert tune("--dry-run", "--suite", "resnet50", "--arch", 90, "--role", "fprop") == 0
    printed = capsys.readouterr().out
    assert len(rows(printed, "fprop")) == 23
    assert rows(printed, "wgrad") == []
    found = re.search(r"23 problems on NVIDIA H200, (\d+) configs .*: ([\d.]+) us by default, ([\d.]+) us at", printed)
    assert int(found[1]) > 23
    assert 0 < float(found[3]) <= float(found[2])
    assert not home.exists()


def test_a_dry_run_of_a_shape_shows_what_would_be_compiled(capsys):
    assert tune("--dry-run", *SHAPE, "--candidates", 7, "--device", "A100") == 0
    printed = capsys.readouterr().out
    assert "on NVIDIA A100, 21 configs" in printed
    for role in ("fprop", "dgrad", "wgrad"):
        ((*_, best, default, roofline),) = rows(printed, role)
        assert float(roofline) <= float(best) <= float(default)


def test_stored_configs_are_no_default_of_a_dry_run(capsys, tmp_path, monkeypatch):
    assert tune("--dry-run", *SHAPE) == 0
    before = capsys.readouterr().out
    assert tune("--simulate", *SHAPE, *FEW, "--store", tmp_path / "made_up") == 0
    monkeypatch.setenv("TRITON_CONV_CACHE", str(tmp_path / "made_up"))
    stored.forget()
    capsys.readouterr()
    assert tune("--dry-run", *SHAPE) == 0
    assert capsys.readouterr().out == before


def test_a_dry_run_says_what_a_device_cannot_do(capsys):
    shape = ["8x64x28x28", "64x64x3x3", "--dtype", "float8_e4m3fn", "--channels-last"]
    assert tune("--dry-run", *shape, "--arch", 80) == 0
    assert "NVIDIA A100 has no float8_e4m3fn arithmetic" in capsys.readouterr().out


def test_suites_are_listed(capsys):
    assert tune("--list-suites") == 0
    printed = capsys.readouterr().out
    assert re.search(r"resnet50 +23 +128 +ResNet-50", printed)


def test_several_suites_at_another_batch(capsys):
    assert tune("--dry-run", "--suite", "convnext", "--suite", "mamba", "--batch", 2, "--role", "wgrad") == 0
    printed = capsys.readouterr()
    assert len(rows(printed.out, "wgrad")) == 8
    assert "convnext: stem 3>96 224x224" in printed.out
    assert "triton-conv: Mamba-2.8B is left out: causal_conv1d" in printed.err


def test_a_simulation_writes_to_its_own_directory(capsys, home, tmp_path):
    assert tune("--simulate", *SHAPE, *FEW, "--store", tmp_path / "made_up", "--device", "H100") == 0
    printed = capsys.readouterr()
    assert not home.exists()
    assert files(tmp_path / "made_up") == ["NVIDIA_H100/box.json", "NVIDIA_H100/box_wgrad.json"]
    assert "made-up times: 3 problems on NVIDIA H100" in printed.out
    assert f"3 of 3 problems measured, in {tmp_path / 'made_up'}" in printed.out
    assert printed.err == ""


def test_what_is_measured_is_what_later_calls_find(capsys, gpu, home):
    assert tune(*SHAPE, *FEW) == 0
    assert files(home) == ["NVIDIA_H200/box.json", "NVIDIA_H200/box_wgrad.json"]
    capsys.readouterr()
    assert cli.main(["explain", *SHAPE]) == 0
    printed = capsys.readouterr().out
    assert printed.count("config of user store, measured") == 3
    assert printed.count("us measured, ") == 3


def test_a_second_run_measures_nothing_but_with_again(gpu, monkeypatch):
    measured = []
    check = SimulatedBench.fault
    monkeypatch.setattr(SimulatedBench, "fault", lambda self, *what: measured.append(what[1]) or check(self, *what))
    counts = []
    for arguments in ((), (), ("--again",), ("--candidates", 6)):
        measured.clear()
        assert tune(*SHAPE, *FEW, *arguments) == 0
        counts.append(len(measured))
    assert counts == [15, 0, 15, 3]


def test_wrong_candidates_are_reported_and_do_not_win(capsys, gpu, home, monkeypatch):
    assert tune(*SHAPE, *FEW, "--role", "fprop") == 0
    (entry,) = Store(home).entries("NVIDIA H200", "box")
    wrong = entry.winner.config
    monkeypatch.setattr(commands_tune, "CudaBench", lambda index: Bench(H200, wrong=[wrong]))
    capsys.readouterr()
    assert tune(*SHAPE, *FEW, "--role", "fprop", "--again", "--export", home / "export") == 1
    printed = capsys.readouterr()
    assert printed.err.count("wrong: ") == 1
    assert "8x64x28x28 64x64x3x3 (" in printed.err
    assert f"wrong: box {wrong}: simulated" in printed.err
    (entry,) = Store(home).entries("NVIDIA H200", "box")
    assert [c.config for c in entry.candidates if c.status == "wrong"] == [wrong]
    assert Store(home / "export").entries("NVIDIA H200", "box")[0].winner.config != wrong


def test_an_interrupt_leaves_what_was_measured(capsys, gpu, home, monkeypatch):
    measure = SimulatedBench.time

    def interrupted(self, problem, plans):
        if problem.role.value == "wgrad":
            raise KeyboardInterrupt
        return measure(self, problem, plans)

    monkeypatch.setattr(SimulatedBench, "time", interrupted)
    assert tune(*SHAPE, *FEW) == 130
    printed = capsys.readouterr()
    assert "2 of 3 problems measured, in" in printed.out
    assert printed.err == "triton-conv: interrupted; what was measured is kept, and not measured again\n"
    assert {entry.key.role for entry in Store(home).entries("NVIDIA H200", "box")} == {"fprop", "dgrad"}


def test_a_gpu_that_breaks_leaves_what_was_measured(capsys, gpu, home, monkeypatch):
    check = SimulatedBench.fault

    def broken(self, problem, p):
        if problem.role.value == "dgrad":
            raise torch.AcceleratorError("an illegal memory access was encountered\nand more")
        return check(self, problem, p)

    monkeypatch.setattr(SimulatedBench, "fault", broken)
    assert tune(*SHAPE, *FEW) == 1
    printed = capsys.readouterr()
    assert "1 of 3 problems measured, in" in printed.out
    assert (
        "error: the GPU answers no more: an illegal memory access was encountered; what was measured is kept"
        in printed.err
    )
    monkeypatch.setattr(SimulatedBench, "fault", check)
    assert tune(*SHAPE, *FEW) == 0
    found = [c for entry in Store(home).entries("NVIDIA H200", "box") for c in entry.candidates]
    assert sum(c.status == "failed" for c in found) == 1


def test_measured_winners_are_exported_as_they_ship(capsys, gpu, tmp_path):
    assert tune(*SHAPE, *FEW, "--export", tmp_path / "configs") == 0
    assert files(tmp_path / "configs") == ["NVIDIA_H200/box.json", "NVIDIA_H200/box_wgrad.json"]
    for path in (tmp_path / "configs").rglob("*.json"):
        _, _, entries = stored.loads(path.read_text(), str(path))
        assert all(len(entry.candidates) == 1 and entry.source == "measured" for entry in entries)
    capsys.readouterr()
    assert cli.main(["configs", "verify", str(tmp_path / "configs")]) == 0


NETWORK = """
import torch
calls = []
def build(width=8, kind="plain"):
    calls.append(width)
    if kind == "words":
        return "a network"
    layers = [torch.nn.Conv2d(3, width, 3), torch.nn.ReLU(), torch.nn.ConvTranspose2d(width, 4, 2, stride=2)]
    return torch.nn.Sequential(*layers)
class Looks(torch.nn.Conv2d):
    def __init__(self):
        super().__init__(3, 8, 3)
    def forward(self, x):
        return super().forward(x) * float(x.sum())
"""


@pytest.fixture
def network(tmp_path, monkeypatch):
    (tmp_path / "some_network.py").write_text(NETWORK)
    monkeypatch.chdir(tmp_path)
    yield "some_network:build"
    import sys

    sys.modules.pop("some_network", None)


def test_simulated_times_do_not_stand_beside_measured_ones(capsys, gpu, tmp_path):
    shape = [*SHAPE, *FEW, "--role", "fprop", "--store"]
    assert tune(*shape, tmp_path / "made_up", "--simulate") == 0
    assert tune(*shape, tmp_path / "measured") == 0
    capsys.readouterr()
    assert tune(*shape, tmp_path / "made_up", "--again") == 2
    assert f"argument --store: {tmp_path / 'made_up'} holds simulated times" in capsys.readouterr().err
    assert tune(*shape, tmp_path / "measured", "--simulate") == 2
    assert f"argument --store: {tmp_path / 'measured'} holds measured times" in capsys.readouterr().err


def test_what_ranks_of_other_devices_found_is_exported_as_theirs(capsys, gpu, home, tmp_path, monkeypatch):
    elsewhere = H200._replace(name="NVIDIA A100")

    def sweep(tasks, make_bench, store, budget, **options):
        others = [task._replace(problem=task.problem._replace(device=elsewhere)) for task in tasks]
        return [
            *tune_all(tasks, Bench(H200), store, budget, options["progress"]),
            *tune_all(others, Bench(elsewhere), store, budget, options["progress"]),
        ]

    monkeypatch.setattr(commands_tune, "sweep", sweep)
    assert tune(*SHAPE, *FEW, "--role", "fprop", "--export", tmp_path / "configs") == 0
    printed = capsys.readouterr().out
    assert "2 of 2 problems measured" in printed
    assert "2 problems on NVIDIA H200, NVIDIA A100" in printed
    for device in ("NVIDIA H200", "NVIDIA A100"):
        (entry,) = Store(tmp_path / "configs").entries(device, "box")
        (found,) = Store(home).entries(device, "box")
        assert entry.winner == found.winner


def test_a_store_that_takes_no_files_is_said_before_anything_is_measured(capsys, gpu, tmp_path, monkeypatch):
    assert tune(*SHAPE, *FEW, "--store", "/dev/null/configs") == 2
    assert "argument --store: /dev/null/configs takes no files: /dev/null is no directory" in capsys.readouterr().err
    monkeypatch.setenv("TRITON_CONV_CACHE", "/dev/null/configs")
    monkeypatch.setattr(stored, "_held", {})
    assert tune(*SHAPE, *FEW) == 2
    with pytest.warns(UserWarning, match="configs stay in memory"):
        assert tune(*SHAPE, *FEW, "--role", "fprop", "--export", tmp_path / "configs") == 0
    assert files(tmp_path / "configs") == ["NVIDIA_H200/box.json"]


def test_a_sweep_that_ran_out_of_time_counts_what_was_measured(capsys, gpu):
    assert tune(*SHAPE, "--total-seconds", 1e-6) == 0
    printed = capsys.readouterr().out
    assert "0 of 3 problems measured, in" in printed


@pytest.mark.parametrize("width", [20, 40, 80, 200])
def test_a_narrow_terminal_hides_no_column(width, capsys, monkeypatch):
    pytest.importorskip("rich")
    from rich.console import Console

    from triton_conv.tuning import tables

    monkeypatch.setattr(tables, "Console", lambda: Console(force_terminal=True, width=width))
    made = tables.table("layer", "config", ">default us", ">gain over it")
    tables.add(made, ["stage 4 downsample", "128x64x64 filters_first", "13.5", "1.95"])
    tables.show(made)
    printed = re.sub(r"\x1b\[[0-9;]*m", "", capsys.readouterr().out)
    words = "layer config default us gain over it stage 4 downsample 128x64x64 filters_first 13.5 1.95"
    assert set(words.split()) <= set(printed.split())


def test_a_model_of_the_working_directory(capsys, network):
    assert tune("--dry-run", "--model", network, "--input", "2x3x16x16") == 0
    printed = capsys.readouterr().out
    assert "5 problems on NVIDIA H200" in printed  # no gradient of the image
    assert "3>8 3x3, 2 of 16x16" in printed
    assert "4>8 2x2 stride 2x2, 2 of 28x28" in printed


def test_options_of_a_model(capsys, network):
    how = ("--model-arguments", '{"width": 24}', "--autocast", "bfloat16", "--channels-last", "--forward-only")
    assert tune("--simulate", "--model", network, "--input", "2x3x16x16", *how, *FEW, "--store", "made_up") == 0
    assert "3>24 3x3" in capsys.readouterr().out
    entries = [e for path in Path("made_up").rglob("*.json") for e in stored.loads(path.read_text(), "")[2]]
    assert {(e.key.role, e.key.dtype) for e in entries} == {("fprop", "bfloat16"), ("dgrad", "bfloat16")}


def test_a_model_that_looks_at_values_runs_for_real(capsys, network):
    how = ("--model", "some_network:Looks", "--input", "1x3x9x9", "--run-on", "cpu")
    assert tune("--dry-run", *how) == 0
    assert "2 problems" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "one of INPUT and WEIGHT, --suite, --model is to say what is tuned"),
        (["--suite", "resnet50", *SHAPE], "one of INPUT and WEIGHT, --suite, --model is"),
        (["1x1x5"], "argument weight: a shape is an input and a weight"),
        ([*SHAPE], "PyTorch sees no CUDA device to measure on: --dry-run shows what would be done"),
        (["--suite", "resnet50", "--device", "A100"], "argument --device A100: only the GPU that is there is measured"),
        (["--suite", "resnet50", "--arch", "90"], "argument --arch 90: only the GPU that is there is measured"),
        ([*SHAPE, "--dry-run", "--device", "cuda"], "PyTorch sees no CUDA device"),
        ([*SHAPE, "--dry-run", "--arch", "90", "--device", "H100"], "argument --arch: does not go with --device"),
        ([*SHAPE, "--simulate"], "argument --simulate: needs --store"),
        ([*SHAPE, "--simulate", "--store", "x", "--export", "y"], "argument --export: only what was measured"),
        ([*SHAPE, "--simulate", "--store", HOME], "argument --store: is your own"),
        ([*SHAPE, "--dry-run", "--dtype", "complex64"], "argument --dtype: complex convolutions are made of real ones"),
        ([*SHAPE, "--dry-run", "--simulate"], "argument --simulate: does not go with --dry-run"),
        ([*SHAPE, "--dry-run", "--batch", "3"], "argument --batch: goes with --suite"),
        (["--dry-run", "--suite", "resnet50", "--stride", "2"], "argument --stride: goes with INPUT and WEIGHT"),
        (["--dry-run", "--suite", "resnet50", "--input", "1x2"], "argument --input: goes with --model"),
        (["--dry-run", "8x64x9x9", "64x32x3x3"], "channels"),
        (["--dry-run", *SHAPE, "--output-padding", "1"], "argument --output-padding: only a transposed"),
        (["--dry-run", "--suite", "mamba"], "there is nothing to tune"),
        (["--dry-run", "--model", "some_network:build"], "argument --model: needs --input"),
        (
            ["--dry-run", "--model", "some_network:build", "--input", "1x3x9x9", "--autocast", "float64"],
            "argument --autocast: is bfloat16 or float16",
        ),
        (["--dry-run", "--model", "some_network:tower", "--input", "1x3x9x9"], "some_network has no tower"),
        (["--dry-run", "--model", "no_network:build", "--input", "1x3x9x9"], "no_network cannot be imported: Module"),
        (["--dry-run", "--model", "some_network", "--input", "1x3x9x9"], "'some_network' is not package.module:"),
        (["--dry-run", "--model", "some_network:build", "--input", "1x4x9x9"], "some_network:build on 1x4x9x9: "),
        (
            ["--dry-run", "--model", "some_network:Looks", "--input", "1x3x9x9"],
            "the forward of Looks cannot run on tensors",
        ),
    ],
)
def test_what_cannot_be_done_is_said_before_anything_is(arguments, message, capsys, network, home):
    assert tune(*(home if argument is HOME else argument for argument in arguments)) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.splitlines()[-1].startswith("triton-conv: error: ")
    assert message in printed.err
    assert not home.exists()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "argument --model-arguments: is no JSON"),
        ("[1]", "argument --model-arguments: is to be a JSON object"),
        ('{"depth": 3}', "some_network:build cannot be called: TypeError"),
        ('{"kind": "words"}', "some_network:build is to return a torch.nn.Module, but returned a str"),
    ],
)
def test_bad_arguments_of_a_model(text, message, capsys, network):
    assert tune("--dry-run", "--model", network, "--input", "1x3x9x9", "--model-arguments", text) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--suite", "resnet51"], "argument --suite: 'resnet51' is not one of resnet50,"),
        (["--seconds", "0"], "argument --seconds: 0 is not positive"),
        (["--total-seconds", "soon"], "'soon' is not a number of seconds"),
        (["--input", "1x2:int65"], "argument --input: 'int65' is not one of"),
        (["--arch", "91"], "invalid choice: 91"),
    ],
)
def test_bad_values(arguments, message, capsys):
    with pytest.raises(SystemExit) as exit_of:
        tune(*arguments)
    assert exit_of.value.code == 2
    assert message in capsys.readouterr().err


def test_torchvision_by_name(capsys):
    pytest.importorskip("torchvision")
    assert tune("--dry-run", "--model", "torchvision:resnet50", "--input", "2x3x64x64", "--role", "wgrad") == 0
    assert len(rows(capsys.readouterr().out, "wgrad")) == 23


@pytest.mark.parametrize("arguments", [(*SHAPE, *FEW), (*SHAPE, "--dry-run"), ("--list-suites",)])
def test_ranks_other_than_the_first_say_nothing(arguments, capsys, gpu, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    assert tune(*arguments) == 0
    printed = capsys.readouterr()
    assert printed.out == printed.err == ""
    assert torch.cuda.is_available()


# ---------------------------------------------------------------------------------------------------------------------
# Faults


def test_what_the_store_takes_no_more_is_kept_and_said(capsys, gpu, home, monkeypatch, tmp_path):
    """The disk is full from the second file on."""
    monkeypatch.setattr(stored, "_held", {})
    replace, temporary = os.replace, tmp_path / "tmp"
    temporary.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(temporary))

    def full(source, target):
        if home in Path(target).parents and Path(target).name != "box.json":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        replace(source, target)

    monkeypatch.setattr(os, "replace", full)
    with pytest.warns(UserWarning, match="configs stay in memory.*No space left on device") as warned:
        assert tune(*SHAPE, *FEW) == 1
    assert len(warned) == 1
    printed = capsys.readouterr()
    assert "3 of 3 problems measured" in printed.out
    assert f"{home} did not take 1 of the results: they are in {temporary}" in printed.err
    (kept,) = temporary.iterdir()
    assert files(kept) == ["NVIDIA_H200/box_wgrad.json"]
    assert files(home) == ["NVIDIA_H200/box.json"]
    monkeypatch.setattr(os, "replace", replace)
    assert cli.main(["configs", "merge", str(kept)]) == 0
    stored._held.clear()
    assert len(Store(home).entries("NVIDIA H200", "box_wgrad")) == 1


def test_what_no_disk_takes_is_printed(capsys, gpu, home, monkeypatch):
    monkeypatch.setattr(stored, "_held", {})

    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "replace", full)
    with pytest.warns(UserWarning, match="configs stay in memory"):
        assert tune(*SHAPE, *FEW, "--role", "fprop") == 1
    printed = capsys.readouterr()
    assert "nor do temporary files (No space left on device): they follow" in printed.err
    text = printed.out[printed.out.index("{") :]
    text = text[: json.JSONDecoder().raw_decode(text)[1]]  # of the first file
    assert stored.loads(text, "printed")[:2] == ("NVIDIA H200", "box")
    stored._held.clear()


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT], ids=["killed", "interrupted"])
def test_a_sweep_that_is_ended_at_any_moment_leaves_a_store_that_another_goes_on_with(number, tmp_path):
    place, rng = tmp_path / "made_up", random.Random(number)
    command = ["--simulate", "--store", place, *SHAPE, "--candidates", 12]
    fork = multiprocessing.get_context("fork")

    def sweep(begun):
        signal.signal(signal.SIGINT, signal.default_int_handler)
        with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere), redirect_stderr(nowhere):
            try:
                begun.set()
                os._exit(tune(*command))
            except KeyboardInterrupt:  # before the command began, which then is Python's to end
                os._exit(130)

    seen, codes = set(), []
    for _ in range(5):
        begun = fork.Event()
        process = fork.Process(target=sweep, args=(begun,))
        process.start()
        assert begun.wait(60)
        time.sleep(rng.uniform(0.05, 0.6))
        os.kill(process.pid, number)
        process.join(60)
        codes.append(process.exitcode)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            found = {
                (kernel, entry.key, c.config)
                for kernel in ("box", "box_wgrad", "gather", "wgrad")
                for entry in Store(place).entries("NVIDIA H200", kernel)
                for c in entry.candidates
            }
        assert seen <= found
        seen = found
    assert set(codes) <= {0, 130, -number}
    assert tune(*command) == 0
    assert not [path for path in place.rglob("*") if path.suffix not in ("", ".json", ".lock")]
