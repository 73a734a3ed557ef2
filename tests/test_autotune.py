"""Tuning in training, with simulated times; and cuDNN in our place where stored numbers say so."""

import json
import os
import warnings
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
from processes import fresh_processes

import triton_conv
from triton_conv import backends, execute, explain, plan, stored, ways
from triton_conv import key as keys
from triton_conv.devices import DEVICES
from triton_conv.settings import Setting
from triton_conv.stored import Candidate, Entry
from triton_conv.tuning import ranks, training
from triton_conv.tuning.measure import SimulatedBench


@pytest.fixture(autouse=True)
def clean(tmp_path, monkeypatch):
    """A store of the test's own, and nothing left behind."""
    monkeypatch.setenv("TRITON_CONV_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv(backends.VARIABLE, raising=False)
    backends._of_environment.cache_clear()
    monkeypatch.setattr(training, "_told", False)
    monkeypatch.setattr(backends, "_backend", Setting(None))
    stored.uninstall()
    training._tuned.clear()
    yield
    backends._of_environment.cache_clear()
    stored.uninstall()
    training._tuned.clear()
    assert execute._seen == ()


WHERE = torch.device("cuda" if torch.cuda.is_available() else "cpu")  # of the tests' kernels


class Counting(SimulatedBench):
    """Knows how many plans it was asked to time."""

    def __init__(self, where=WHERE, **options):
        super().__init__(execute.device_of(where), **options)
        self.asked = 0

    def time(self, problem, plans):
        self.asked += len(plans)
        return super().time(problem, plans)


def step(channels=4, where=WHERE):
    """Forward and backward of a small convolution; its output and gradients."""
    torch.manual_seed(channels)
    shapes = (2, channels, 6, 6), (8, channels, 3, 3), (8,)
    x, w, b = (torch.randn(shape, device=where).requires_grad_() for shape in shapes)
    y = triton_conv.conv2d(x, w, b, padding=1)
    y.square().sum().backward()
    return y.detach(), x.grad, w.grad, b.grad


def problems_of(run):
    with execute.problems() as found:
        run()
    return list(found)


def install(problems, seconds, rival, name="cudnn contiguous"):
    """As if every way had been measured to take `seconds`, and cuDNN `rival`."""
    for problem in problems:
        for p in plan.every(problem):
            place = ways.key_of(problem, p.layout)
            stamp = {"kernel": keys.source_hash(p.kernel)}
            entry = Entry(
                *place, "measured", stamp, (Candidate(p.config, seconds),), {name: rival, "slower": 2 * rival}
            )
            stored.install(p.device.name, p.kernel, [entry])


def test_what_a_step_computes_is_tuned_when_it_is_over(kernels):
    bench = Counting()
    with triton_conv.autotune(budget=60, candidates=3, bench=bench) as results:
        before = step()
        assert bench.asked == 0
        assert results == []
    assert {r.task.problem.role.value for r in results} == {"fprop", "dgrad", "wgrad"}
    assert bench.asked > 0
    for problem in problems_of(step):
        assert all(p.measured is not None for p in plan.every(problem))
        assert "installed, measured" in plan.make(problem).reason
    for got, want in zip(step(), before, strict=True):
        torch.testing.assert_close(got, want, atol=1e-4, rtol=1e-4)


def test_a_second_time_costs_nothing(kernels):
    bench = Counting()
    with triton_conv.autotune(candidates=2, bench=bench) as results:
        step()
        step()
    assert len(results) == 3
    asked = bench.asked
    with triton_conv.autotune(candidates=2, bench=bench) as results:
        step()
    assert bench.asked == asked
    assert results == []


def test_contexts_nest(kernels):
    bench = Counting()
    with triton_conv.autotune(candidates=2, bench=bench) as outer:
        step(4)
        with triton_conv.autotune(candidates=2, bench=bench) as inner:
            step(8)
        assert {r.task.problem.geometry.C for r in inner} == {8}
    assert {r.task.problem.geometry.C for r in outer} == {4}


def test_an_exception_passes_through_and_leaves_things_as_they_were(kernels):
    bench = Counting()

    def fail():
        with triton_conv.autotune(backend="auto", bench=bench):
            step()
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert bench.asked == 0
    assert backends.current() == "triton"
    assert execute._seen == ()


def test_a_bench_that_fails_does_not_end_the_training(kernels):
    class Failing(Counting):
        def time(self, problem, plans):
            raise torch.cuda.OutOfMemoryError("out of memory")

    with pytest.warns(UserWarning, match="autotune ends at .*OutOfMemoryError"), triton_conv.autotune(bench=Failing()):
        step()


def test_the_budget_is_kept(kernels, monkeypatch):
    now = [0.0]
    for clock in ("time.monotonic", "triton_conv.tuning.tune.monotonic"):
        monkeypatch.setattr(clock, lambda: now[0])

    class Slow(Counting):
        def time(self, problem, plans):
            now[0] += 10.0
            return super().time(problem, plans)

    with triton_conv.autotune(budget=5, bench=Slow()) as results:
        step()
    assert len(results) == 3
    assert [bool(r.skipped) for r in results] == [False, True, True]


def test_random_numbers_go_on_as_without(kernels):
    class Random(Counting):
        def time(self, problem, plans):
            torch.randn(3)
            return super().time(problem, plans)

    with triton_conv.autotune(candidates=1, bench=Random()):
        step()
        torch.manual_seed(5)
    assert torch.equal(torch.randn(4), torch.randn(4, generator=torch.Generator().manual_seed(5)))


def test_nothing_is_measured_while_code_is_traced(kernels, monkeypatch):
    bench = Counting()
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    with pytest.warns(UserWarning, match="code is being traced"), triton_conv.autotune(bench=bench) as results:
        step()
    assert results == []
    assert bench.asked == 0


def test_nothing_is_measured_while_a_graph_is_captured(kernels, monkeypatch):
    bench, capturing = Counting(), True
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: capturing)
    monkeypatch.setattr(training, "_undisturbed", torch.no_grad)
    with pytest.warns(UserWarning, match="a CUDA graph is being captured"), triton_conv.autotune(bench=bench):
        step()
    assert bench.asked == 0
    with triton_conv.autotune(candidates=1, bench=bench):
        step()  # captured, and over when the context ends
        capturing = False
    assert bench.asked > 0


def test_traced_calls_are_left_until_they_run(kernels):
    from torch._subclasses.fake_tensor import FakeTensorMode

    bench = Counting()
    with triton_conv.autotune(bench=bench) as results, FakeTensorMode():
        triton_conv.conv2d(torch.randn(2, 4, 6, 6, device=WHERE), torch.randn(8, 4, 3, 3, device=WHERE))
    assert results == []
    assert bench.asked == 0


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU to tune on")
def test_without_a_gpu_it_says_so_once():
    with pytest.warns(UserWarning, match="without a GPU"), triton_conv.autotune() as results:
        step()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with triton_conv.autotune():
            step()
    assert results == []


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"budget": 0}, "budget=0"),
        ({"budget": float("nan")}, "budget=nan"),
        ({"budget": "60"}, "budget='60'"),
        ({"candidates": 0}, "candidates=0"),
        ({"candidates": 1.5}, "candidates=1.5"),
        ({"timeout": -1}, "timeout=-1"),
        ({"lease": None}, "lease=None"),
        ({"backend": "cudnn"}, "backend='cudnn'"),
    ],
)
def test_bad_arguments_are_named(options, words):
    with pytest.raises(ValueError, match=words), triton_conv.autotune(**options):
        pass


# ---------------------------------------------------------------------------------------------------------------------
# Several ranks


def train(rank, port, directory, channels, raises):
    """One rank: a context around a step, then which configs run; files and noise are its own."""
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    os.environ |= {"TORCHELASTIC_USE_AGENT_STORE": "True", "TRITON_INTERPRET": "1"}
    os.environ["TRITON_CONV_CACHE"] = str(directory / f"cache-{rank}")
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    here = torch.device("cpu")
    bench, said = Counting(here, noise=0.05, seed=rank), ""
    try:
        with triton_conv.autotune(candidates=3, bench=bench, timeout=120, lease=60) as results:
            for c in channels[rank]:
                step(c, here)
            if raises == rank:
                raise KeyError("of this rank alone")
    except (RuntimeError, KeyError) as error:
        said, results = str(error), []
    runs = {}
    for c in sorted({c for some in channels for c in some}):
        for problem in problems_of(lambda c=c: step(c, here)):
            found = [[p.kernel, str(p.config), p.measured, p.rival] for p in plan.every(problem)]
            runs[f"{c} {problem.role}"] = [found, str(plan.make(problem).config)]
    asked = bench.asked
    if not said:
        with triton_conv.autotune(candidates=3, bench=bench, timeout=120, lease=60) as again:
            for c in channels[rank]:
                step(c, here)
        assert again == []
    content = {"said": said, "runs": runs, "asked": asked, "then": bench.asked, "results": len(results)}
    (directory / f"rank-{rank}").write_text(json.dumps(content))
    dist.destroy_process_group()


def trained(directory, channels, raises=None):
    context = fresh_processes()
    store = dist.TCPStore("127.0.0.1", 0, None, True, wait_for_workers=False)
    processes = [context.Process(target=train, args=(r, store.port, directory, channels, raises)) for r in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(100)
        assert process.exitcode == 0
    return [json.loads((directory / f"rank-{rank}").read_text()) for rank in range(2)]


def test_ranks_of_other_noise_files_and_problems_end_up_with_the_same_configs(tmp_path):
    one, other = trained(tmp_path, [[2, 4], [4, 8]])
    assert one["runs"] == other["runs"]
    assert len(one["runs"]) == one["results"] == other["results"] == 9
    assert one["asked"] > 0
    assert other["asked"] > 0  # each measured what only it computes, at least
    assert one["then"] == one["asked"]
    assert other["then"] == other["asked"]


def test_a_rank_that_raises_is_named_to_the_others(tmp_path):
    one, other = trained(tmp_path, [[4], [4]], raises=1)
    assert other["said"] == "'of this rank alone'"
    assert one["said"] == "triton_conv.autotune: rank 1 of 2 left it by an exception"
    assert one["asked"] == other["asked"] == 0


def test_a_rank_that_does_not_come_is_named(kernels, monkeypatch):
    monkeypatch.setattr(ranks, "of_process_group", lambda: ranks.Ranks(dist.HashStore(), 0, 2))
    with (
        pytest.raises(RuntimeError, match=r"triton_conv.autotune: waited 0.05 s for rank 1 of 2"),
        triton_conv.autotune(bench=Counting(), timeout=0.05),
    ):
        step()


# ---------------------------------------------------------------------------------------------------------------------
# cuDNN in our place


@pytest.fixture
def taken(monkeypatch):
    """The roles that PyTorch computed in our place."""
    roles, convolve = [], backends.convolve
    monkeypatch.setattr(backends, "convolve", lambda role, *rest: roles.append(role.value) or convolve(role, *rest))
    return roles


def test_auto_runs_the_rival_exactly_where_it_was_measured_to_be_quicker(kernels, taken):
    problems, ours = problems_of(step), step()
    for seconds, rival, quicker in ((1e-3, 0.9e-3, True), (1e-3, 0.99e-3, False), (1e-3, 1.1e-3, False)):
        install(problems, seconds, rival)
        for backend in backends.BACKENDS:
            taken.clear()
            with triton_conv.backend(backend):
                theirs = step()
            assert taken == (["fprop", "dgrad", "wgrad"] if quicker and backend == "auto" else [])
            for got, want in zip(theirs, ours, strict=True):
                assert got.stride() == want.stride()
                torch.testing.assert_close(got, want, atol=1e-4, rtol=1e-4)


def test_a_plan_says_that_the_rival_runs_and_why(kernels):
    problems = problems_of(step)
    install(problems, 15e-6, 12e-6)
    with triton_conv.backend("auto"):
        p = plan.make(problems[0])
    assert p.reason == f"cudnn contiguous, 12 us measured against 15 us of {p.kernel}"
    assert "kernel     cudnn contiguous, in place of" in str(p)
    assert "cudnn" not in str(plan.make(problems[0]))


def test_tuning_remembers_the_rival(kernels, taken):
    class Beaten(Counting):
        def rivals(self, problem):
            return {"cudnn contiguous": 1e-9, "cudnn channels_last": 1e-12}

    with triton_conv.autotune(backend="auto", candidates=1, bench=Beaten()):
        step()
        assert taken == []
    step()
    assert sorted(taken) == ["dgrad", "fprop", "wgrad"]
    assert backends.current() == "auto"


CASES = {
    "stride": (2, (2, 4, 9, 8), (6, 4, 3, 2), {"stride": 2, "padding": 1}),
    "dilation and groups": (2, (2, 4, 9, 8), (6, 2, 3, 2), {"dilation": 2, "groups": 2}),
    "one axis": (1, (2, 4, 9), (6, 4, 3), {"stride": 3}),
    "three axes": (3, (1, 2, 4, 5, 6), (3, 2, 2, 3, 2), {"padding": (1, 0, 1)}),
    "transposed": (2, (2, 4, 5, 5), (4, 6, 3, 3), {"transposed": True, "stride": 2, "output_padding": 1}),
}


@pytest.mark.parametrize("dtype", [torch.float64])
@pytest.mark.parametrize(
    ("channels_last", "name"),
    [(False, "contiguous"), (False, "channels_last"), (True, "contiguous"), (True, "channels_last")],
)
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_the_rival_means_the_same(kernels, taken, case, channels_last, name, dtype):
    rank, x_shape, w_shape, options = case
    if channels_last and rank == 1:
        pytest.skip("there is no channels-last of one axis")
    function = f"conv{'_transpose' if options.get('transposed') else ''}{rank}d"
    options = {key: value for key, value in options.items() if key != "transposed"}
    layout = {2: torch.channels_last, 3: torch.channels_last_3d}[rank] if channels_last else torch.contiguous_format

    def run():
        torch.manual_seed(0)
        x, w = (torch.randint(-3, 4, shape).to(WHERE, dtype, memory_format=layout) for shape in (x_shape, w_shape))
        b = torch.ones(3 if rank == 3 else 6, dtype=dtype, device=WHERE).requires_grad_()
        x, w = x.requires_grad_(), w.requires_grad_()
        with triton_conv.override():  # neither this nor autocast may change what the rival computes
            y = getattr(torch.nn.functional, function)(x, w, b, **options)
            with torch.autocast(WHERE.type, torch.float16):
                y.backward(torch.ones_like(y))
        return y.detach(), x.grad, w.grad, b.grad

    ours = run()
    install(problems_of(run), 1.0, 1e-9, f"cudnn {name}")
    with triton_conv.backend("auto"):
        theirs = run()
    assert sorted(taken) == ["dgrad", "fprop", "wgrad"]
    for got, want in zip(theirs, ours, strict=True):
        assert (got.dtype, got.stride()) == (want.dtype, want.stride())
        torch.testing.assert_close(got, want)


@pytest.mark.parametrize(
    "options",
    [
        {"padding_mode": "circular"},
        {"padding": ((1, 0), 1)},
        {"precision": "tf32x3"},
        {"precision": "ieee"},
    ],
    ids=str,
)
def test_what_the_rival_would_compute_otherwise_stays_here(kernels, taken, options, monkeypatch):
    monkeypatch.setattr(backends, "default_precision", lambda: "tf32")
    monkeypatch.setattr(execute, "default_precision", lambda: "tf32")

    def run():
        x, w = torch.randn(2, 4, 6, 6, device=WHERE), torch.randn(8, 4, 3, 3, device=WHERE)
        triton_conv.conv2d(x, w, **{"padding": 1, **options})

    install(problems_of(run), 1.0, 1e-9)
    with triton_conv.backend("auto"):
        run()
    assert taken == []


def test_integers_stay_here(kernels, taken):
    def run():
        x, w = (torch.ones(shape, dtype=torch.int32, device=WHERE) for shape in ((1, 2, 4, 4), (2, 2, 3, 3)))
        triton_conv.conv2d(x, w)

    install(problems_of(run), 1.0, 1e-9)
    with triton_conv.backend("auto"):
        run()
    assert taken == []


def test_settings_of_torch_are_obeyed(kernels, taken, monkeypatch):
    install(problems_of(step), 1.0, 1e-9)
    with triton_conv.backend("auto"):
        monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: True)
        step()
        assert taken == []
        with torch.backends.cudnn.flags(enabled=True, deterministic=True):
            step()
        assert len(taken) == 3
        with torch.backends.cudnn.flags(enabled=False, deterministic=True):
            step()
        assert len(taken) == 3


def test_an_explicit_config_is_run_by_its_kernel(kernels, taken):
    problems = problems_of(step)
    install(problems, 1.0, 1e-9)
    config = replace(plan.make(problems[0]).config, num_warps=2)
    with triton_conv.backend("auto"), plan.configs.explicit({problems[0].role: config}):
        step()
    assert sorted(taken) == ["dgrad", "wgrad"]


def test_backends_nest_and_the_environment_is_the_first_word(monkeypatch):
    assert backends.current() == "triton"
    with triton_conv.backend("auto"):
        with triton_conv.backend("triton"):
            assert backends.current() == "triton"
        assert backends.current() == "auto"
    assert backends.current() == "triton"
    backends._of_environment.cache_clear()
    monkeypatch.setenv(backends.VARIABLE, "auto")
    assert backends.current() == "auto"
    backends._of_environment.cache_clear()
    monkeypatch.setenv(backends.VARIABLE, "cudnn")
    with pytest.raises(ValueError, match="TRITON_CONV_BACKEND='cudnn'"):
        backends.current()
    with pytest.raises(ValueError, match="name='cudnn'"):
        triton_conv.backend("cudnn")


def test_explain_shows_the_rival():
    shapes, device = ((8, 64, 14, 14), (64, 64, 3, 3)), DEVICES["H200"]
    with execute.recording() as calls:
        triton_conv.conv2d(*(torch.empty(shape, device="meta") for shape in shapes), precision="ieee")
    install([execute.problem_of(calls[0], device)], 15e-6, 12e-6)
    with triton_conv.backend("auto"), torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        assert "cudnn contiguous, 12 us measured against 15 us of gather" in explain.text(*shapes, precision="ieee")


def test_explain_shows_the_measured_time():
    shapes = (8, 64, 14, 14), (64, 64, 3, 3)
    before = explain.text(*shapes)
    assert before.count("predicted, not measured: ") == 3
    install(explain.problems(*shapes).values(), 15e-6, 20e-6)
    after = explain.text(*shapes)
    assert after.count("time       15 us measured, ") == 3
    assert "not measured" not in after
    # a config of another size is not measured for this one
    other = explain.text((9, 64, 14, 14), shapes[1])
    assert "measured for another size" in other
    assert other.count("predicted, not measured: ") == 3
