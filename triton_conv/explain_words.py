"""What `explain` says beside plans: the call in one line, what is saved for backward, predicted times."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import prod
from typing import Any

import torch

from . import activation, cost
from .activation_plan import ActivationPlan
from .branches_plan import BranchesPlan
from .causal_plan import CausalPlan
from .deform_plan import DeformPlan
from .devices import Device
from .epilogue import Epilogue
from .plan import Plan
from .separable_plan import SeparablePlan
from .streaming_plan import StreamingPlan

AnyPlan = Plan | CausalPlan | SeparablePlan | ActivationPlan | BranchesPlan | DeformPlan | StreamingPlan


def of_kind(
    input_shape: Sequence[int],
    weight_shape: Sequence[int],
    shown: Mapping[str, AnyPlan],
    dtype: torch.dtype,
    channels_last: bool,
    bias: bool,
    device: Device,
    parameters: Mapping[str, Any],
) -> list[str]:
    """The first lines about a convolution that is more than one call of `conv2d` and the like."""
    first = next(iter(shown.values()))
    words, rest = [f"input {sizes(input_shape)} weight {sizes(weight_shape)}"], dict(parameters)
    notes = []
    if rest.pop("causal", False):
        return [f"causal_conv1d {first.asked} {written(dtype)} on {device.name}"]
    if rest.get("pointwise") is not None:
        both = f"{sizes(input_shape)}, depthwise {sizes(weight_shape)}, pointwise {rest['pointwise']}"
        return [f"separable convolution {both} {written(dtype)} on {device.name}"]
    if rest.pop("deform", False):
        words.insert(0, "deform_conv2d")
        words.append("with mask" if rest.pop("mask", True) else "without mask")
        notes.append("Saved for backward: input, offset, weight and mask, no samples; these are computed anew.")
    elif rest.get("branches"):
        words = [f"multi_conv2d input {sizes(input_shape)}"]
        for number, (shape, how) in enumerate(rest.pop("branches")):
            more = " ".join(f"{name} {written(value)}" for name, value in how.items())
            notes.append(f"branch {number}: weight {sizes(shape)} {more}".rstrip())
        notes.append("Saved for backward: the input, once for all branches, and the weights.")
    else:
        words.insert(0, f"causal_conv{len(weight_shape) - 2}d")
        frames = rest.pop("context")
        words.append("at a beginning" if frames is None else f"context of {frames} frames")
        notes.append("Saved for backward: input, context and weight.")
    words.append(written(dtype))
    words += [word for word, given in (("channels_last", channels_last), ("bias", bias)) if given]
    words += [f"{name} {written(value)}" for name, value in rest.items()]
    return [f"{' '.join(words)} on {device.name}", *notes]


def saved(parameters: Mapping[str, Any], output_shape: Sequence[int], dtype: torch.dtype) -> list[str]:
    """What a convolution with an epilogue saves for its backward pass; nothing without one."""
    name, residual = parameters.get("activation"), parameters.get("residual")
    if not (name or residual or parameters.get("scale")):
        return []
    words = ["input", "weight", *(["scale"] if parameters.get("scale") else [])]
    if name and of_output(parameters):
        words.append("the output, which costs nothing where the next layer keeps its input")
    elif name:
        size = with_prefix(prod(output_shape) * dtype.itemsize)
        words.append(f"what {name} is applied to, {size}B more, written by the same kernel")
    return [f"Saved for backward: {', '.join(words)}."]


def of_output(parameters: Mapping[str, Any]) -> bool:
    """Whether the gradient of an activation is told from what the convolution returns."""
    slope = parameters.get("negative_slope", Epilogue().slope)
    return activation.tells_gradient(parameters["activation"], slope) and parameters.get("residual") != "after"


def times(p: AnyPlan) -> str:
    """The least time that the device allows, and the predicted or measured one, in two lines."""
    least = p.roofline
    scaled = f", numbers {p.device.source}" if p.device.source.startswith("scaled") else ""
    moved = f"{with_prefix(least.flops)}FLOP, {with_prefix(least.bytes)}B"
    limit = f"roofline   {moved}: at least {with_prefix(least.seconds)}s, by {least.limit}{scaled}"
    if isinstance(p, CausalPlan):
        share = f"{least.seconds / p.seconds:.0%} of that limit, most of it by {p.limit}"
        programs = f"programs {p.prediction.tiles}, waves {p.prediction.waves}"
        return f"{limit}\ntime       {with_prefix(p.seconds)}s predicted, not measured: {share}; {programs}"
    if isinstance(p, Plan) and p.kernel not in cost.TILES:
        return f"{limit}\ntime       not predicted: there is no model of this kernel"
    kernel, words, seconds = p.prediction, f"{with_prefix(p.seconds)}s predicted, not measured", p.seconds
    measured = getattr(p, "measured_seconds", None)
    if measured is not None:
        around = ", copies around it predicted" if _has_more(p) else ""
        words, seconds = f"{with_prefix(measured)}s measured{around}, {with_prefix(p.seconds)}s predicted", measured
    share = f"{least.seconds / seconds:.0%} of that limit"
    tiles = f"tiles {kernel.tiles}, waves {kernel.waves}, {kernel.useful:.0%} of the products useful"
    return f"{limit}\ntime       {words}: {share}; {tiles}; bound by {kernel.limit}"


def _has_more(p: AnyPlan) -> bool:
    """Whether there is more to a plan than the kernel that is measured."""
    if isinstance(p, BranchesPlan):
        return bool(p.moves or p.packs)
    return isinstance(p, Plan) and bool(p.packs or p.fold)


def with_prefix(value: float) -> str:
    """Three digits, a space and the unit's prefix: "59.2 G"."""
    for scale, prefix in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"), (1, ""), (1e-3, "m"), (1e-6, "u")):
        if value >= scale:
            return f"{value / scale:.3g} {prefix}"
    return f"{value / 1e-9:.3g} n"


def sizes(shape: Sequence[int]) -> str:
    return "x".join(map(str, shape))


def written(value: Any) -> str:
    """A parameter as the console script takes it: 2,1 or 2:0,1."""
    if isinstance(value, (tuple, list)):
        return ",".join(":".join(map(str, v)) if isinstance(v, (tuple, list)) else str(v) for v in value)
    return str(value).removeprefix("torch.")
