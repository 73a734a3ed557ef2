"""The loop that measures kernels, in Triton's interpreter and by a clock that is none; and its numbers."""

import gc
import multiprocessing.spawn
import sys
import weakref
from concurrent.futures import Future
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager, nullcontext
from types import ModuleType, SimpleNamespace

import pytest
import torch

from triton_conv import backends, execute, explain, plan
from triton_conv.devices import DEVICES, INTERPRETER
from triton_conv.geometry import Role
from triton_conv.tuning import ahead, audit, on_device, operands, rounds, space, tune
from triton_conv.tuning.ahead import Ahead
from triton_conv.tuning.layers import Layer
from triton_conv.tuning.on_device import CudaClock, KernelBench
from triton_conv.tuning.tune import Budget, Task

DEVICE = INTERPRETER._replace(l2_bytes=2**10)  # few sets of operands are enough
FLOAT32 = {"dtype": torch.float32, "padding": 1}
LAYERS = {
    "gather": Layer((2, 3, 5, 6), (4, 3, 3, 3), FLOAT32),
    "circular": Layer((2, 3, 5, 6), (4, 3, 3, 3), {**FLOAT32, "padding_mode": "circular"}),
    "depthwise": Layer((2, 8, 5, 6), (8, 1, 3, 3), {**FLOAT32, "groups": 8, "channels_last": True}),
    "box": Layer((2, 16, 5, 6), (16, 16, 3, 3), {**FLOAT32, "dtype": torch.float16, "channels_last": True}),
    "copied": Layer((2, 16, 5, 6), (16, 16, 3, 3), {**FLOAT32, "dtype": torch.float16}),
    "bundled": Layer((1, 32, 4, 4), (32, 4, 3, 3), {**FLOAT32, "dtype": torch.bfloat16, "groups": 8}),
    "banded": Layer((1, 2, 14, 14), (2, 1, 13, 13), {"dtype": torch.float16, "padding": 6, "groups": 2}),
    "transposed": Layer((2, 4, 4, 5), (4, 3, 3, 3), {**FLOAT32, "transposed": True, "stride": 2}),
    "float64": Layer((2, 3, 5, 6), (4, 3, 3, 3), {**FLOAT32, "dtype": torch.float64, "channels_last": True}),
    "int8": Layer((2, 16, 5, 6), (16, 16, 3, 3), {"dtype": torch.int8, "out_dtype": torch.int32}),
    "uint8": Layer((2, 3, 5, 6), (4, 3, 3, 3), {"dtype": torch.uint8}),
    "float8": Layer((2, 16, 5, 6), (16, 16, 3, 3), {"dtype": torch.float8_e4m3fn, "channels_last": True}),
    "video": Layer((1, 3, 3, 4, 4), (4, 3, 2, 3, 3), {**FLOAT32, "channels_last": True}),
    "audio": Layer((2, 3, 9), (4, 3, 3), FLOAT32),
}


class FakeClock:
    """Runs the work and says that it took as long as it is told, or a unit for each time."""

    def __init__(self, seconds=None, free=2**30):
        self.times, self.free, self.captures, self.empties = seconds or (lambda: 1e-3), free, 0, 0

    def now(self):
        return 0.0

    def seconds(self, work):
        work()
        return self.times()

    def captured(self, work):
        self.captures += 1
        return lambda: None  # one run is enough of a test, and rounds are many

    def free_bytes(self):
        return self.free

    def emptied(self):
        self.empties += 1


def bench(clock=None, device=DEVICE):
    return KernelBench(torch.device("cpu"), device, clock or FakeClock())


def problems(name, device=DEVICE):
    layer = LAYERS[name]
    options = dict(layer.options)
    transposed, channels_last = options.pop("transposed", False), options.pop("channels_last", False)
    bias = options["dtype"].is_floating_point
    dtype = options.pop("dtype")
    calls = explain._traced(layer.input, layer.weight, transposed, dtype, channels_last, bias, options)[1]
    return [task.problem for task in tune.tasks_of(calls, device)]


def every(name):
    """Problems and the plans of their ways; filters that are long are slow to interpret unless they are bands."""
    return [(q, p) for q in problems(name) for p in plan.every(q) if name != "banded" or p.kernel.startswith("banded")]


@pytest.mark.parametrize("name", LAYERS)
def test_right_plans_have_no_fault(name, kernels):
    measuring = bench()
    for problem, p in every(name):
        assert measuring.fault(problem, p) is None, p


@pytest.mark.parametrize("name", ["depthwise", *(pytest.param(n, marks=pytest.mark.slow) for n in LAYERS)])
def test_candidates_compute_what_the_default_does(name, kernels):
    measuring = bench()
    for problem, p in every(name):
        for c in space.candidates(problem, p)[1:24:8]:
            assert measuring.fault(problem, plan.with_config(problem, p, c)) is None, (p.kernel, c)


def test_layouts_are_the_problems_own(kernels):
    problem = problems("gather")[0]
    x = (2 * problem.strides.x[0], *problem.strides.x[1:])  # every other image
    apart = problem._replace(strides=problem.strides._replace(x=x), aligned=False)
    call, output = operands.operands(apart, torch.device("cpu"), seed=1)
    assert call.a.stride() == x
    assert call.a.data_ptr() % 16
    assert not call.a.isnan().any()
    assert output.isnan().all()
    assert call.a.as_strided((problem.geometry.C * 30,), (1,), 1 + problem.strides.x[0]).isnan().all()
    assert bench().fault(apart, plan.every(apart)[0]) is None
    expanded = problem._replace(strides=problem.strides._replace(x=(0, *problem.strides.x[1:])))
    call, _ = operands.operands(expanded, torch.device("cpu"), seed=1)
    assert torch.equal(call.a[0], call.a[1])
    assert bench().fault(expanded, plan.every(expanded)[0]) is None


def test_operands_are_random_and_never_all_zeros():
    for name in LAYERS:
        for problem in problems(name):
            call, _ = operands.operands(problem, torch.device("cpu"), seed=3)
            for t in (call.a, call.b):
                assert t.double().std() > 0.5
            other, _ = operands.operands(problem, torch.device("cpu"), seed=4)
            assert not torch.equal(call.a.double(), other.a.double())


def sabotaged(p, *launches):
    broken = plan.replace(p)
    broken.__dict__["launches"] = broken.__dict__["direct"] = launches
    return broken


def test_values_that_nobody_wrote_are_wrong(kernels):
    for problem in problems("gather") + problems("uint8"):
        (p, *_) = plan.every(problem)
        status, why = bench().fault(problem, sabotaged(p))
        assert status == "wrong"
        assert "elements are not" in why
        assert str(p.config) in why
        assert str(p.asked) in why


def test_slightly_wrong_values_are_wrong(kernels, monkeypatch):
    problem = problems("box")[0]
    (p,) = plan.every(problem)
    whole = execute.run

    def off(p, call, output):
        whole(p, call, output)
        output[0, 0, 0, 0, 0] += 0.1
        return output

    monkeypatch.setattr(execute, "run", off)
    status, why = bench().fault(problem, p)
    assert status == "wrong"
    assert why.startswith("1 of ")
    assert "at [0, 0, 0, 0, 0]" in why


def test_a_kernel_that_fails_is_a_fault_in_words(kernels):
    problem = problems("gather")[0]
    (p, *_) = plan.every(problem)
    clock = FakeClock()

    class Broken:
        def __init__(self, error):
            self.error = error

        def run(self, tensors):
            raise self.error

    assert bench().fault(problem, sabotaged(p, Broken(ValueError("no such block")))) == (
        "failed",
        "ValueError: no such block",
    )
    memory = sabotaged(p, Broken(torch.OutOfMemoryError("tried to allocate")))
    assert bench(clock).fault(problem, memory)[1].startswith("out of memory: ")
    assert clock.empties > 0
    with pytest.raises(torch.AcceleratorError):
        bench().fault(problem, sabotaged(p, Broken(torch.AcceleratorError("illegal memory access"))))


def test_references_in_parts_are_the_same(monkeypatch):
    for name in ("gather", "circular", "transposed", "int8"):
        for problem in problems(name):
            call, _ = operands.operands(problem, torch.device("cpu"), seed=1)
            whole = operands.expected(problem, call)
            with monkeypatch.context() as patch:
                patch.setattr(operands, "_CHUNK", 1)
                torch.testing.assert_close(operands.expected(problem, call), whole)


def test_references_run_where_only_deterministic_algorithms_are_allowed(monkeypatch):
    problem, seen, whole = problems("gather")[0], [], operands.reference.fprop

    def watched(*arguments):
        seen.append(torch.are_deterministic_algorithms_enabled())
        return whole(*arguments)

    monkeypatch.setattr(operands.reference, "fprop", watched)
    call, _ = operands.operands(problem, torch.device("cpu"), seed=1)
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        operands.expected(problem, call)
        assert torch.are_deterministic_algorithms_enabled()
        assert torch.is_deterministic_algorithms_warn_only_enabled()
    finally:
        torch.use_deterministic_algorithms(False)
    assert seen == [False]


def test_plans_are_timed_in_rounds(kernels):
    problem = problems("copied")[0]
    clock, ps = FakeClock(), plan.every(problem)
    found = bench(clock).time(problem, ps)
    assert len(ps) == len(found) == 2
    assert all(t.rounds >= rounds.LEAST and t.spread == 0 for t in found)
    assert clock.captures == len(ps)
    sets = on_device.rotation(operands.bytes_of(problem), 2**10, 2**30)
    assert {t.seconds for t in found} == {1e-3 / sets}


def test_short_samples_are_repeated(kernels):
    clock = FakeClock(lambda: 1e-4)
    problem = problems("gather")[0]
    (found,) = bench(clock).time(problem, plan.every(problem)[:1])
    assert clock.captures == 2
    assert found.seconds == pytest.approx(1e-5 / 2)


def test_memory_that_is_short_takes_fewer_sets(kernels, monkeypatch):
    problem, clock = problems("gather")[0], FakeClock()
    placed = []

    def scarce(problem, where, seed):
        if seed >= 2:
            raise torch.OutOfMemoryError("short")
        placed.append(seed)
        return whole(problem, where, seed)

    whole = operands.operands
    monkeypatch.setattr(operands, "operands", scarce)
    device = DEVICE._replace(l2_bytes=2**14)
    (found,) = bench(clock, device).time(problem, plan.every(problem)[:1])
    assert found is not None
    assert len(placed) > 2
    assert placed[-1] in (0, 1)
    monkeypatch.setattr(operands, "operands", lambda *a: scarce(*a[:2], seed=9))
    assert bench(clock).time(problem, plan.every(problem)[:1]) == [None]


def test_a_kernel_that_cannot_be_timed_leaves_the_others(kernels):
    problem = problems("gather")[0]
    (p, *_) = plan.every(problem)

    class Broken:
        def run(self, tensors):
            raise ValueError("not now")

    with pytest.warns(UserWarning, match="not measured: gather .*ValueError: not now"):
        first, second = bench().time(problem, [sabotaged(p, Broken()), p])
    assert first is None
    assert second.rounds == rounds.LEAST


def test_a_broken_device_is_told_by_the_plan_that_broke_it(kernels):
    problem = problems("gather")[0]
    (p, *_) = plan.every(problem)

    class Broken:
        def run(self, tensors):
            raise RuntimeError("Triton Error [CUDA]: an illegal memory access was encountered")

    def dead():
        raise torch.AcceleratorError("an illegal memory access was encountered")

    with pytest.raises(torch.AcceleratorError):
        bench(FakeClock(dead)).fault(problem, sabotaged(p, Broken()))


@pytest.mark.slow
def test_plans_are_compiled_ahead_as_the_audit_compiles_them():
    found = [p for problem in problems("gather", DEVICES["H200"]) for p in plan.every(problem)]
    compiling = Ahead(90, jobs=2)
    compiling.expect(found[1:])
    rows = {p: compiling.rows(p) for p in found}
    subjects = [audit.Subject("", p) for p in found]
    assert [rows[p] for p in found] == [of for _, of in sorted(audit.audit(subjects, 90, 2), key=lambda done: done[0])]
    assert all(row.code.registers > 0 for of in rows.values() for row in of)
    compiling.expect(found)
    compiling.drop()


def test_a_compiler_that_dies_is_tried_alone(monkeypatch):
    """Whose death it was nobody can tell: the plan is compiled by a process of its own."""
    (p, *_) = plan.every(problems("gather", DEVICES["H200"])[0])
    dead: Future = Future()
    dead.set_exception(BrokenProcessPool("a child process terminated abruptly"))
    alone = [audit.Row(90, "", 2, "fprop", "gather", "float32", None, audit.Wanted(), error="the compiler died")]
    monkeypatch.setattr(Ahead, "_submitted", lambda self, p: dead)
    monkeypatch.setattr(audit, "audit", lambda subjects, arch, jobs: iter([(0, alone)]))
    compiling = Ahead(90, jobs=1)
    compiling.expect([p])
    assert compiling.rows(p) == alone


def test_what_launches_is_compiled_ahead_too(monkeypatch):
    """Triton 3.6 would ask the host's compiler for it at the first launch."""
    stubs = []
    monkeypatch.setattr(audit, "stub", stubs.append)
    monkeypatch.setattr(audit, "compiling_for", lambda arch: nullcontext())
    monkeypatch.setattr(audit, "compiled_kernels", lambda p, names: iter([("launch", "kernel")]))
    monkeypatch.setattr(audit, "read_once", lambda kernel, arch: None)
    monkeypatch.setattr(audit, "_row", lambda task, launch: audit.Row(90, "", 1, "", "", "", None, audit.Wanted()))
    given = []
    monkeypatch.setattr(ahead.ProcessPoolExecutor, "submit", lambda self, work, task: given.append((work, task)))
    (p, *_) = plan.every(problems("gather", DEVICES["H200"])[0])
    Ahead(90, jobs=1).expect([p])
    ((work, task),) = given
    work(task)
    work(task._replace(stubs=False))
    assert stubs == ["kernel"]


def test_what_waits_for_a_compiler_that_dies_is_given_to_another(monkeypatch):
    first, second = (p for problem in problems("gather", DEVICES["H200"])[:2] for p in plan.every(problem)[:1])
    dead, alive = Future(), Future()
    dead.set_exception(BrokenProcessPool("a child process terminated abruptly"))
    alive.set_result([])
    given = iter([dead, dead, alive])
    monkeypatch.setattr(Ahead, "_submitted", lambda self, p: next(given))
    monkeypatch.setattr(audit, "audit", lambda subjects, arch, jobs: iter([(0, ["alone"])]))
    broken = Ahead(90, jobs=1)
    broken.expect([first, second])
    assert broken.rows(first) == ["alone"]
    assert broken.rows(second) == []


def test_compilers_do_not_run_the_users_script(monkeypatch):
    """Which may have no `if __name__ == "__main__"`, and then would train a model in each of them."""
    seen = []

    class Pool:
        def __init__(self, *args, **kwargs):
            pass

        def submit(self, *args):
            seen.append(set(multiprocessing.spawn.get_preparation_data("child")))

    script = ModuleType("__main__")
    script.__file__ = __file__
    monkeypatch.setitem(sys.modules, "__main__", script)
    monkeypatch.setattr(ahead, "ProcessPoolExecutor", Pool)
    (p, *_) = plan.every(problems("gather", DEVICES["H200"])[0])
    Ahead(90, jobs=1).expect([p])
    of_main = {"init_main_from_name", "init_main_from_path"}
    assert of_main & set(multiprocessing.spawn.get_preparation_data("child"))
    assert not of_main & seen[0]


@pytest.mark.parametrize(("free", "references"), [(2**30, 1), (2**12, 2)])
def test_a_reference_is_kept_while_there_is_room(kernels, monkeypatch, free, references):
    whole, made = operands.expected, []
    monkeypatch.setattr(operands, "expected", lambda *a: made.append(a) or whole(*a))
    problem = problems("gather")[0]
    measuring, (p, *_) = bench(FakeClock(free=free)), plan.every(problem)
    for _ in range(2):
        assert measuring.fault(problem, p) is None
        assert measuring.time(problem, [p])[0] is not None
        assert measuring.rivals(problem)
    assert len(made) == references


def test_outputs_rotate_as_operands_do():
    """Else those of a rival, which allocates them, would stay in L2."""

    class Output:
        pass

    alive, most = weakref.WeakSet(), []

    def work():
        output = Output()
        alive.add(output)
        most.append(len(alive))
        return output

    on_device.repeated(FakeClock(), [work] * 3)
    assert max(most) == 3
    assert not alive


class FakeCuda:
    """Notes, in order, what is asked of a device."""

    def __init__(self, monkeypatch, fails=False):
        self.events, self.current, self.fails = [], "mine", fails
        for name in ("device", "Event", "CUDAGraph", "graph", "stream", "current_stream", "_sleep"):
            monkeypatch.setattr(torch.cuda, name, getattr(self, name))

    @contextmanager
    def device(self, device):
        yield

    def current_stream(self, device):
        return self.current

    def _sleep(self, cycles):
        self.events.append("sleep")

    @contextmanager
    def stream(self, stream):
        before = self.current
        try:
            yield
        finally:
            self.current = before

    @contextmanager
    def graph(self, graph, capture_error_mode):
        assert capture_error_mode == "thread_local"
        self.current = "capturing"
        self.events.append(f"capture, collector {gc.isenabled()}")
        yield
        if self.fails:
            raise torch.AcceleratorError("capture was invalidated")
        self.current = "mine"

    def CUDAGraph(self):
        return SimpleNamespace(replay=lambda: self.events.append("replay"))

    def Event(self, enable_timing):
        assert enable_timing

        def note(what):
            return lambda: self.events.append(what)

        return SimpleNamespace(record=note("record"), synchronize=note("synchronize"), elapsed_time=lambda end: 2.0)


def test_the_host_is_ahead_of_the_device_when_a_sample_starts(monkeypatch):
    cuda = FakeCuda(monkeypatch)
    replay = CudaClock(torch.device("cuda", 0)).captured(lambda: cuda.events.append(f"work on {cuda.current}"))
    assert cuda.events == ["capture, collector False", "work on capturing"]
    assert gc.isenabled()
    cuda.events.clear()
    assert CudaClock(torch.device("cuda", 0)).seconds(replay) == 2e-3
    assert cuda.events == ["sleep", "record", "replay", "record", "synchronize"]


def test_a_capture_that_fails_leaves_the_stream_as_it_was(monkeypatch):
    cuda = FakeCuda(monkeypatch, fails=True)
    with pytest.raises(torch.AcceleratorError):
        CudaClock(torch.device("cuda", 0)).captured(lambda: None)
    assert cuda.current == "mine"
    assert gc.isenabled()


def test_what_cannot_be_captured_is_not_measured_while_the_device_answers(kernels):
    class Uncapturable(FakeClock):
        def captured(self, work):
            raise torch.AcceleratorError("operation not permitted when stream is capturing")

    problem = problems("gather")[0]
    with pytest.warns(UserWarning, match="not measured: gather"):
        assert bench(Uncapturable()).time(problem, plan.every(problem)[:1]) == [None]
    assert bench(Uncapturable()).rivals(problem) == {}


def test_settings_of_tf32_by_operator_are_no_hindrance(kernels):
    """`torch.backends.cudnn.flags` refuses where convolutions and recurrent networks have different ones."""
    problem, conv = problems("gather")[0], torch.backends.cudnn.conv
    before = conv.fp32_precision
    try:
        conv.fp32_precision = "ieee"
        assert bench().fault(problem, plan.every(problem)[0]) is None
        assert bench().rivals(problem)
        with backends.cudnn(enabled=False, precision="tf32"):
            assert (conv.fp32_precision, torch.backends.cudnn.enabled) == ("tf32", False)
        assert (conv.fp32_precision, torch.backends.cudnn.enabled) == ("ieee", True)
    finally:
        conv.fp32_precision = before


def test_folds_are_no_part_of_a_kernels_time(kernels, monkeypatch):
    problem = next(p for p in problems("circular") if p.role is Role.DGRAD)
    (p, *_) = plan.every(problem)
    assert [launch.name for launch in p.launches] == ["gather", "fold"]
    ran = []

    class Seen:
        def __init__(self, name):
            self.name = name

        def run(self, tensors):
            ran.append(self.name)

    assert bench().time(problem, [sabotaged(p, Seen("gather"), Seen("fold"))])[0] is not None
    assert set(ran) == {"gather"}


def test_rivals_compute_the_same():
    for name in ("gather", "depthwise", "transposed", "video", "audio", "float64", "copied"):
        for problem in problems(name):
            assert backends.comparable(problem)
            call, output = operands.operands(problem, torch.device("cpu"), seed=1)
            want = operands.expected(problem, call)
            for channels_last in (False, True):
                got = on_device.convolution(call, output, channels_last)()
                assert (got.shape, got.stride()) == (output.shape, output.stride())
                depth = got.reshape(want.shape).double()
                torch.testing.assert_close(depth, want, atol=0.05 if call.a.itemsize == 2 else 1e-4, rtol=1e-2)
            assert set(bench().rivals(problem)) == {"cudnn contiguous", "cudnn channels_last"}
    for name in ("circular", "int8", "uint8", "float8"):
        assert [bench().rivals(problem) for problem in problems(name)[:1]] == [{}]


def test_a_whole_task_in_the_interpreter(kernels, monkeypatch, tmp_path):
    """Everything but the device: a candidate whose values are wrong is kept as that, and another one wins."""
    from test_tuning import Memory

    monkeypatch.setenv("TRITON_CONV_CACHE", str(tmp_path))
    problem, store = problems("gather")[0], Memory()
    whole = execute.run

    def off(p, call, output):
        whole(p, call, output)
        return output.mul_(2) if p.config.BLOCK_M == 16 and p.config != rule.config else output

    rule, *_ = plan.every(problem)
    monkeypatch.setattr(execute, "run", off)
    result = tune.tune_one(Task("layer", problem), bench(), store, Budget(candidates=6))
    assert result.tried == 6
    assert 0 < result.wrong < 5
    assert result.config.BLOCK_M != 16 or result.config == rule.config
    assert set(result.rival) == {"cudnn contiguous", "cudnn channels_last"}
    assert all("elements are not within rounding" in words for words in result.faults)


# ---------------------------------------------------------------------------------------------------------------------
# Numbers


def test_rotated_sets_are_more_than_twice_l2():
    for size in (1, 1000, 2**20, 61 * 2**20, 2**30):
        count = on_device.rotation(size, 60 * 2**20, 2**40)
        assert count * size > 120 * 2**20 or count == on_device._LAUNCHES // 2
        assert count >= 2
    assert on_device.rotation(2**30, 60 * 2**20, 3 * 2**30) == 1
    assert on_device.rotation(2**20, 60 * 2**20, 20 * 2**20) == 10


@pytest.mark.parametrize("splits", [1, 64])
def test_a_workspace_beside_operands_does_not_keep_them_in_l2(kernels, monkeypatch, splits):
    problem = next(p for p in problems("box") if p.role is Role.WGRAD)
    (p, *_) = plan.every(problem)
    p = plan.with_config(problem, p, plan.replace(p.config, splits=splits))
    size, placed, whole = operands.bytes_of(problem), [], operands.operands
    monkeypatch.setattr(operands, "operands", lambda *a: placed.append(a) or whole(*a))
    device = DEVICE._replace(l2_bytes=5 * size)
    measuring = bench(device=device)
    measuring.time(problem, [sabotaged(p)])
    assert len(placed) == 11
    measuring.rivals(problem)
    assert len(placed) == 22
    assert bench(FakeClock(free=8 * size), device)._sets(problem, size) == 2


def test_samples_are_long_and_graphs_are_not():
    assert on_device.repeats(1e-5, 1) == 100
    assert on_device.repeats(1.0, 1) == 1
    assert on_device.repeats(1e-6, 100) == on_device._LAUNCHES // 100


def test_stamps_say_what_was_measured_with():
    stamp = bench().stamp("gather")
    assert {"kernel", "triton", "torch", "driver", "time"} <= set(stamp)
    assert all(isinstance(value, str) and value for value in stamp.values())


def test_a_device_that_is_not_there_is_said():
    if torch.cuda.is_available():
        pytest.skip("there is one")
    with pytest.raises(RuntimeError, match="no CUDA device"):
        on_device.CudaBench()
