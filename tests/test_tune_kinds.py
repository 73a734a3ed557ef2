"""Tuning of other convolutions than ordinary ones: values, what is stored, and that look-ups find it."""

import re
import warnings
from dataclasses import replace

import pytest
import torch

from triton_conv import (
    branches,
    branches_plan,
    branches_problem,
    branches_ways,
    deform,
    deform_plan,
    explain,
    key,
    plan,
    stored,
    ways,
)
from triton_conv.config import Config
from triton_conv.deform_plan import DeformRole
from triton_conv.devices import A100, H200, INTERPRETER
from triton_conv.stored import Candidate, Entry
from triton_conv.tuning import branches as of_several
from triton_conv.tuning import deform as kind
from triton_conv.tuning import space, subject, suites, sweep, verify
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
    assert suites.tasks("resnet50_fused", H200)


# ---------------------------------------------------------------------------------------------------------------------
# Several convolutions in one launch

SIDE_BY_SIDE = (((16, 16, 1, 1), {}), ((16, 16, 3, 3), {"padding": 2, "dilation": 2}))
SLICES = (((16, 16, 1, 3), {"padding": (0, 1), "channels": (0, 16)}), ((32, 16, 1, 1), {"channels": (16, 16)}))
SUMMED = (((16, 16, 1, 1), {"groups": 2}), ((16, 16, 1, 3), {"padding": (0, 1), "groups": 2}))
STRIDED = (
    ((16, 16, 3, 3), {"padding": 1, "stride": 2, "channels": (0, 16)}),
    ((16, 16, 2, 1), {"padding": ((0, 1), 0), "stride": 2, "channels": (16, 16)}),
)


def of_branches(input, given, role="forward", device=INTERPRETER, **options):
    options = {"dtype": torch.float16, "channels_last": True, "bias": True, **options}
    found = branches.plans(input, given[0][0], device=device, branches=given, **options)
    return of_several.numbered(found[role].asked)


def pyramid(role="forward", device=H200, rates=(6, 12)):
    dilated = [((256, 320, 3, 3), {"padding": rate, "dilation": rate}) for rate in rates]
    return of_branches((16, 320, 33, 33), [((256, 320, 1, 1), {}), *dilated], role, device)


CASES = {
    "side by side": ((1, 16, 3, 4), SIDE_BY_SIDE, {}),
    "slices": ((1, 32, 2, 3), SLICES, {"channels_last": False}),
    "summed": ((1, 32, 2, 3), SUMMED, {"combine": "sum", "dtype": torch.float32}),
}


@pytest.mark.parametrize("role", ["forward", "input gradient"])
@pytest.mark.parametrize("case", CASES)
def test_plans_of_branches_are_right_and_measured(case, role, kernels):
    input, given, options = CASES[case]
    what = of_branches(input, given, role, H200._replace(name="interpreter"), **options)
    bench = KernelBench(torch.device("cpu"), INTERPRETER._replace(l2_bytes=2**10), Clock())
    of_it = subject.of(what)
    ways_of_it = of_it.every(what)
    tried = [*ways_of_it, of_it.plans(what, ways_of_it)[-1]]
    assert {p.kernel for p in ways_of_it} <= {"gather_branches", "box_branches"}
    assert len(ways_of_it) == (2 if case == "slices" else 1)  # boxes after copies
    assert [bench.fault(what, p) for p in tried] == [None] * len(tried)
    assert {timing.seconds for timing in bench.time(what, tried)} == {1e-3 / 2}
    assert bench.rivals(what) == {}


@pytest.mark.parametrize("role", ["forward", "input gradient"])
def test_wrong_values_of_branches_are_found(role, kernels):
    what = of_branches(*CASES["slices"][:2], role)
    given = of_several.case(what, torch.device("cpu"), 0)
    want = of_several.expected(what, given)
    (p, *_) = branches_plan.every(what)
    assert of_several.wrong(what, p, given, want) is None
    off = (want[0], want[1].clone())
    off[1][0, 1, 1, 2] += 1
    words = of_several.wrong(what, p, given, off)
    assert words.startswith(f"1 of {off[1].numel()} elements are not within rounding in part 1, the worst by ")
    other = of_several.case(what, torch.device("cpu"), 1)
    assert not torch.equal(other.calls.source, given.calls.source)


@pytest.mark.parametrize("device", [H200, A100], ids=["boxes", "gather"])
def test_candidates_of_branches_fit(device):
    what = pyramid("input gradient", device, (6,))
    (p,) = branches_plan.every(what)
    assert p.kernel == ("box_branches" if device is H200 else "gather_branches")
    found = of_several.candidates(p)
    assert found[0] == p.config
    assert 4 < len(set(found)) == len(found) <= space.MOST
    assert all(branches_ways.misfit(what, p.kernel, config) is None for config in found)
    for config in found[1:]:
        assert branches_plan.with_config(p, config).prediction.resident > 0


@pytest.mark.parametrize("role", ["forward", "input gradient"])
def test_tuned_branches_are_stored_and_looked_up(role, tmp_path):
    task = Task(role, pyramid(role))
    (result,) = tune([task], SimulatedBench(H200), Store(tmp_path), Budget(candidates=8))
    stored.forget()
    assert result.seconds < result.default_seconds
    p = branches_plan.make(task.problem)
    assert (p.kernel, p.config) == (result.kernel, result.config)
    assert p.measured_seconds == pytest.approx(result.seconds)
    assert "config of user store, measured; " in p.reason
    assert branches_plan.make(pyramid(role, rates=(6, 18))).measured is None
    text = explain.text((16, 320, 33, 33), (256, 320, 1, 1), branches=SAME, dtype=torch.float16, channels_last=True)
    assert "config of user store, measured; " in text
    assert re.search(r"time +[0-9.]+ us measured, [0-9.]+ us predicted", text)
    ((device, kernel, (entry,)),) = [stored.loads(text, "entries") for text in sweep.known(task, Store(tmp_path))]
    assert verify.of_branches(entry, kernel, H200).config == p.config
    assert stored.dumps(device, kernel, [entry]) in sweep.known(task, Store(tmp_path))


SAME = (
    ((256, 320, 1, 1), {}),
    *(((256, 320, 3, 3), {"padding": rate, "dilation": rate}) for rate in (6, 12)),
)


def test_entries_of_branches_say_what_they_are_of():
    options = {"device": H200, "dtype": torch.bfloat16}
    for input, given, more in (*CASES.values(), ((2, 32, 8, 10), STRIDED, {})):
        for role in ("forward", "input gradient"):
            (p, *_) = branches_plan.every(of_branches(input, given, role, **{**more, **options}))
            where = branches_ways.key_of(p.problem)
            entry = measured(p.kernel, where, p.config)
            assert verify.of_branches(entry, p.kernel, H200).config == p.config
    for variant in ("", "32 to 16: 0>16 1x1", "32 to 16: 32>16 1x1 * 32>16 1x1"):
        with pytest.raises(ValueError, match=r"no branches have such numbers|no convolution is"):
            verify.of_branches(replace(entry, key=where[0]._replace(variant=variant)), p.kernel, H200)
    with pytest.raises(ValueError, match="filed elsewhere"):
        verify.of_branches(replace(entry, key=where[0]._replace(C=where[0].C * 2)), p.kernel, H200)
    (boxes,) = branches_plan.every(pyramid())
    box = replace(entry, candidates=(Candidate(boxes.config),))
    with pytest.raises(ValueError, match="input gradients of strides are not boxes"):
        verify.of_branches(box, "box_branches", H200)
    with pytest.raises(ValueError, match="it is a BoxConfig"):
        verify.of_branches(box, "gather_branches", H200)


def test_configs_that_do_not_fit_branches_or_are_slower_are_ignored():
    what = pyramid()
    (p,) = branches_plan.every(what)
    where = branches_ways.key_of(p.problem)
    for config in (replace(p.config, splits=2), replace(p.config, box=(2, 4, 4, 4)), Config(64, 64, 32)):
        stored.install(H200.name, p.kernel, [measured(p.kernel, where, config)])
        assert branches_plan.make(what).config == p.config
    slow, alike = replace(p.config, BLOCK_N=16), of_several.candidates(p)[1]
    assert branches_plan.with_config(p, slow).seconds > ways.MOST_OF_RULE * p.seconds
    terms = tuple(t._replace(geometry=replace(t.geometry, N=17)) for t in what.terms)
    another = what._replace(terms=terms)  # of the same bucket
    with stored.hidden():
        ruled = branches_plan.make(another).config
    for config, here, elsewhere in ((slow, slow, ruled), (alike, alike, alike)):
        stored.install(H200.name, p.kernel, [measured(p.kernel, where, config)])
        assert branches_plan.make(what).config == here
        other = branches_plan.make(another)
        assert (other.config, other.measured) == (elsewhere, None)


def test_measured_times_decide_between_one_launch_and_several():
    what = pyramid()
    p = branches_plan.make(what)
    where = branches_ways.key_of(p.problem)
    assert p.worth_it
    for term in what.terms:
        one = branches_ways.alone(what, term)
        (way,) = plan.every(one)
        entry = measured(way.kernel, ways.key_of(one, way.layout), way.config)  # a microsecond
        stored.install(H200.name, way.kernel, [entry])
    assert branches_plan.make(what).worth_it  # one launch is not measured yet
    for seconds, worth_it in ((2.9e-6, True), (3.1e-6, False)):
        candidate = Candidate(p.config, seconds)
        stamp = {"kernel": key.source_hash(p.kernel)}
        stored.install(H200.name, p.kernel, [Entry(*where, "measured", stamp, (candidate,), {})])
        again = branches_plan.make(what)
        assert again.worth_it == worth_it
        assert f"{1e6 * seconds:.3g} us measured, against 3 us of 3 launches" in again.reason


def test_suites_of_branches_have_tasks():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = {name: suites.tasks(name, H200) for name in ("aspp_branches", "sknet50")}
    several = {
        name: [task.problem for task in tasks if isinstance(task.problem, branches_problem.Problem)]
        for name, tasks in found.items()
    }
    for name, problems in several.items():
        assert len(problems) == 2 * len(suites.SUITES[name].layers)
        assert {p.role.value for p in problems} == {"fprop", "dgrad"}
    assert len(found["aspp_branches"]) == len(several["aspp_branches"])
    assert len(found["sknet50"]) > len(several["sknet50"])  # some of which rules compute apart
