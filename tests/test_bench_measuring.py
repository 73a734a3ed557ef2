"""How benchmarks measure, in the interpreter and by a clock that is none."""

import math
from types import SimpleNamespace

import pytest
import torch
from bench_cases import COMPOUND, CPU, FakeProbe, all_ops, meter, of
from test_measure import FakeClock

from bench import ceilings, device_meter, jobs, records, runner, subjects, values
from bench.device_meter import CudaProbe, DeviceMeter
from bench.jobs import predicted_row, small
from bench.meters import PredictedMeter, SimulatedMeter
from bench.records import (
    CHANNELS_LAST,
    COMPILED,
    CONTIGUOUS,
    OURS,
)
from bench.subjects import DEFAULT
from triton_conv.devices import A100
from triton_conv.tuning import audit, rounds

# ---------------------------------------------------------------------------------------------------------------------
# Meters


@pytest.mark.parametrize("name", ["circular", "transposed", "causal silu", *COMPOUND])
def test_rows_have_everybody(name):
    for job in all_ops(name):
        probe = FakeProbe()
        row = meter(probe).row(job)
        assert set(row.measured) == {s.who for s in subjects.subjects(job)}
        assert next(iter(row.measured)) == OURS
        for m in row.measured.values():
            assert m.note == ""
            assert 0 < m.seconds < 1e-3  # one of several works that take 1e-3
            assert m.rounds == device_meter.ROUNDS
            assert m.spread == 0
            assert m.host_seconds > 0
            assert m.peak_bytes == 100
            assert 0 < m.error < 1
        assert probe.peaks == len(row.measured)


def test_inputs_rotate_beyond_l2(monkeypatch):
    job, seeds, whole = of("plain"), [], values.operands
    monkeypatch.setattr(values, "operands", lambda *a, seed: seeds.append(seed) or whole(*a, seed=seed))
    row = meter(l2_bytes=4 * values.bytes_of(job)).row(job)
    assert sorted(seeds) == sorted([0, 0, *range(9), *range(9)])
    assert row.measured[OURS].seconds == pytest.approx(1e-3 / 9)


def test_whoever_cannot_is_a_note_and_the_others_go_on(monkeypatch):
    whole = subjects._cudnn

    def fails(op, conv, t):
        if t.x.is_contiguous():
            raise RuntimeError("no engine\nin many lines")
        return whole(op, conv, t)

    monkeypatch.setattr(subjects, "_cudnn", fails)
    row = meter().row(of("plain"))
    assert row.measured[CONTIGUOUS] == records.Measurement(note="failed: RuntimeError: no engine")
    assert row.measured[CHANNELS_LAST].seconds > 0
    assert row.measured[OURS].seconds > 0


def test_wrong_results_have_no_time(monkeypatch):
    monkeypatch.setattr(
        values, "checked", lambda job, subject, *a: (3.0, "wrong: all") if subject.who == OURS else (0.1, "")
    )
    row = meter().row(of("plain"))
    assert row.measured[OURS] == records.Measurement(error=3.0, note="wrong: all")
    assert row.measured[CONTIGUOUS].seconds > 0


@pytest.mark.parametrize(("off", "timed"), [(3.0, True), (30.0, False), (math.inf, False)])
def test_others_are_timed_where_they_are_a_little_off(monkeypatch, off, timed):
    monkeypatch.setattr(
        values, "checked", lambda job, subject, *a: (0.1, "") if subject.who == OURS else (off, "wrong: some")
    )
    theirs = meter().row(of("plain")).measured[CONTIGUOUS]
    assert (theirs.seconds is not None) == timed
    assert theirs.note == "wrong: some"


def test_a_device_that_has_failed_ends_it(monkeypatch):
    probe = FakeProbe()

    def broken(*args):
        probe.times = raises(torch.AcceleratorError("an illegal memory access was encountered"))
        raise RuntimeError("Triton Error [CUDA]: an illegal memory access was encountered")

    monkeypatch.setattr(values, "checked", broken)
    with pytest.raises(torch.AcceleratorError):
        meter(probe).row(of("plain"))


def raises(error):
    def function(*args, **kwargs):
        raise error

    return function


def test_what_cannot_be_captured_is_timed_as_it_is():
    class Uncapturable(FakeProbe):
        def captured(self, work):
            raise torch.AcceleratorError("operation not permitted when stream is capturing")

    for m in meter(Uncapturable()).row(of("plain")).measured.values():
        assert m.seconds > 0
        assert m.note.startswith("timed without a CUDA graph: AcceleratorError: operation not permitted")


def test_long_works_are_timed_without_a_graph_and_unrepeated():
    probe = FakeProbe(seconds=lambda: 2 * device_meter.VERY_LONG)
    row = meter(probe).row(of("plain"))
    assert probe.captures == 0
    assert {m.seconds for m in row.measured.values()} == {2 * device_meter.VERY_LONG}
    assert {m.note for m in row.measured.values()} == {""}


def test_memory_that_is_short_takes_fewer_sets_then_one_subject_at_a_time(monkeypatch):
    whole, counts = DeviceMeter._together, []

    def scarce(self, job, those, count):
        counts.append((len(those), count))
        if len(those) > 1 or those[0].who == CONTIGUOUS:
            raise torch.OutOfMemoryError("tried to allocate")
        return whole(self, job, those, count)

    monkeypatch.setattr(DeviceMeter, "_together", scarce)
    row = meter(l2_bytes=2 * values.bytes_of(of("plain"))).row(of("plain"))
    assert counts == [(3, 5), (3, 2), (3, 1), (1, 1), (1, 1), (1, 1)]
    assert row.measured[OURS].seconds > 0
    assert row.measured[CONTIGUOUS].note.startswith("out of memory: ")
    assert row.measured[CONTIGUOUS].error < 1


def test_whoever_fails_while_it_is_timed_is_a_note(monkeypatch):
    whole = DeviceMeter._sampler

    def fails(self, works):
        if len(works[0]()[0].shape) == 4 and works[0]()[0].is_contiguous():
            raise RuntimeError("only now")
        return whole(self, works)

    monkeypatch.setattr(DeviceMeter, "_sampler", fails)
    row = meter().row(of("plain"))
    assert row.measured[CONTIGUOUS].note == "failed: RuntimeError: only now"
    assert row.measured[OURS].seconds > 0
    assert row.measured[CHANNELS_LAST].seconds > 0


def test_references_are_kept_for_the_next_operation_unless_they_are_large(monkeypatch):
    made, whole = [], values.expected
    monkeypatch.setattr(values, "expected", lambda job, t, name: made.append(name) or whole(job, t, name))
    measuring = meter()
    for job in all_ops("plain"):
        measuring.row(job)
    assert sorted(made) == ["dw", "dx", "y"]
    made.clear()
    measuring = meter(FakeProbe(free=2**10))
    for job in all_ops("plain"):
        measuring.row(job)
    assert sorted(made) == ["dw", "dw", "dx", "dx", "y", "y"]


def test_plans_whose_compilers_die_are_not_run(monkeypatch):
    class Compiled:
        error = f"{audit.DIED} of it"

        def __init__(self):
            self.expected = []

        def expect(self, plans):
            self.expected += plans

        def rows(self, p):
            return [SimpleNamespace(error=""), SimpleNamespace(error=self.error)]

    measuring = meter()
    measuring.ahead = Compiled()
    todo = all_ops("plain")
    measuring.expect(todo)
    assert len(measuring.ahead.expected) == 3
    row = measuring.row(todo[0])
    assert row.measured[OURS].note == "failed: the compiler died of it"
    assert row.measured[CONTIGUOUS].seconds > 0
    monkeypatch.setattr(Compiled, "error", "FileNotFoundError: cuobjdump")  # what cannot be read may run all the same
    measuring = meter()
    measuring.ahead = Compiled()
    assert measuring.row(todo[0]).measured[OURS].seconds > 0

    monkeypatch.setattr(Compiled, "rows", raises(RuntimeError("processes die")))
    with pytest.warns(UserWarning, match="nothing is compiled ahead: processes die"):
        assert measuring.row(todo[1]).measured[OURS].seconds > 0


def test_float32_is_multiplied_alike(monkeypatch):
    seen, whole = [], values.checked

    def watched(*args):
        seen.append((torch.backends.cudnn.conv.fp32_precision, torch.backends.cuda.matmul.fp32_precision))
        return whole(*args)

    monkeypatch.setattr(values, "checked", watched)
    before = torch.backends.cudnn.conv.fp32_precision, torch.backends.cuda.matmul.fp32_precision
    for precision, want in (("tf32", "tf32"), ("ieee", "ieee"), ("tf32x3", "ieee")):
        job = of("patches")
        options = {**job.layer.options, "precision": precision}
        row = meter().row(job._replace(layer=job.layer._replace(options=options)))
        assert f"precision {precision}" in row.call
        assert set(seen) == {(want, want)}
        seen.clear()
    assert before == (torch.backends.cudnn.conv.fp32_precision, torch.backends.cuda.matmul.fp32_precision)


def test_only_those_asked_for_are_compared_with():
    assert COMPILED not in DEFAULT
    assert [s.who for s in subjects.subjects(of("plain"), [CHANNELS_LAST])] == [OURS, CHANNELS_LAST]
    with pytest.raises(ValueError, match="who: 'cudnn' is not one of cudnn contiguous, "):
        subjects.subjects(of("plain"), ["cudnn"])
    (_, compiled) = subjects.subjects(of("circular", "step"), [COMPILED])
    assert compiled.between
    assert compiled.channels_last
    assert [s.who for s in subjects.subjects(of("plain", "dgrad"), [COMPILED])] == [OURS]


def test_flag_gems_is_asked_where_it_is(monkeypatch):
    def conv2d(x, w, bias, *how):
        return torch.nn.functional.conv2d(x, w, bias, *how)

    monkeypatch.setattr(subjects.importlib.util, "find_spec", lambda name: name == "flag_gems")
    monkeypatch.setattr(subjects.importlib, "import_module", lambda name: SimpleNamespace(conv2d=conv2d))
    for name, op in (("plain", "fprop"), ("circular", "step")):
        assert meter(who=["flag_gems"]).row(of(name, op)).measured["flag_gems"].error < 1
    for name, op in (("plain", "dgrad"), ("transposed", "fprop"), ("audio", "fprop")):
        assert [s.who for s in subjects.subjects(of(name, op), ["flag_gems"])] == [OURS]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["circular", "causal silu"])
def test_compiled_subjects_compute_the_same(name):
    row = meter(who=[COMPILED]).row(of(name, "step"))
    assert row.measured[COMPILED].seconds > 0


def test_a_host_that_takes_longer_than_the_device():
    probe = FakeProbe()
    assert device_meter.host_seconds(probe, lambda: ()) == pytest.approx(1e-3 / device_meter.HOST_CALLS)
    probe = FakeProbe(seconds=lambda: 1.0)
    assert device_meter.host_seconds(probe, lambda: ()) == pytest.approx(1e-3)


def test_peak_memory_leaves_results_out(monkeypatch):
    kept = torch.empty(1000, dtype=torch.uint8)
    allocated = {"now": 5000, "peak": 0}
    for name in ("synchronize", "reset_peak_memory_stats"):
        monkeypatch.setattr(torch.cuda, name, lambda device: None)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: allocated["now"])
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: allocated["peak"])

    def work():
        allocated["peak"] = 5000 + 1000 + 300
        return kept, kept[10:]

    assert CudaProbe(torch.device("cuda", 0)).peak_bytes(work) == 300


def test_a_gpu_that_is_not_there_is_said():
    if torch.cuda.is_available():
        pytest.skip("there is one")
    with pytest.raises(RuntimeError, match="no CUDA device"):
        device_meter.CudaMeter()


def test_a_product_that_fails_leaves_the_other_ceilings(monkeypatch):
    whole = ceilings.matmul_precision

    def mixed(precision):
        if precision == "tf32":
            raise RuntimeError("a mix of the legacy and new APIs")
        return whole(precision)

    monkeypatch.setattr(ceilings, "matmul_precision", mixed)
    with pytest.warns(UserWarning, match="no ceiling of tf32: a mix"):
        found = ceilings.ceilings(CPU, FakeClock(), copy_bytes=4096, edge=16, ieee_edge=8)
    assert set(found) == {"copy", "matmul bfloat16", "matmul float16", "matmul float32"}


def test_ceilings_count_what_was_moved_and_multiplied():
    clock = FakeClock(lambda: 1e-2)
    found = ceilings.ceilings(CPU, clock, copy_bytes=4096, edge=16, ieee_edge=8)
    assert found == {
        "copy": pytest.approx(2 * 4096 * ceilings.REPEATS / 1e-2),
        **{f"matmul {n}": pytest.approx(2 * 16**3 * ceilings.REPEATS / 1e-2) for n in ("bfloat16", "float16", "tf32")},
        "matmul float32": pytest.approx(2 * 8**3 * ceilings.REPEATS / 1e-2),
    }


def test_all_rounds_eliminate_nobody():
    calls = []
    samplers = [lambda: calls.append(0) or 1.0, lambda: calls.append(1) or 9.0]
    found = rounds.all_rounds(samplers, 4)
    assert [t.seconds for t in found] == [1.0, 9.0]
    assert calls == [0, 1, 1, 0, 0, 1, 1, 0]
    clock = iter(range(100))
    assert [t.rounds for t in rounds.all_rounds(samplers, 50, lambda: next(clock), seconds=5, least=3)] == [8, 8]
    assert [t.rounds for t in rounds.all_rounds(samplers, 50, lambda: next(clock), seconds=0, least=3)] == [3, 3]


# ---------------------------------------------------------------------------------------------------------------------
# Runs


def few():
    return [small(job) for job in jobs.jobs(["resnet50_batch1"], ["fprop", "wgrad"], quick=True)]


def test_simulated_rows_are_the_same_each_time(kernels):
    job = few()[0]
    one, two = (SimulatedMeter(A100).row(job) for _ in range(2))
    assert one == two
    assert one != SimulatedMeter(A100, seed=1).row(job)
    assert set(one.measured) == {OURS, CONTIGUOUS, CHANNELS_LAST}
    assert one.measured[OURS].error > 0
    assert all(m.seconds > 0 and m.note == "simulated" for m in one.measured.values())
    assert set(SimulatedMeter().ceilings()) == {
        "copy",
        *(f"matmul {n}" for n in ("bfloat16", "float16", "tf32", "float32")),
    }


def test_simulated_rows_of_wrong_kernels_say_so(monkeypatch):
    monkeypatch.setattr(values, "checked", lambda *a: (math.inf, "wrong: all"))
    for measuring in (SimulatedMeter(), PredictedMeter()):
        assert measuring.row(few()[0]).measured == {OURS: records.Measurement(note="wrong: all")}


def test_predictions_are_no_measurements(tmp_path):
    found = runner.run(few(), PredictedMeter(), "here", tmp_path / "a" / "run.json")
    assert records.read(tmp_path / "a" / "run.json") == found
    assert (found.source, found.ceilings, found.command) == ("predicted", {}, "here")
    for row in found.rows:
        assert row.predicted_seconds > 0
        assert row.measured[OURS].seconds is None
        assert row.measured[OURS].note.startswith("not measured: ")
        assert row.measured[OURS].error < 1
    assert {"torch", "triton", "python", "cudnn", "cuda", "driver", "triton_conv"} == set(found.versions)


class Noting(PredictedMeter):
    def __init__(self, fails_at=None):
        super().__init__()
        self.seen, self.expected, self.fails_at = [], [], fails_at

    def expect(self, jobs):
        self.expected += [job.name for job in jobs]

    def row(self, job):
        if len(self.seen) == self.fails_at:
            raise torch.AcceleratorError("an illegal memory access was encountered")
        self.seen.append(job.row_name)
        return predicted_row(job, self.device)


def test_runs_go_on_where_they_ended(tmp_path):
    out, todo, told = tmp_path / "run.json", few(), []
    first = Noting(fails_at=2)
    with pytest.raises(torch.AcceleratorError):
        runner.run(todo, first, out=out, progress=told.append)
    assert [row.name for row in records.read(out).rows] == first.seen == [row.name for row in told]
    second = Noting()
    found = runner.run(todo[1:], second, out=out)
    assert second.seen == [job.row_name for job in todo[2:]]
    assert second.expected == [job.name for job in todo[2:]]
    assert {row.name for row in found.rows} == {job.row_name for job in todo}
    assert records.read(out) == found
    third = Noting()
    assert [row.name for row in runner.run(todo, third, out=out).rows] == [job.row_name for job in todo]
    assert third.seen == []


def test_rows_of_other_code_or_devices_are_measured_again(tmp_path, monkeypatch):
    out, todo = tmp_path / "run.json", few()[:2]
    runner.run(todo, Noting(), out=out)
    other = Noting()
    other.name = "another"
    assert len(runner.run(todo, other, out=out).rows) == len(other.seen) == 2
    monkeypatch.setattr(runner.on_device, "commit", lambda: "another")
    again = Noting()
    assert runner.run(todo, again, out=out).commit == "another"
    assert len(again.seen) == 2


def test_no_row_is_begun_when_time_is_over():
    measuring = Noting()
    assert runner.run(few(), measuring, seconds=-1.0).rows == ()
    assert measuring.seen == []
