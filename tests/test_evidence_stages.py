"""Stages a to d of the evidence run: what they cover, what they call wrong, and the whole run simulated."""

import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import triton_conv
from bench import records
from bench.evidence import (
    STAGES,
    ceilings_and_smoke,
    checking,
    compound,
    quick_bench,
    record,
    references,
    values,
    worst_losses,
)
from bench.evidence.units import Context
from bench.jobs import plans as plans_of_job
from bench.jobs import predicted_row
from bench.records import CHANNELS_LAST, CONTIGUOUS, OURS, Measurement
from triton_conv import check, explain, stored
from triton_conv.devices import H200
from triton_conv.tuning import operands
from triton_conv.tuning.layers import LAYERS

ROOT = Path(__file__).parents[1]


def context(out=Path("nowhere"), simulate=True):
    return Context(out, torch.device("cpu"), simulate, lambda: 100.0)


def unit(stage, where, name):
    return next(unit for unit in stage.units(where) if unit.name.startswith(name))


# ---------------------------------------------------------------------------------------------------------------------
# Nothing is left out


def test_the_smoke_check_launches_every_kernel():
    sources = Path(triton_conv.__file__).with_name("kernels").glob("*.py")
    there = {name for path in sources for name in re.findall(r'Launch\(\s*"(\w+)"', path.read_text())}
    assert {"box", "fold", "causal_update", "shift"} < there
    launched, modes = set(), set()
    for one in ceilings_and_smoke.checks(context()):
        plan = one.plan
        if one.problem is not None:
            problem, plan = checking.small_plan(one.problem, one.plan, context())
            modes |= set(problem.geometry.modes)
        launched |= {launch.name for launch in plan.launches}
    for job in compound.few(H200):
        launched |= {launch.name for plan in plans_of_job(job, H200) for launch in plan.launches}
    assert there - launched == set()
    assert modes == {"zeros", "reflect", "replicate", "circular"}


def test_on_a_device_every_layer_is_checked_in_every_role():
    where = context(simulate=False)
    found = ceilings_and_smoke.checks(where)
    assert len({one.name for one in found}) == len(found)
    names = {one.name.rpartition(",")[0] for one in found} | {job.name for job in compound.jobs()}
    assert names >= set(LAYERS)
    assert found[: len(ceilings_and_smoke.checks(context()))] == ceilings_and_smoke.checks(context())


def test_values_are_of_all_cases_and_all_configs_that_ship():
    names = [unit.name for unit in values.units(context(simulate=False))]
    assert len(set(names)) == len(names)
    assert sum(name.startswith("case ") for name in names) == len(check.CASES)
    shipped = [name for name in names if name.startswith("shipped ")]
    directory = stored.path_of(stored.shipped_directory(), H200.name, "").parent
    assert len(shipped) == sum(len(stored.load(path)[2]) for path in directory.glob("*.json"))
    eight = {name.split()[2] for name in names if name.startswith("8 warps ")}
    assert eight >= {name.split()[1] for name in shipped}


@pytest.mark.parametrize("warps", [0, 8])
def test_a_shipped_config_runs_as_it_is_on_a_device(warps):
    for kernel, entry in checking.covering((kernel, (kernel, entry)) for kernel, entry in values.shipped(H200)):
        problem, plan = values.planned(kernel, entry, context(simulate=False), warps)
        assert plan.config == (replace(entry.winner.config, num_warps=8) if warps else entry.winner.config)
        assert (problem.geometry.N, plan.kernel) == (entry.extents.N, kernel)


def test_plans_of_cases_are_known_from_shapes_alone():
    number = next(n for n, case in enumerate(check.CASES) if case.memory_format == "strided")
    plans = values._plans_of_cases([number, 0], H200)
    assert [plan.role.value for plan in plans] == ["fprop", "dgrad", "wgrad"] * 2


# ---------------------------------------------------------------------------------------------------------------------
# Smaller problems


@pytest.mark.parametrize("name", ["3x3 stride 2", "3x3 circular", "odd channels", "depthwise 31x31 circular", "video"])
def test_a_reduced_problem_is_of_the_same_kind(name):
    layer = LAYERS[name]
    for problem in explain.problems(layer.input, layer.weight, **layer.options).values():
        less = checking.reduced(problem, 2, 5, 32)
        g, small = problem.geometry, less.geometry
        for part in ("filter", "stride", "dilation", "padding", "modes"):
            assert getattr(small, part) == getattr(g, part)
        assert small.flops < g.flops / 100
        assert (small.C % 2, small.groups == small.C) == (g.C % 2, g.groups == g.C)
        x = torch.empty(small.shape("x"), device="meta")
        pads = [p for pair in reversed(small.padding) for p in pair]
        w = torch.empty(small.shape("w"), device="meta")
        y = torch.nn.functional.conv3d(
            torch.nn.functional.pad(x, pads), w, None, small.stride, 0, small.dilation, small.groups
        )
        assert tuple(y.shape) == small.shape("y")


# ---------------------------------------------------------------------------------------------------------------------
# What is wrong is called so


def test_a_wrong_plan_fails_and_a_right_one_does_not(kernels, monkeypatch):
    one = unit(ceilings_and_smoke, context(), "int8, forward")
    assert one.run()["ok"]
    monkeypatch.setattr(operands, "wrong", lambda *_: "3 of 4 elements")
    assert "3 of 4 elements" in one.run()["words"]
    assert not one.run()["ok"]
    eight = unit(values, context(), "8 warps gather").run()
    assert (eight["ok"], eight["right"]) == (True, False)


def test_cases_that_are_wrong_or_raise_are_named(kernels, monkeypatch):
    run = check.Case.run
    first, second = 0, 18

    def spoiled(case, given, *rest):
        found = run(case, given, *rest)
        if case == check.CASES[first]:
            raise RuntimeError("no such kernel")
        found["y"] += 1
        return found

    monkeypatch.setattr(check.Case, "run", spoiled)
    facts = values._cases("both", [first, second], context(), checking.Compiler(context()))
    assert not facts["ok"]
    assert facts["wrong"][0].startswith("case 0, ")
    assert facts["wrong"][0].endswith("RuntimeError: no such kernel")
    assert facts["wrong"][1].startswith("case 18, ")
    assert ": y " in facts["wrong"][1]


@pytest.mark.parametrize("title", references.CAUSAL)
def test_causal_values_are_compared(title, kernels, monkeypatch):
    layer = references.smaller(LAYERS["causal state contiguous"], 2, 16, 12)
    assert references.causal(layer, title, torch.device("cpu"))["ok"]
    for name in ("causal_conv1d", "causal_conv1d_update"):
        right = getattr(triton_conv, name)

        def off(*args, right=right, **keywords):
            found = right(*args, **keywords)
            return (1.1 * found[0], found[1]) if isinstance(found, tuple) else 1.1 * found

        monkeypatch.setattr(triton_conv, name, off)
    assert not references.causal(layer, title, torch.device("cpu"))["ok"]


def test_separable_values_are_compared(kernels, monkeypatch):
    layer = references.smaller(LAYERS["separable video"], 1, 16, 4)
    assert references.separable(layer, torch.device("cpu"))["ok"]
    right = triton_conv.separable_conv3d
    monkeypatch.setattr(triton_conv, "separable_conv3d", lambda *a, **k: right(*a, **k) + 1)
    assert not references.separable(layer, torch.device("cpu"))["ok"]


# ---------------------------------------------------------------------------------------------------------------------
# Benchmarks


def measured(job, ours, **others):
    row = predicted_row(job, H200)
    names = {"last": CHANNELS_LAST, "first": CONTIGUOUS}
    times = {OURS: ours, **{names[name]: seconds for name, seconds in others.items()}}
    return replace(row, measured={who: Measurement(seconds, 0.0, 15) for who, seconds in times.items()})


def test_wins_and_losses_are_those_against_channels_last_cudnn():
    jobs = quick_bench.wanted(context())
    rows = [measured(jobs[0], 1.0, last=2.0, first=0.1), measured(jobs[1], 1.0, last=0.5), measured(jobs[2], 1.0)]
    assert quick_bench.counts(rows) == {"rows": 3, "wins": 1, "losses": 1, "mean_speedup": 1.0}
    assert quick_bench.counts(rows[2:])["mean_speedup"] is None


def test_the_worst_loss_is_tuned_first_and_one_without_a_rival_last(tmp_path):
    jobs = [job for job in quick_bench.wanted(context()) if job.kind is None][:4]
    rows = [
        measured(jobs[0], 1e-3, last=0.8e-3, first=0.5e-3),
        measured(jobs[1], 1e-3, last=2e-3),
        measured(jobs[2], 1e-3, last=0.3e-3),
        measured(jobs[3], 100.0),
    ]
    run = records.Run("device", "simulated", "", "", "", rows=tuple(rows))
    records.write(run, tmp_path / quick_bench.FILE)
    assert [job for job, _ in worst_losses.worst_of(context(tmp_path))] == [jobs[2], jobs[0]]
    found = worst_losses.worst_of(context(tmp_path, simulate=False))
    assert [row for _, row in found] == [rows[2], rows[0], rows[3], rows[1]]


def test_what_is_tuned_is_packed_and_found_by_the_next_process(tmp_path, kernels, monkeypatch):
    monkeypatch.setenv("TRITON_CONV_CACHE", "/dev/null/configs")
    job = next(job for job in quick_bench.wanted(context()) if job.op == "fprop")
    for _ in range(2):
        tuner = worst_losses._Tuner(context(tmp_path))
        facts = tuner.tuned(job, measured(job, 1.0))
        assert facts["ok"]
        assert facts["after"] < facts["before"] == 1.0
        assert list(tuner._place.rglob("*.json"))
    assert sorted(path.name for path in tmp_path.iterdir()) == [worst_losses.PACKED]
    stored.forget()


# ---------------------------------------------------------------------------------------------------------------------
# Everything


@pytest.mark.slow
def test_the_whole_run_simulated(tmp_path):
    """As CI runs it: every stage runs something, nothing fails, few files are left."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "bench.evidence", "--simulate", "--budget", "120", "--out", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    found = record.read(tmp_path)
    assert found.simulated
    assert {letter: bool(found.stages.get(letter)) for letter in STAGES} == dict.fromkeys(STAGES, True)
    assert records.read(tmp_path / quick_bench.FILE).source == "simulated"
    names = sorted(path.name for path in tmp_path.rglob("*"))
    assert names == ["bench.json", "evidence.json", "log.txt", "store.tgz"]


def test_a_row_of_every_suite_comes_before_a_second_one():
    groups = quick_bench.grouped(quick_bench.jobs(["mobilenetv3", "convnext", "mamba"], ("fprop",), quick=True))
    assert [group[0].suite for group in groups] == 3 * ["mobilenetv3"] + 3 * ["convnext"] + 2 * ["mamba"]
    turned = quick_bench.turned(groups)
    assert [group[0].suite for group in turned] == 3 * ["mobilenetv3"] + [
        "convnext",
        "mamba",
        "convnext",
        "mamba",
        "convnext",
    ]
    assert sorted(map(str, turned)) == sorted(map(str, groups))


def test_plans_are_expected_a_window_ahead_and_asked_for_once(monkeypatch, tmp_path):
    asked, expected = [], []

    class Ahead:
        def expect_too(self, plans):
            expected.append(list(plans))

        def rows(self, p):
            asked.append(p)
            return []

    monkeypatch.setattr(checking, "_WINDOW", 2)
    compiler = checking.Compiler(Context(tmp_path, torch.device("cpu"), True, lambda: 1.0))
    compiler._ahead = Ahead()
    for name, plans in {"a": [1], "b": [2], "c": [1, 3]}.items():
        compiler.add(name, lambda plans=plans: plans)
    assert [compiler.compiled(name) for name in "abc"] == 3 * [([], [])]
    assert expected == [[1], [2], [3]]
    assert asked == [1, 2, 3]


def test_rows_of_a_kernel_that_ends_processes_are_not_begun(tmp_path):
    found = record.begin("c0ffee", True)
    found.stages["a"] = {str(n): {"ok": False, "words": "hung", "deadly": "box"} for n in range(2)}
    record.write(found, tmp_path)
    where = context(tmp_path)
    group = quick_bench.grouped(quick_bench.jobs(["resnet50"], ["fprop"], quick=True))[0]
    facts = quick_bench._measure(group, quick_bench._Expecting(where, group), where)
    assert facts["words"].startswith("left out: box")
    assert not (tmp_path / quick_bench.FILE).exists()
