"""What there is to measure: an operation of a layer of a suite, and all that is known of it without measuring."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from math import isfinite, prod
from typing import Any, NamedTuple

import torch

from triton_conv import cost, explain, functional
from triton_conv.backends import default_precision
from triton_conv.devices import H200, Device
from triton_conv.explain import AnyPlan
from triton_conv.plan import Plan
from triton_conv.tuning.layers import Layer

from . import kinds, shapes
from .kinds import Kind
from .records import OPS, Row

# What plans are called in `explain.plans`, of a plain convolution.
_PLANS: dict[str, tuple[str, ...]]
_PLANS = {"fprop": ("forward",), "dgrad": ("input gradient",), "wgrad": ("weight gradient",)}
_PLANS["step"] = ("forward", "input gradient", "weight gradient")

LONG_FILTER = 100  # taps of a channel, which take a second to interpret for a few
QUICK_LAYERS = 3  # of a suite
QUICK_BYTES = 2**31  # of input, weight and output: sets of them, and of results, fit beside each other
QUICK_FLOPS = 1e12  # of one forward, for which cuDNN tries ten algorithms, some of them a hundred times slower


class Job(NamedTuple):
    """An operation of a layer; `op` is one of `records.OPS`."""

    suite: str
    name: str
    layer: Layer
    op: str

    @property
    def kind(self) -> Kind | None:
        """What the layer is, None for a plain convolution."""
        return kinds.of(self.layer)

    @property
    def dtype(self) -> str:
        return str(self.layer.options["dtype"]).removeprefix("torch.")

    @property
    def row_name(self) -> tuple[str, ...]:
        """`Row.name` of its row."""
        channels_last = str(bool(self.layer.options.get("channels_last")))
        return self.suite, self.name, self.op, words(self.layer), self.dtype, channels_last


def jobs(
    suites: Sequence[str] | None = None,
    ops: Sequence[str] = OPS,
    batch: int | None = None,
    dtype: torch.dtype | None = None,
    channels_last: bool | None = None,
    quick: bool = False,
) -> list[Job]:
    """What suites (None: all) have to measure, suite by suite and layer by layer.

        >>> [job.name for job in jobs(["resnet50"], ["fprop"], quick=True)]
        ['stage 1 expand 64>256 56x56', 'stage 3 3x3 256>256 14x14', 'stem 3>64 224x224']

    `batch`, `dtype` and `channels_last` are the suites' own where they are None; 1-D convolutions are contiguous
    whatever is asked, causal ones excepted. Layers that are more than a convolution have no gradients of their own
    beside the step, those of video in chunks no gradients at all. float32 is multiplied as PyTorch is set to at the
    call. With `quick`, only the layers of each suite on which a network spends most predicted time, those of other
    filters and strides first, and with fewer images or frames where one would not fit beside its rivals, or take them
    too long. Raises ValueError for a suite or an operation that there is not, and a batch below 1.
    """
    for op in ops:
        if op not in OPS:
            raise ValueError(f"op {op!r} is not one of {', '.join(OPS)}")
    found = []
    for suite in shapes.SUITES if suites is None else dict.fromkeys(suites):
        layers = {n: _usual(layer) for n, layer in shapes.layers(suite, batch, dtype, channels_last).items()}
        if quick:
            layers = {n: _fitting(layers[n]) for n in _heaviest(layers)}
        for name, layer in layers.items():
            found += [Job(suite, name, layer, op) for op in OPS if op in ops and op in _titles(layer)]
    return found


def _titles(layer: Layer) -> Mapping[str, tuple[str, ...]]:
    kind = kinds.of(layer)
    return _PLANS if kind is None else kind.titles(layer)


def _usual(layer: Layer) -> Layer:
    options = dict(layer.options)
    if len(layer.weight) == 3:
        options["channels_last"] = False
    if options["dtype"] is torch.float32 and not options.get("causal"):
        options.setdefault("precision", default_precision())
    return layer._replace(options=options)


def _heaviest(layers: dict[str, Layer]) -> list[str]:
    """Names of layers, by the time that their network spends there; one of each kind before a second one of any."""

    def kind(name: str) -> str:
        layer = layers[name]
        options = ("transposed", "stride", "output_padding", "padding_mode", "residual")
        known = [layer.options.get(option) for option in options]
        return f"{layer.weight[2:]} {'groups' in layer.options} {known}"

    def seconds(layer: Layer) -> float:
        plans = explain.plans(layer.input, layer.weight, device=H200, **layer.options)
        return layer.times * sum(plan.roofline.seconds for plan in plans.values())

    ordered = sorted(layers, key=lambda name: -seconds(layers[name]))
    first: dict[str, str] = {}
    for name in ordered:
        first.setdefault(kind(name), name)
    return [*first.values(), *(name for name in ordered if name not in first.values())][:QUICK_LAYERS]


def _fitting(layer: Layer) -> Layer:
    """The layer with half the images, or with half the frames of one, as often as needed."""
    while not _fits(layer):
        images, channels, *extents = layer.input
        if images == 1 and len(extents) == 3 and extents[0] > 8:
            layer = layer._replace(input=(1, channels, (extents[0] + 1) // 2, *extents[1:]))
        elif images > 1:
            layer = layer._replace(input=(images // 2, channels, *extents))
        else:
            break
    return layer


def _fits(layer: Layer) -> bool:
    item, kind = layer.options["dtype"].itemsize, kinds.of(layer)
    if kind is not None:
        flops = sum(p.roofline.flops for p in plans(Job("", "", layer, "fprop"), H200))
        size = sum(map(prod, (*kind.shapes(layer).values(), kind.output(layer))))
        return size * item <= QUICK_BYTES and flops <= QUICK_FLOPS
    g = explain.problems(layer.input, layer.weight, **layer.options)["forward"].geometry
    return sum(prod(g.shape(name)) for name in "xwy") * item <= QUICK_BYTES and g.flops <= QUICK_FLOPS


def small(job: Job) -> Job:
    """The same kind of layer with few channels and positions, which a CPU runs in well under a second.

    Filter, stride, dilation, groups of one channel or of more, padding and its modes, dtype and memory format are
    kept, and so is what channels and extents leave over vectors and strides.
    """
    if job.kind is not None and not job.kind.convolution:
        return job._replace(layer=job.kind.small(job.layer))
    options = dict(job.layer.options)
    N, C, *extents = job.layer.input
    first, second, *taps = job.layer.weight
    groups, transposed = options.get("groups", 1), options.get("transposed", False)
    if second == 1 < groups:  # depthwise: filters of a channel stay as many
        fewer = _fewer(groups, 8 if prod(taps) <= LONG_FILTER else 2)
        options["groups"], C, first = fewer, C // groups * fewer, first // groups * fewer
    else:
        fewer = min(groups, 2)
        options |= {"groups": fewer} if groups > 1 else {}
        C, first, second = (fewer * _fewer(C // groups), fewer * _fewer(first // groups), _fewer(second))
    g = next(iter(explain.problems(job.layer.input, job.layer.weight, **job.layer.options).values())).geometry
    rank = len(taps)
    walk = zip(extents, taps, g.stride[-rank:], g.dilation[-rank:], g.padding[-rank:], strict=True)
    sizes = [_shorter(*axis, transposed) for axis in walk]
    return job._replace(layer=Layer((min(N, 2), C, *sizes), (first, second, *taps), options))


def _fewer(channels: int, vector: int = 16) -> int:
    """At most a vector or two, and as many over as before."""
    over = channels % 8
    return channels if channels <= vector else (8 + over if over else vector)


def _shorter(extent: int, taps: int, stride: int, dilation: int, padding: tuple[int, int], transposed: bool) -> int:
    if transposed:
        return min(extent, 4 + extent % 2)
    reach = dilation * (taps - 1) + 1
    least = max(reach - sum(padding) + 2 * stride, 5, dilation + 3, *(p + 1 for p in padding))
    return min(extent, least + (extent - least) % (2 * stride))


def _is(name: str, title: str) -> bool:
    """Whether a plan's name is a title, or one of its parts: of a branch, or a launch."""
    return name == title or name.startswith((f"{title} of branch", f"{title}, launch"))


def plans(job: Job, device: Device) -> list[AnyPlan]:
    """Ours for what the job computes, in the order in which they run."""
    shapes_of_it, training = (job.layer.input, job.layer.weight), job.op != "fprop"
    found = explain.plans(*shapes_of_it, device=device, training=training, **job.layer.options)
    return [p for title in _titles(job.layer)[job.op] for name, p in found.items() if _is(name, title)]


def predicted_row(job: Job, device: Device) -> Row:
    """The row of a job before anything is measured.

    >>> row = predicted_row(jobs(["resnet50"], ["fprop"])[0], H200)
    >>> row.call, row.kernel, row.measured
    ('conv2d 128x3x224x224 64x3x7x7 padding 3 stride 2', 'gather', {})
    """
    found = plans(job, device)
    seconds = [_predicted(plan) for plan in found]
    return Row(
        suite=job.suite,
        layer=job.name,
        op=job.op,
        call=words(job.layer),
        dtype=job.dtype,
        channels_last=bool(job.layer.options.get("channels_last")),
        times=job.layer.times,
        flops=sum(plan.roofline.flops for plan in found),
        bytes=sum(plan.roofline.bytes for plan in found),
        roofline_seconds=sum(plan.roofline.seconds for plan in found),
        limit=max(found, key=lambda plan: plan.roofline.seconds).roofline.limit,
        predicted_seconds=None if None in seconds else sum(s for s in seconds if s is not None),
        kernel=", ".join(plan.kernel for plan in found),
        config=", ".join(str(plan.config) for plan in found),
        workspace_bytes=max(plan.workspace_bytes for plan in found),
        reason=", ".join(str(getattr(plan, "reason", "")) or "one kernel for all" for plan in found),
        separate_predicted_seconds=None if job.kind is None else job.kind.separate_seconds(job.layer, job.op, device),
    )


def _predicted(plan: AnyPlan) -> float | None:
    modelled = not isinstance(plan, Plan) or plan.kernel in cost.TILES
    return plan.seconds if modelled and isfinite(plan.seconds) else None


def words(layer: Layer) -> str:
    """A call in one line, without what is usual in it, dtype and memory format."""
    options, kind = layer.options, kinds.of(layer)
    name = f"conv{'_transpose' * bool(options.get('transposed'))}{len(layer.weight) - 2}d"
    usual: dict[str, Any] = {n: p.default for n, p in inspect.signature(functional.conv2d).parameters.items()}
    usual |= {"transposed": options.get("transposed"), "causal": options.get("causal"), "activation": None}
    usual |= {"dtype": options.get("dtype"), "channels_last": options.get("channels_last"), "output_padding": 0}
    given = options if kind is None else kind.said(layer)
    said = [f"{n} {explain.written(v)}" for n, v in given.items() if n not in usual or v != usual[n]]
    sizes = ["x".join(map(str, shape)) for shape in (layer.input, layer.weight)]
    return " ".join([name if kind is None else kind.call(layer), *sizes, *said])
