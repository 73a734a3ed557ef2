"""Tuning of other convolutions than ordinary ones: values, what is stored, and that look-ups find it."""

from dataclasses import replace

import pytest
import torch

from triton_conv import deform, deform_plan, explain, key, plan, stored, ways
from triton_conv.deform_plan import DeformRole
from triton_conv.devices import H200, INTERPRETER
from triton_conv.stored import Candidate, Entry
from triton_conv.tuning import deform as kind
from triton_conv.tuning import subject, suites, sweep, verify
from triton_conv.tuning.measure import SimulatedBench
from triton_conv.tuning.on_device import KernelBench
from triton_conv.tuning.store import Store
from triton_conv.tuning.tune import Budget, Task, tune

ROLES = [role.value for role in DeformRole]


@pytest.fixture(autouse=True)
def own_store(tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_CONV_CACHE", str(tmp_path))
    stored.forget()
    yield
    stored.uninstall()


def problem(role, device=H200, **options):
    shapes = ((2, 16, 3, 4), (16, 16, 1, 2)) if device is INTERPRETER else ((2, 128, 56, 56), (128, 128, 3, 3))
    options = {"dtype": torch.float16, "channels_last": True, "bias": True, **options}
    return deform.plans(*shapes, device=device, **options)[role].asked


def measured(kernel, where, config):
    return Entry(*where, "measured", {"kernel": key.source_hash(kernel)}, (Candidate(config, 1e-6),), {})


class Clock:
    """Runs what it is to time, and says that it took a millisecond."""

    def now(self):
        return 0.0

    def seconds(self, work):
        work()
        return 1e-3

    def captured(self, work):
        return lambda: None

    def free_bytes(self):
        return 2**30

    def emptied(self):
        pass


@pytest.mark.parametrize(
    "options",
    [{}, pytest.param({"channels_last": False, "mask": False}, marks=pytest.mark.slow)],
    ids=["mask", "contiguous"],
)
@pytest.mark.parametrize("role", ROLES)
def test_plans_of_deformable_convolutions_are_right_and_measured(role, options, kernels):
    bench, what = (
        KernelBench(torch.device("cpu"), INTERPRETER._replace(l2_bytes=2**10), Clock()),
        problem(role, INTERPRETER, **options),
    )
    of_it = subject.of(what)
    found = of_it.plans(what, of_it.every(what))
    tried = [found[0], found[-1]]
    assert [bench.fault(what, p) for p in tried] == [None, None]
    assert {timing.seconds for timing in bench.time(what, tried)} == {1e-3 / 2}  # of two sets of operands
    assert bench.rivals(what) == {}


def test_wrong_values_are_found(kernels, monkeypatch):
    what = problem("offset and mask gradient", INTERPRETER)
    given = kind.case(what, torch.device("cpu"), 0)
    want = kind.expected(what, given)
    (p, *_) = deform_plan.every(what)
    assert kind.wrong(what, p, given, want) is None
    off = (want[0], want[1].clone())
    off[1][0, 1, 0, 2] += 1
    assert "1 of 36 elements are not within rounding in dmask, the worst by" in kind.wrong(what, p, given, off)
    assert not torch.equal(kind.case(what, torch.device("cpu"), 1)["offset"], given["offset"])


@pytest.mark.parametrize("role", ROLES)
def test_candidates_fit(role):
    what = problem(role)
    for p in deform_plan.every(what):
        found = kind.candidates(what, p)
        assert found[0] == p.config
        assert 4 < len(set(found)) == len(found) <= kind.MOST
        assert all(deform_plan.misfit(what, config) is None for config in found)


def test_what_is_tuned_is_stored_and_looked_up(tmp_path):
    tasks = [Task(role, problem(role)) for role in ROLES]
    store = Store(tmp_path)
    results = tune(tasks, SimulatedBench(H200), store, Budget(candidates=6))
    stored.forget()
    for task, result in zip(tasks, results, strict=True):
        assert result.seconds <= result.default_seconds
        p = deform_plan.make(task.problem)
        assert (p.kernel, p.config) == (result.kernel, result.config)
        assert p.measured_seconds == pytest.approx(result.seconds)
        assert p.reason.endswith("config of user store, measured")
        assert deform_plan.make(task.problem._replace(mask=())).measured is None  # which is another variant
    texts = sweep.known(tasks[0], store)
    device, kernel, (entry,) = stored.loads(texts[0], "entries")
    assert (device, kernel, entry.key.variant) == (H200.name, "deform", "1 offset groups, mask")
    assert stored.dumps(device, kernel, [entry]) == texts[0]


@pytest.mark.parametrize("role", ROLES)
def test_entries_of_deformable_convolutions_say_what_they_are_of(role):
    (p, *_) = deform_plan.every(problem(role, offset_groups=4, offset_dtype=torch.float32))
    where = deform_plan.key_of(p.problem)
    entry = measured(p.kernel, where, p.config)
    assert verify.deformable(entry, p.kernel, H200).config == p.config
    with pytest.raises(ValueError, match="filed elsewhere"):
        verify.deformable(entry, "deform" if p.kernel != "deform" else "deform_dgrad", H200)
    with pytest.raises(ValueError, match="no deformable convolution"):
        verify.deformable(replace(entry, key=where[0]._replace(variant="0 offset groups")), p.kernel, H200)


def test_configs_that_do_not_fit_are_ignored():
    what = problem("forward")
    (p, *_) = deform_plan.every(what)
    where = deform_plan.key_of(p.problem)
    for config in (replace(p.config, splits=2), replace(p.config, flatten=True)):
        stored.install(
            H200.name,
            p.kernel,
            [Entry(*where, "measured", {"kernel": key.source_hash(p.kernel)}, (Candidate(config, 1e-3),), {})],
        )
        assert deform_plan.make(what).config == p.config


SHAPES = ((1, 32, 1, 48, 64), (32, 32, 3, 3, 3))
CHUNK = {"dtype": torch.bfloat16, "channels_last": True, "padding": 1, "context": 2}


def test_streaming_convolutions_run_by_one_config_whatever_their_frames():
    """Else an output frame would have other bits in another chunk."""
    p = explain.plans(*SHAPES, **CHUNK)["forward"]
    alike = subject.streaming(p)
    assert alike is not None
    (way, *_) = plan.every(alike)
    (N, C, _, *image), other = SHAPES[0], replace(p.config, num_stages=p.config.num_stages - 1)
    entry = measured(way.kernel, ways.key_of(alike, way.layout), other)
    stored.install(H200.name, way.kernel, [entry])
    configs = {explain.plans((N, C, D, *image), SHAPES[1], **CHUNK)["forward"].config for D in (1, 2, 5, 40)}
    assert configs == {other}


def test_suites_of_other_convolutions_have_tasks():
    found = suites.tasks("dcnv2_resnet50", H200)
    assert {task.problem.role for task in found} == set(DeformRole)
    assert len(found) == 6 * 4
    with pytest.warns(UserWarning, match="is left out") as heard:
        found = suites.tasks("wan_streaming", H200)
    assert all(isinstance(task.problem, ways.Problem) for task in found)
    assert 3 < len(found) < len(found) + len(heard) <= len(suites.SUITES["wan_streaming"].layers)
    with pytest.warns(UserWarning, match="left out: multi_conv2d has one config for each shape, by rule"):
        assert suites.tasks("aspp_branches", H200) == []
    assert suites.tasks("resnet50_fused", H200)
