"""Search spaces, rounds, benches and the tuning of single problems; devices and timers are simulated."""

import random
from collections import Counter

import pytest
import torch

from triton_conv import cost, explain, key, plan, stored, ways
from triton_conv.devices import DEVICES
from triton_conv.geometry import Role
from triton_conv.tuning import rounds, space, tune
from triton_conv.tuning.layers import BFLOAT16, FLOAT8, FLOAT32, INT8, Layer
from triton_conv.tuning.measure import SimulatedBench
from triton_conv.tuning.tune import Budget, Task

H200 = DEVICES["H200"]
LAYERS = {
    "3x3": Layer((8, 64, 28, 28), (128, 64, 3, 3), BFLOAT16),
    "contiguous": Layer((8, 64, 28, 28), (64, 64, 3, 3), {**BFLOAT16, "channels_last": False}),
    "circular": Layer((4, 64, 28, 28), (64, 64, 3, 3), {**BFLOAT16, "padding_mode": "circular"}),
    "stem": Layer((8, 3, 112, 112), (64, 3, 7, 7), {**BFLOAT16, "stride": 2, "padding": 3}),
    "grouped": Layer((8, 64, 28, 28), (64, 4, 3, 3), {**BFLOAT16, "groups": 16}),
    "depthwise": Layer((8, 96, 28, 28), (96, 1, 3, 3), {**BFLOAT16, "groups": 96}),
    "depthwise contiguous": Layer(
        (8, 96, 28, 28), (96, 1, 3, 3), {**BFLOAT16, "groups": 96, "stride": 2, "channels_last": False}
    ),
    "long": Layer((8, 64, 28, 28), (64, 1, 31, 31), {**BFLOAT16, "groups": 64, "padding": 15}),
    "ieee": Layer((4, 64, 28, 28), (64, 64, 3, 3), {**FLOAT32, "precision": "ieee"}),
    "float64": Layer((4, 32, 14, 14), (32, 1, 3, 3), {**FLOAT32, "dtype": torch.float64, "groups": 32}),
    "few channels": Layer((4, 2, 28, 28), (2, 2, 3, 3), FLOAT32),
    "int8": Layer((8, 64, 28, 28), (64, 64, 3, 3), INT8),
    "int64": Layer((2, 16, 14, 14), (16, 16, 3, 3), {**BFLOAT16, "dtype": torch.int64}),
    "float8": Layer((8, 64, 28, 28), (64, 64, 3, 3), FLOAT8, since=89),
    "video": Layer((1, 32, 8, 14, 14), (32, 32, 3, 3, 3), BFLOAT16),
    "transposed": Layer((4, 64, 14, 14), (64, 32, 2, 2), {**BFLOAT16, "transposed": True, "stride": 2, "padding": 0}),
    "one pixel": Layer((1, 8, 1, 1), (8, 8, 1, 1), {**FLOAT32, "padding": 0}),
}


@pytest.fixture(autouse=True)
def _no_stored_configs(monkeypatch, tmp_path):
    monkeypatch.setenv("TRITON_CONV_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(stored, "shipped_directory", lambda: tmp_path / "shipped")
    stored.forget()
    yield
    stored.forget()


def calls_of(layer):
    """The calls of a layer's forward and backward passes."""
    options = dict(layer.options)
    transposed, channels_last = options.pop("transposed", False), options.pop("channels_last", False)
    dtype = options.pop("dtype")
    return explain._traced(layer.input, layer.weight, transposed, dtype, channels_last, True, options)[1]


def problems(name, device=H200):
    return [task.problem for task in tune.tasks_of(calls_of(LAYERS[name]), device)]


class Memory:
    """A store without files."""

    def __init__(self):
        self.kept = {}
        self.added = []

    def add(self, device, kernel, entry):
        (candidate,) = entry.candidates
        self.added.append((kernel, candidate))
        before = self.kept.setdefault((device, kernel), {}).get((entry.key, entry.extents))
        candidates = {c.config: c for c in (*(before.candidates if before else ()), candidate)}
        merged = stored.Entry(
            entry.key, entry.extents, entry.source, entry.stamp, tuple(candidates.values()), entry.baseline
        )
        self.kept[device, kernel][entry.key, entry.extents] = merged

    def entries(self, device, kernel):
        return list(self.kept.get((device, kernel), {}).values())


# ---------------------------------------------------------------------------------------------------------------------
# The space


EVERYWHERE = ("3x3", "float8", "float64")


@pytest.mark.parametrize(
    ("name", "device"),
    [(name, device) for name in LAYERS for device in DEVICES if name in EVERYWHERE or device == "H200"],
)
def test_spaces_keep_to_hard_limits_and_begin_with_the_default(name, device):
    device = DEVICES[device]
    if device.capability < LAYERS[name].since:
        pytest.skip(f"{device.name} has no such dtype")
    for problem in problems(name, device):
        for p in plan.every(problem):
            found = space.candidates(problem, p)
            assert found[0] == p.config
            assert len(set(found)) == len(found) <= space.MOST
            assert len(found) > 1
            assert sum(c.num_warps == 8 for c in found) <= space.MOST // 2
            seconds = []
            for c in found[1:]:
                assert ways.misfit(problem, p.kernel, p.layout, c) is None
                tried = plan.with_config(problem, p, c)
                prediction = tried.prediction
                assert prediction.resident > 0
                assert prediction.registers <= max(cost.MOST_REGISTERS, p.prediction.registers)
                seconds.append(prediction.seconds)
                assert c.splits == 1 or tried.workspace_bytes <= 2**28 + p.workspace_bytes
            assert seconds == sorted(seconds)


def test_every_kernel_has_a_space():
    kernels = {p.kernel for name in LAYERS for problem in problems(name) for p in plan.every(problem)}
    others = {"deform", "deform_dgrad", "deform_offset", "deform_wgrad", "gather_branches", "box_branches"}
    assert kernels | others == set(key.CONFIGS)  # `tuning.deform`, `tuning.branches`


def test_spaces_are_the_same_in_every_process():
    (problem, *_) = problems("3x3")
    (p,) = plan.every(problem)
    assert space.candidates(problem, p) == space.candidates(problem, p)
    assert [c.num_stages for c in space.candidates(problem, p)[:1]] == [p.config.num_stages]


def test_plans_with_another_config_are_the_ways_own():
    for name in ("circular", "grouped", "depthwise contiguous", "long"):
        for problem in problems(name):
            for p in plan.every(problem):
                again = plan.with_config(problem, p, p.config)
                assert again == plan.replace(p, reason=again.reason)


def test_splits_change_the_workspace():
    problem = next(p for p in problems("3x3") if p.role is Role.WGRAD)
    (p,) = plan.every(problem)
    wide = plan.with_config(problem, p, plan.replace(p.config, splits=7))
    assert wide.workspace_shape[0] == 7
    assert "slabs" in space.fault(problem, p, plan.replace(p.config, splits=10**6))


# ---------------------------------------------------------------------------------------------------------------------
# Rounds


def noisy(exact, noise, seed):
    draw = random.Random(seed)

    def sample():
        return exact * draw.uniform(1 - noise, 1 + noise) * (draw.uniform(1, 4) if draw.random() < 0.02 else 1)

    return sample


@pytest.mark.parametrize("seed", range(10))
def test_elimination_never_drops_who_is_quickest(seed):
    times = [1e-4 * random.Random(seed).uniform(1, 1.02)] + [1e-4 * (1.02 + 0.02 * i) for i in range(60)]
    found = rounds.interleaved([noisy(t, 0.05, f"{seed} {i}") for i, t in enumerate(times)])
    assert found[0].rounds == max(t.rounds for t in found)
    assert found[0].seconds == pytest.approx(times[0], rel=0.025)
    assert sum(t.rounds == rounds.LEAST for t in found) > 40


def test_medians_forget_outliers():
    assert rounds.timing([1.0] * 9 + [50.0]) == rounds.Timing(1.0, 0.0, 10)


def test_rounds_end_when_time_is_up():
    ticks = iter(range(100))
    found = rounds.interleaved([lambda: 1.0, lambda: 1.0], lambda: float(next(ticks)), seconds=3)
    assert found == [None, None]
    assert next(ticks) < 10


def test_a_clear_winner_needs_few_rounds():
    found = rounds.interleaved([lambda: 1.0, lambda: 2.0])
    assert [t.rounds for t in found] == [rounds.LEAST] * 2


# ---------------------------------------------------------------------------------------------------------------------
# Tuning


def tasks():
    return [Task(name, problem) for name in LAYERS for problem in problems(name)]


def test_two_noisy_sweeps_agree():
    agreed, all_of_them = 0, tasks()[::4]
    for task in all_of_them:
        results, bench = [], SimulatedBench(H200)
        for seed in (1, 2):
            results.append(tune.tune_one(task, SimulatedBench(H200, 0.05, seed), Memory(), Budget(candidates=30)))
        one, two = results
        agreed += (one.kernel, one.config) == (two.kernel, two.config)
        exact = []
        for result in results:
            ps = plan.every(task.problem)
            p = next(p for p in ps if p.kernel == result.kernel)
            exact.append(bench.seconds(plan.with_config(task.problem, p, result.config)))
        tie = max(stored.TIE, one.spread, two.spread)
        assert max(exact) <= min(exact) * (1 + tie) * 1.01, (task.label, one.config, two.config)
    assert agreed >= 0.6 * len(all_of_them)


def test_without_noise_the_quickest_wins_and_beats_the_default():
    (problem, *_) = problems("3x3")
    store = Memory()
    result = tune.tune_one(Task("layer", problem), SimulatedBench(H200), store)
    ((_, entries),) = store.kept.items()
    (entry,) = entries.values()
    least = min(c.seconds for c in entry.candidates)
    assert result.seconds <= least * (1 + stored.TIE)
    assert result.seconds <= result.default_seconds
    assert entry.winner.config == result.config
    assert result.tried == len(entry.candidates) == space.MOST
    assert entry.baseline == result.rival
    assert set(entry.stamp) >= {"kernel", "triton", "torch", "driver", "time"}
    assert entry.stamp["kernel"] == key.source_hash("box")


def test_what_others_take_is_kept_for_the_layout_that_it_was_measured_in():
    (problem, *_) = problems("contiguous")
    store = Memory()
    result = tune.tune_one(Task("layer", problem), SimulatedBench(H200), store, Budget(candidates=4))
    (given,) = store.entries(H200.name, "gather")
    (copied,) = store.entries(H200.name, "box")
    assert given.baseline == result.rival != {}
    assert copied.baseline == {}


def test_wrong_candidates_never_win_and_are_kept_with_their_reason():
    (problem, *_) = problems("3x3")
    task, wrong = Task("layer", problem), []
    for _ in range(3):
        store = Memory()
        result = tune.tune_one(task, SimulatedBench(H200, wrong=wrong), store, Budget(candidates=20))
        assert result.config not in wrong
        assert result.wrong == len(wrong) == len(result.faults)
        kept = {c.config: c for _, c in store.added if c.status == "wrong"}
        assert set(kept) == set(wrong)
        assert all("values are wrong" in c.why and c.seconds is None for c in kept.values())
        wrong = [*wrong, result.config]


def test_all_wrong_is_no_winner():
    (problem, *_) = problems("one pixel")

    class Everything:
        def __contains__(self, config):
            return True

    result = tune.tune_one(Task("layer", problem), SimulatedBench(H200, wrong=Everything()), Memory())
    assert result.skipped == "no candidate could be measured"
    assert result.seconds is None
    assert result.config == plan.make(problem).config


class Counting(SimulatedBench):
    """Counts what is checked, and breaks after so many."""

    def __init__(self, *args, breaks=None, error=KeyboardInterrupt, **kwargs):
        super().__init__(*args, **kwargs)
        self.checked, self.breaks, self.error, self.asked = Counter(), breaks, error, 0

    def fault(self, problem, p):
        self.checked[p.kernel, p.layout, p.config] += 1
        if sum(self.checked.values()) == self.breaks:
            raise self.error("broke")
        return super().fault(problem, p)

    def rivals(self, problem):
        self.asked += 1
        return super().rivals(problem)


def test_a_killed_sweep_goes_on_where_it_was():
    task, store = Task("layer", problems("contiguous")[0]), Memory()
    first = Counting(H200, breaks=30)
    with pytest.raises(KeyboardInterrupt):
        tune.tune_one(task, first, store)
    kept = {(kernel, c.config) for kernel, c in store.added}
    assert len(kept) >= 15
    second = Counting(H200)
    result = tune.tune_one(task, second, store)
    assert not kept & {(kernel, c) for kernel, _, c in second.checked}
    assert set(second.checked.values()) == {1}
    whole = tune.tune_one(task, Counting(H200), Memory())
    assert (result.kernel, result.config) == (whole.kernel, whole.config)
    third = Counting(H200)
    again = tune.tune_one(task, third, store)
    assert not third.checked
    assert not third.asked
    assert again.rival == result.rival
    assert (again.kernel, again.config, again.tried) == (result.kernel, result.config, result.tried)
    fourth = Counting(H200)
    tune.tune_one(task, fourth, store, again=True)
    assert len(fourth.checked) == result.tried


def test_another_kernel_source_is_measured_again(monkeypatch):
    task, store = Task("layer", problems("one pixel")[0]), Memory()
    tune.tune_one(task, SimulatedBench(H200), store)
    monkeypatch.setattr(key, "source_hash", lambda kernel: "another")
    bench = Counting(H200)
    tune.tune_one(task, bench, store)
    assert bench.checked


@pytest.mark.parametrize("number", [1, 2])
def test_what_breaks_the_device_is_kept_as_failed(number):
    class Dead(Counting):
        def rivals(self, problem):
            if sum(self.checked.values()) >= self.breaks:
                raise self.error("broken")
            return super().rivals(problem)

    task, store = Task("layer", problems("one pixel")[0]), Memory()
    bench = Dead(H200, breaks=number, error=torch.AcceleratorError)
    with pytest.raises(torch.AcceleratorError):
        tune.tune_one(task, bench, store)
    kernel, last = store.added[-1]
    assert (last.status, last.why) == ("failed", "AcceleratorError: broke")
    second = Counting(H200)
    tune.tune_one(task, second, store)
    assert (kernel, last.config) not in {(kernel, c) for kernel, _, c in second.checked}


def test_budgets(monkeypatch):
    task = Task("layer", problems("3x3")[0])
    assert tune.tune_one(task, SimulatedBench(H200), Memory(), Budget(candidates=5)).tried == 5
    clock = [0.0]
    monkeypatch.setattr(tune, "monotonic", lambda: clock[0])

    def spend(seconds):
        clock[0] += 1.0

    bench = SimulatedBench(H200, clock=spend)
    result = tune.tune_one(task, bench, Memory(), Budget(seconds=0))
    assert result.tried == 1
    assert (result.config, result.seconds) == (plan.make(task.problem).config, result.default_seconds)
    clock[0] = 0.0
    seen = []
    results = tune.tune([task] * 3, bench, Memory(), Budget(), seen.append, deadline=20.0)
    assert seen == results
    assert [bool(r.skipped) for r in results] == [False, True, True]
    assert results[0].tried < space.MOST
    with pytest.raises(ValueError, match="candidates must be 1"):
        Budget(candidates=0)
    with pytest.raises(ValueError, match="seconds must be 0"):
        Budget(seconds=float("nan"))


def test_tuned_configs_are_tried_and_compared_with_the_rules():
    """The default of a result is what would run without any stored config."""
    problem = problems("3x3")[0]
    (rule,) = plan.every(problem)
    other = plan.replace(rule.config, BLOCK_N=32, num_stages=2)
    stamp = {"kernel": key.source_hash("box")}
    known = stored.Entry(*ways.key_of(problem, rule.layout), "model", stamp, (stored.Candidate(other),), {})
    path = stored.path_of(stored.user_directory(), H200.name, "box")
    path.parent.mkdir(parents=True)
    path.write_text(stored.dumps(H200.name, "box", [known]))
    stored.forget()
    assert plan.every(problem)[0].config == other
    bench = Counting(H200)
    result = tune.tune_one(Task("layer", problem), bench, Memory(), Budget(candidates=2))
    assert {c for _, _, c in bench.checked} == {rule.config, other}
    assert result.default_seconds == bench.seconds(rule)


def test_tasks_are_distinct_problems_and_nothing_is_lost_in_silence():
    calls = calls_of(LAYERS["3x3"])
    assert len(tune.tasks_of([*calls, *calls], H200)) == len(calls) == 3
    layer = Layer((2, 8, 9, 9), (8, 8, 3, 3), {"dtype": torch.complex64})
    with pytest.warns(UserWarning, match="left out: 3 of complex64"):
        assert tune.tasks_of(calls_of(layer), H200) == []
    assert tune.tasks_of(calls_of(Layer((0, 8, 9, 9), (8, 8, 3, 3), FLOAT32)), H200) == []


def test_no_kernel_is_a_reason_to_skip():
    (problem, *_) = problems("float8")
    result = tune.tune_one(Task("layer", problem._replace(device=DEVICES["A100"])), SimulatedBench(H200), Memory())
    assert result.skipped.startswith("NVIDIA A100 has no float8_e4m3fn arithmetic")
