"""What benchmarks measure, in the interpreter and by a clock that is none."""

import doctest
import math
from types import SimpleNamespace

import pytest
import torch
from test_measure import FakeClock

from bench import ceilings, device_meter, jobs, kinds, records, runner, shapes, subjects, values
from bench.device_meter import CudaProbe, DeviceMeter
from bench.jobs import Job, predicted_row, small
from bench.kinds import kind as kinds_of_layers
from bench.meters import PredictedMeter, SimulatedMeter
from bench.records import (
    CAT_CHANNELS_LAST,
    CAT_CONTIGUOUS,
    CHANNELS_LAST,
    COMPILED,
    COMPOSED,
    CONTIGUOUS,
    LINEAR,
    OPS,
    OURS,
    PADDED_CHANNELS_LAST,
    PADDED_CONTIGUOUS,
    POINTWISE_CHANNELS_LAST,
    POINTWISE_CONTIGUOUS,
    SEPARATE_CHANNELS_LAST,
    SEPARATE_CONTIGUOUS,
    TORCHVISION,
)
from bench.subjects import DEFAULT
from triton_conv import (
    activation_plan,
    branches_plan,
    deform_plan,
    execute,
    explain,
    fast,
    plan,
    streaming_plan,
)
from triton_conv.devices import A100, H200, INTERPRETER
from triton_conv.tuning import audit, rounds
from triton_conv.tuning.layers import Layer

CPU = torch.device("cpu")
FLOAT32 = {"dtype": torch.float32, "channels_last": True, "padding": 1}
LAYERS = {
    "plain": Layer((2, 5, 6, 7), (4, 5, 3, 3), {**FLOAT32, "stride": 2}),
    "grouped": Layer((2, 4, 6, 7), (4, 2, 3, 3), {**FLOAT32, "groups": 2, "channels_last": False}),
    "circular": Layer((2, 3, 6, 7), (4, 3, 3, 3), {**FLOAT32, "padding_mode": ("zeros", "circular")}),
    "reflect": Layer((2, 3, 6, 7), (4, 3, 3, 5), {**FLOAT32, "padding": (1, 2), "padding_mode": "reflect"}),
    "causal video": Layer(
        (1, 3, 4, 5, 6),
        (4, 3, 3, 3, 3),
        {**FLOAT32, "padding": ((2, 0), 1, 1), "padding_mode": ("replicate", "zeros", "zeros")},
    ),
    "transposed": Layer(
        (2, 4, 4, 5), (4, 3, 3, 3), {**FLOAT32, "transposed": True, "stride": 2, "output_padding": (1, 0)}
    ),
    "audio": Layer((2, 3, 9), (4, 3, 2), {**FLOAT32, "padding": ((4, 0),), "dilation": 4, "channels_last": False}),
    "strided audio": Layer((2, 3, 9), (4, 3, 3), {**FLOAT32, "stride": 2, "channels_last": False}),
    "patches": Layer((2, 3, 6, 8), (4, 3, 3, 2), {**FLOAT32, "padding": 0, "stride": (3, 2)}),
    "contiguous patches": Layer(
        (2, 3, 4, 6, 8), (4, 3, 2, 3, 2), {**FLOAT32, "padding": 0, "stride": (2, 3, 2), "channels_last": False}
    ),
    "causal": Layer((2, 6, 9), (6, 4), {"causal": True, "dtype": torch.float32, "channels_last": True}),
    "causal silu": Layer(
        (2, 6, 9), (6, 3), {"causal": True, "dtype": torch.float32, "channels_last": False, "activation": "silu"}
    ),
}
PYRAMID = (((4, 6, 1, 1), {}), ((3, 6, 3, 3), {"padding": 2, "dilation": 2}))
COMPOUND = {
    "relu and shortcut": Layer(
        (2, 5, 6, 7), (4, 5, 3, 3), {**FLOAT32, "bias": True, "activation": "relu", "residual": "before"}
    ),
    "silu, scale, residual after": Layer(
        (2, 5, 6, 7), (4, 5, 3, 3), {**FLOAT32, "activation": "silu", "scale": True, "residual": "after", "stride": 2}
    ),
    "branches": Layer((2, 6, 6, 7), (4, 6, 1, 1), {"dtype": torch.float32, "channels_last": True, "branches": PYRAMID}),
    "deform": Layer((2, 6, 6, 7), (4, 3, 3, 3), {**FLOAT32, "deform": True, "mask": True, "offset_groups": 2}),
    "chunk": Layer((1, 4, 2, 5, 6), (3, 4, 3, 3, 3), {**FLOAT32, "context": 2, "padding_mode": "reflect"}),
}
LAYERS |= COMPOUND
RIVALS = {
    "branches": {SEPARATE_CONTIGUOUS, SEPARATE_CHANNELS_LAST},
    "deform": {COMPOSED},
    "chunk": {CAT_CONTIGUOUS, CAT_CHANNELS_LAST},
    **{name: {POINTWISE_CONTIGUOUS, POINTWISE_CHANNELS_LAST} for name in list(COMPOUND)[:2]},
}
PADDED = ("circular", "reflect", "causal video", "audio")


class FakeProbe(FakeClock):
    """A clock whose time goes on with each question, and memory that work takes."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.moment, self.peaks = 0.0, 0

    def now(self):
        self.moment += 1e-3
        return self.moment

    def peak_bytes(self, work):
        work()
        self.peaks += 1
        return 100


def of(name, op="fprop"):
    return Job("suite", name, LAYERS[name], op)


def all_ops(name):
    kind = kinds.of(LAYERS[name])
    return [of(name, op) for op in (OPS if kind is None else kind.titles(LAYERS[name]))]


def meter(probe=None, who=None, l2_bytes=2**12):
    return DeviceMeter(CPU, INTERPRETER._replace(l2_bytes=l2_bytes), probe or FakeProbe(), who)


# ---------------------------------------------------------------------------------------------------------------------
# Jobs


def test_examples():
    for module in (jobs, runner, kinds_of_layers):
        assert doctest.testmod(module).failed == 0
        assert doctest.testmod(module).attempted > 0


def test_suites_have_all_that_was_promised():
    found = jobs.jobs()
    said = {job.suite: set() for job in found}
    for job in found:
        said[job.suite].add(jobs.words(job.layer))
    assert set(said) == set(shapes.SUITES)
    assert {job.layer.input[0] for job in found if job.suite.startswith("resnet50")} == {1, 128}
    for suite in ("resnet50", "resnet50_batch1"):
        assert len(said[suite]) == 23
    for dilation in (6, 12, 18, 24):
        for channels, size in ((2048, 33), (256, 33), (2048, 65), (256, 65)):
            start = f"conv2d 16x{channels}x{size}x{size} 256x{channels}x3x3 padding {dilation} dilation {dilation}"
            assert start in said["aspp"]
    for kind in ("x2x2 stride 2", "x4x4 stride 2 padding 1", "x3x3 stride 2 padding 1 output_padding 1"):
        assert any(call.startswith("conv_transpose2d") and call.endswith(kind) for call in said["upsampling"])
    assert any("padding 2:0,1,1" in call for call in said["wan_vae"])
    assert any("replicate" in call for call in said["ltx_vae"])
    assert any("circular" in call for call in said["circular"])
    assert all(call.startswith("causal_conv1d") for call in said["mamba"])
    shortcut = "conv2d 128x64x56x56 256x64x1x1 residual before bias True activation relu"
    assert shortcut in said["resnet50_fused"]
    pyramid = " + ".join(f"256x320x3x3 padding {rate} dilation {rate}" for rate in (12, 24, 36))
    call = f"multi_conv2d 16x320x65x65 256x320x1x1 branches 256x320x1x1 + {pyramid} combine concatenate"
    assert call in said["aspp_branches"]
    call = "deform_conv2d 2x256x50x84 256x256x3x3 offset_groups 1 mask True padding 1"
    assert call in said["dcnv2_resnet50"]
    assert "causal_conv3d 1x96x1x1024x1024 96x96x3x3x3 padding 1 context 2" in said["qwen_image"]
    assert any(call.endswith("padding 1 context 2 padding_mode reflect") for call in said["ltx_streaming"])


def test_jobs_are_named_as_their_rows():
    found = jobs.jobs(["mamba", "upsampling", "wavenet"], ["fprop", "step"])
    assert len({job.row_name for job in found}) == len(found)
    for job in found:
        row = predicted_row(job, H200)
        assert row.name == job.row_name
        assert row.flops > 0
        assert row.bytes > 0
        assert row.predicted_seconds > row.roofline_seconds > 0
        assert row.kernel
        assert row.config
        assert row.reason


def test_a_step_is_its_three_parts():
    parts = [predicted_row(job, H200) for job in jobs.jobs(["circular"], ["fprop", "dgrad", "wgrad"])[:3]]
    (step,) = [predicted_row(job, H200) for job in jobs.jobs(["circular"], ["step"])[:1]]
    assert step.flops == sum(row.flops for row in parts)
    assert step.bytes == sum(row.bytes for row in parts)
    assert step.predicted_seconds == pytest.approx(sum(row.predicted_seconds for row in parts))
    assert step.kernel == ", ".join(row.kernel for row in parts)
    assert step.workspace_bytes == max(row.workspace_bytes for row in parts)


def _first(suite):
    return next(iter(shapes.SUITES[suite].layers.values()))


def test_quick_jobs_are_few_of_every_suite_and_kind():
    found = jobs.jobs(quick=True)
    for suite in shapes.SUITES:
        kind = kinds.of(_first(suite))
        assert {job.op for job in found if job.suite == suite} == set(OPS if kind is None else kind.plans)
        assert 2 <= len({job.name for job in found if job.suite == suite}) <= jobs.QUICK_LAYERS
    assert {job.layer.weight[2:] for job in found if job.suite == "wan_vae"} == {(3, 3, 3), (3, 3), (3, 1, 1)}
    assert len(found) < 300


def test_jobs_at_another_batch_dtype_and_memory_format():
    found = jobs.jobs(["resnet50", "wavenet"], ["dgrad"], batch=2, dtype=torch.float32, channels_last=True)
    assert {job.layer.input[0] for job in found} == {2}
    assert {job.dtype for job in found} == {"float32"}
    assert all("precision" in job.layer.options for job in found)
    assert all(job.layer.options["channels_last"] == (job.suite == "resnet50") for job in found)
    for bad in ({"ops": ["backward"]}, {"suites": ["resnet"]}, {"batch": 0}):
        with pytest.raises(ValueError, match=r"op 'backward'|suite 'resnet'|batch 0"):
            jobs.jobs(**bad)


def test_layers_that_do_not_fit_have_fewer_images(monkeypatch):
    monkeypatch.setattr(jobs, "QUICK_BYTES", 2**24)
    found = jobs.jobs(["resnet50", "mamba"], ["fprop"], quick=True)
    assert all(values.bytes_of(job) <= 2**24 for job in found if job.suite == "resnet50")
    assert all(job.layer.input[0] < 128 for job in found)
    monkeypatch.undo()
    frames = {job.layer.input[2] for job in jobs.jobs(["ltx_vae"], ["fprop"], quick=True)}
    assert frames == {8, 31}
    assert {job.layer.input[2] for job in jobs.jobs(["ltx_vae"], ["fprop"])} > {121, 61}


def test_small_layers_are_small_and_of_the_same_kind():
    for job in jobs.jobs(ops=["fprop"]):
        less = small(job)
        assert all(math.prod(shape) < 40_000 for shape in values.shapes(less).values())
        assert job.layer.weight[2:] == less.layer.weight[2:]
        assert set(less.layer.options) == set(job.layer.options)
        same = [k for k in job.layer.options if k not in ("groups", "branches")]
        assert all(less.layer.options[k] == job.layer.options[k] for k in same)
        assert (less.kind is None) == (job.kind is None)
        if job.kind is None or job.kind.convolution:
            few, many = (
                explain.problems(j.layer.input, j.layer.weight, **j.layer.options)["forward"].geometry
                for j in (less, job)
            )
            assert (few.groups == 1, few.groups == few.C) == (many.groups == 1, many.groups == many.C)
            assert (few.C // few.groups) % 8 == 0 or (many.C // many.groups) % 8 != 0
            for few_extent, extent, stride in zip(few.input, many.input, few.stride, strict=True):
                assert few_extent % stride == extent % stride


# ---------------------------------------------------------------------------------------------------------------------
# Values


@pytest.mark.parametrize("name", LAYERS)
def test_everybody_computes_the_same(name):
    for job in all_ops(name):
        found = subjects.subjects(job)
        padded = name in PADDED
        others = {PADDED_CONTIGUOUS, PADDED_CHANNELS_LAST} if padded else {CONTIGUOUS, CHANNELS_LAST}
        others = RIVALS.get(name, others) | ({LINEAR} if "patches" in name else set())
        assert {s.who for s in found} - {TORCHVISION} == {OURS, *others}
        for subject in found:
            t = values.operands(job, subject.channels_last, CPU, seed=1)
            results = subject.prepared(t)()
            wants = values.wanted(job, t, subjects.results(job))
            error, wrong = values.checked(job, subject, results, wants)
            assert not wrong, (subject.who, job.op, wrong)
            assert error < 1


@pytest.mark.parametrize("name", LAYERS)
def test_plans_are_those_that_were_predicted(name, kernels):
    """Operands lie as `explain` lays them out, so that what was compiled ahead is what runs."""
    for job in all_ops(name):
        if job.kind is not None:
            continue
        (subject,) = subjects.subjects(job, ())
        t = values.operands(job, subject.channels_last, CPU, seed=1)
        with execute.problems() as seen:
            subject.prepared(t)()
        titles = jobs._PLANS[job.op]
        shown = explain.problems(job.layer.input, job.layer.weight, device=INTERPRETER, **job.layer.options)
        assert list(seen) == [shown[title] for title in titles]


@pytest.mark.parametrize("name", COMPOUND)
def test_plans_of_several_kernels_are_those_that_were_predicted(name, kernels, monkeypatch):
    made = []
    for room in (activation_plan, branches_plan, deform_plan, plan, streaming_plan):
        monkeypatch.setattr(room, "make", lambda *a, whole=room.make: made.append(whole(*a)) or made[-1])
    both = kinds.of(LAYERS[name]).convolution  # inference keeps less than training
    for job in all_ops(name)[0 if both else -1 :]:
        (subject,) = subjects.subjects(job, ())
        t = values.operands(job, subject.channels_last, CPU, seed=1)
        fast.forget()
        made.clear()
        subject.prepared(t)()
        assert set(jobs.plans(job, INTERPRETER)) <= set(made)


def test_operands_are_the_same_in_both_memory_formats_and_surrounded():
    for name in ("plain", "audio", "causal", "causal video", *COMPOUND):
        one, other = (values.operands(of(name), last, CPU, seed=3) for last in (False, True))
        for a, b in zip((*one.named.values(), one.dy), (*other.named.values(), other.dy), strict=True):
            assert torch.equal(a, b)
            assert a.data_ptr() % 16 == b.data_ptr() % 16 == 0
            flat = torch.empty(0).set_(b.untyped_storage())
            assert flat.isnan().sum() == flat.numel() - b.numel() > 0
        assert one.x.is_contiguous()
        assert other.x.stride(1) == 1
        assert not torch.equal(values.operands(of(name), False, CPU, seed=4).x, one.x)


def test_wrong_values_are_told_in_words():
    job = of("plain", "step")
    ours = subjects.subjects(job, ())[0]
    t = values.operands(job, True, CPU, seed=1)
    wants = values.wanted(job, t, ("y", "dx", "dw"))
    y, dx, dw = ours.prepared(t)()
    off = dx.clone()
    off[0, 0, 0, 0] += 0.1
    error, words = values.checked(job, ours, (y, off, dw), wants)
    assert error > 1
    assert words.startswith("wrong: 1 of 420 elements of dx")
    off[0, 0, 0, 0] = torch.nan
    assert values.checked(job, ours, (y, off, dw), wants)[0] == math.inf
    assert "is of size" in values.checked(job, ours, (y, dx[:1], dw), wants)[1]


def test_only_what_rounds_between_may_round_twice():
    job = of("circular", "dgrad")
    job = job._replace(layer=job.layer._replace(options={**job.layer.options, "dtype": torch.bfloat16}))
    ours, padded, _ = subjects.subjects(job)
    want = values.expected(job, values.operands(job, True, CPU, seed=1), "dx")
    twice = (want + 0.03).to(torch.bfloat16)
    assert values.share(job, ours, "dx", twice, want)[0] > 1
    assert values.share(job, padded, "dx", twice, want)[0] < 1


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
