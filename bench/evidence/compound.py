"""Layers that are more than a convolution, a small one of every kernel and way: values of ours against float64."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from math import prod
from typing import Any
from unittest import mock

import torch

from triton_conv import activation_plan, branches, branches_plan, check, config, deform_plan, fast, streaming_plan
from triton_conv.devices import Device
from triton_conv.explain import AnyPlan
from triton_conv.plan import Plan
from triton_conv.tuning.layers import LAYERS, Layer

from .. import kinds, values
from ..device_meter import multiplying
from ..jobs import LONG_FILTER, Job, plans, small
from ..subjects import results, subjects
from . import checking
from .checking import Compiler
from .record import Facts
from .units import Context

_BF16, _FP16 = ({"dtype": dtype, "channels_last": True} for dtype in (torch.bfloat16, torch.float16))
_FP32 = {**_BF16, "dtype": torch.float32}
_RELU = {"bias": True, "activation": "relu"}
_DEFORM = {"deform": True, "mask": True, "padding": 1}


def _pyramid(channels: int) -> tuple[Any, ...]:
    dilated = [((channels, channels, 3, 3), {"padding": rate, "dilation": rate}) for rate in (2, 5)]
    return (((channels, channels, 1, 1), {}), *dilated)


_OWN = {
    "relu, residual": Layer((4, 64, 28, 28), (64, 64, 3, 3), {**_BF16, **_RELU, "padding": 1, "residual": "before"}),
    "silu, scale": Layer((4, 64, 28, 28), (128, 64, 1, 1), {**_FP16, "activation": "silu", "scale": True}),
    "gelu, residual after, contiguous": Layer(
        (4, 33, 19, 21),
        (17, 33, 3, 3),
        {**_FP32, "channels_last": False, "precision": "ieee", "activation": "gelu", "residual": "after"},
    ),
    "hardswish, depthwise": Layer(
        (4, 64, 28, 28), (64, 1, 3, 3), {**_BF16, "groups": 64, "padding": 1, "bias": True, "activation": "hardswish"}
    ),
    "relu, depthwise 21x21": Layer((4, 64, 28, 28), (64, 1, 21, 21), {**_FP16, **_RELU, "groups": 64, "padding": 10}),
    "relu, strided video": Layer((2, 32, 8, 14, 14), (48, 32, 3, 3, 3), {**_BF16, **_RELU, "padding": 1, "stride": 2}),
    "branches": Layer((4, 64, 28, 28), (64, 64, 1, 1), {**_BF16, "branches": _pyramid(64)}),
    "branches contiguous": Layer(
        (4, 20, 17, 19), (20, 20, 1, 1), {**_FP32, "channels_last": False, "branches": _pyramid(20)}
    ),
    "branches summed": Layer((4, 64, 28, 28), (64, 64, 1, 1), {**_FP16, "branches": _pyramid(64), "combine": "sum"}),
    "deform": Layer((2, 64, 25, 42), (64, 64, 3, 3), {**_FP16, **_DEFORM}),
    "deform bfloat16, stride 2": Layer((2, 48, 25, 42), (96, 48, 3, 3), {**_BF16, **_DEFORM, "stride": 2}),
    "deform float32, contiguous, without mask": Layer(
        (2, 32, 19, 21), (32, 16, 3, 3), {**_FP32, **_DEFORM, "channels_last": False, "mask": False}
    ),
    "deform, offset groups": Layer((2, 64, 25, 42), (64, 64, 3, 3), {**_FP16, **_DEFORM, "offset_groups": 4}),
    "chunk of video": Layer((1, 96, 4, 30, 52), (96, 96, 3, 3, 3), {**_BF16, "padding": 1, "context": 2}),
    "chunk of one frame, reflected": Layer(
        (1, 128, 1, 16, 24), (64, 128, 3, 3, 3), {**_BF16, "padding": 1, "context": 2, "padding_mode": "reflect"}
    ),
    "chunk of video, in time alone": Layer((1, 96, 4, 30, 52), (192, 96, 3, 1, 1), {**_FP16, "context": 2}),
}


def jobs() -> list[Job]:
    """Every operation of every layer: those here, and those that the audit reads."""
    layers = _OWN | {name: layer for name, layer in LAYERS.items() if compound(layer)}
    found = []
    for name, layer in layers.items():
        kind = kinds.of(layer)
        assert kind is not None
        found += [Job("evidence", name, layer, op) for op in kind.titles(layer)]
    return found


def compound(layer: Layer) -> bool:
    """Whether a layer is of a kind that is checked here: causal and separable ones have references of their own."""
    return kinds.of(layer) is not None and not {"causal", "pointwise"} & layer.options.keys()


def few(device: Device) -> Iterator[Job]:
    """Small ones of `jobs`, each with a kernel that those before it have not."""
    seen: set[tuple[type, str]] = set()
    for job in jobs():
        if prod(job.layer.weight[2:]) > LONG_FILTER:
            continue
        less = small(job)
        there = {(type(job.kind), p.kernel) for p in plans(less, device)}
        if there - seen:
            seen |= there
            yield less


def planned(job: Job, device: Device, warps: int = 0) -> list[AnyPlan]:
    """What a job runs, with so many warps where they are given. Raises RuntimeError where there are none."""
    with twins(job, device, warps):
        return plans(job, device)


def family(job: Job, device: Device) -> str:
    """By what kernels are told apart that hang: others than those of plain convolutions by the same name."""
    return f"{type(job.kind).__name__.lower()} {plans(job, device)[0].kernel}, {job.op}"


def compared(job: Job, context: Context, compiler: Compiler, name: str, warps: int = 0) -> Facts:
    """Facts of a unit: whether our results are right, with so many warps where they are given."""
    with twins(job, compiler.device, warps):
        errors, notes = compiler.compiled(name)
        facts: Facts = {"kernel": kernels(job, compiler.device), "call": str(job.layer)}
        facts |= {"code": notes + errors} if notes + errors else {}
        if checking.deadly(errors):
            return {"ok": False, "words": f"does not compile: {'; '.join(errors)}", **facts}
        with checking.watched(context):
            share, wrong = _share(job, context)
    words = f"{facts['kernel']}, worst error {share:.0%} of what rounding allows"
    return {"ok": not wrong, "words": wrong or words, "share": share, **facts}


def kernels(job: Job, device: Device) -> str:
    """Of a job, in the order in which they run."""
    return ", ".join(dict.fromkeys(p.kernel for p in plans(job, device)))


def _share(job: Job, context: Context) -> tuple[float, str]:
    with multiplying(job):
        (ours,) = subjects(job, ())
        t = values.operands(job, ours.channels_last, context.device, seed=0)
        with check.poisoned():
            found = ours.prepared(t)()
        return values.checked(job, ours, found, values.wanted(job, t, results(job)))


@contextmanager
def twins(job: Job, device: Device, warps: int) -> Iterator[None]:
    """Within it, kernels of a job have so many warps; 0: as they ship."""
    if not warps:
        yield
        return
    rooms: Sequence[Any] = (activation_plan, branches_plan, deform_plan, streaming_plan)
    wider = {p.role: replace(p.config, num_warps=warps) for p in plans(job, device) if isinstance(p, Plan)}
    fast.forget()
    with ExitStack() as stack:
        if job.kind is not None and job.kind.convolution:
            stack.enter_context(config.explicit(wider))
        for room in rooms:
            stack.enter_context(mock.patch.object(room, "make", _twin(room.make, warps)))
        stack.enter_context(mock.patch.object(branches, "_make", _twin(branches._make, warps)))
        try:
            yield
        finally:
            fast.forget()


def _twin(make: Any, warps: int) -> Any:
    def made(problem: Any) -> Any:
        p = make(problem)
        return replace(p, config=replace(p.config, num_warps=warps))

    return made
