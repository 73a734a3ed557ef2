"""What benchmarks measure: jobs, and the values that everybody computes."""

import doctest
import math

import pytest
import torch
from bench_cases import COMPOUND, CPU, LAYERS, PADDED, RIVALS, all_ops, of

from bench import jobs, kinds, runner, shapes, subjects, values
from bench.jobs import predicted_row, small
from bench.kinds import kind as kinds_of_layers
from bench.records import (
    CHANNELS_LAST,
    CONTIGUOUS,
    LINEAR,
    OPS,
    OURS,
    PADDED_CHANNELS_LAST,
    PADDED_CONTIGUOUS,
    TORCHVISION,
)
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
from triton_conv.devices import H200, INTERPRETER

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
