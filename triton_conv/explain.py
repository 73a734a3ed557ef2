"""Which kernel runs a convolution and why, from shapes alone."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch

from . import (
    activation,
    activation_plan,
    branches,
    causal,
    config,
    cost,
    deform,
    execute,
    functional,
    plan,
    separable,
    streaming,
)
from .activation_plan import ActivationPlan, ActivationProblem
from .branches_plan import BranchesPlan
from .causal_plan import CausalPlan
from .config import Device
from .deform_plan import DeformPlan
from .epilogue import Epilogue
from .separable_plan import SeparablePlan
from .streaming_plan import StreamingPlan

AnyPlan = plan.Plan | CausalPlan | SeparablePlan | ActivationPlan | BranchesPlan | DeformPlan | StreamingPlan

_NAMES = ("forward", "input gradient", "weight gradient")
# What those of a transposed convolution are of the convolution whose input gradient it is.
_OF_THE_CONVOLUTION = (
    "input gradient of the convolution",
    "the convolution itself",
    "weight gradient of the convolution",
)
_CHANNELS_LAST = {2: torch.channels_last, 3: torch.channels_last_3d}


def plans(
    input_shape: Sequence[int],
    weight_shape: Sequence[int],
    *,
    transposed: bool = False,
    dtype: torch.dtype = torch.float32,
    channels_last: bool = False,
    bias: bool = False,
    device: Device = config.DEVICES["H200"],
    training: bool = True,
    **parameters: Any,
) -> Mapping[str, AnyPlan]:
    """The plans of a convolution and, for dtypes that have them, of its two gradients; needs no GPU.

        >>> p = plans((8, 64, 56, 56), (128, 64, 3, 3), padding=1, dtype=torch.bfloat16)
        >>> list(p)
        ['forward', 'input gradient', 'weight gradient']

    The rank is that of `weight_shape`; `parameters` are those of `triton_conv.conv2d` or `conv_transpose2d`
    (stride, padding, dilation, groups, padding_mode, precision, ...), whose errors this raises too. With the dtype
    float8_e4m3fn they are those of `scaled_conv2d`, with int8 and an `out_dtype` of int32 those of `int_conv2d`.
    Without `training` no gradient is asked for: the plan is that of inference, which keeps nothing for one.
    `channels_last` lays out input and weight so; `device` is the one that plans are for. A complex convolution shows
    the plan of the four real ones it is made of. With `causal` the plans are those of `causal_conv1d`, of its gradients
    and of `causal_conv1d_update`; the parameters are then `activation` and `initial_state`, whether there is one.
    With `pointwise`, a number of output channels, they are those of a separable convolution for inference: both in one
    kernel, then one after the other. `residual` is "before" or "after" the activation, `scale` whether there is one;
    with an activation there is the plan of its gradient as well. With `deform` they are those of `deform_conv2d`,
    with `branches` those of `multi_conv2d`, with `context`, a number of frames, those of `causal_conv3d`.
    """
    if parameters.get("pointwise") is not None:
        return _separable_plans(input_shape, weight_shape, transposed, dtype, channels_last, bias, device, **parameters)
    if parameters.pop("causal", False):
        return _causal_plans(input_shape, weight_shape, transposed, dtype, channels_last, bias, device, **parameters)
    how: dict[str, Any] = {"dtype": dtype, "channels_last": channels_last, "bias": bias, "device": device}
    if parameters.pop("deform", False):
        return deform.plans(input_shape, weight_shape, **how, **parameters)
    if parameters.get("branches"):
        return branches.plans(input_shape, weight_shape, **how, **parameters)
    if "context" in parameters:
        return streaming.plans(input_shape, weight_shape, **how, **parameters)
    traced = (input_shape, weight_shape, transposed, dtype, channels_last, bias, parameters, training)
    shape, calls = _traced(*traced)
    found: dict[str, Any] = dict(_plans(calls, device))
    if parameters.get("activation") and len(calls) > 1:
        found["activation gradient"] = _activation_plan(shape.numel(), parameters, dtype, device)
    return found


def problems(
    input_shape: Sequence[int],
    weight_shape: Sequence[int],
    *,
    transposed: bool = False,
    dtype: torch.dtype = torch.float32,
    channels_last: bool = False,
    bias: bool = False,
    device: Device = config.DEVICES["H200"],
    **parameters: Any,
) -> dict[str, plan.Problem]:
    """What `plans` are made from, by the same names; not for causal and separable convolutions.

    >>> problems((8, 64, 56, 56), (128, 64, 3, 3), padding=1)["forward"].dtype
    'float32'
    """
    _, calls = _traced(input_shape, weight_shape, transposed, dtype, channels_last, bias, parameters)
    return _problems(calls, device)


def text(
    input_shape: Sequence[int],
    weight_shape: Sequence[int],
    *,
    transposed: bool = False,
    dtype: torch.dtype = torch.float32,
    channels_last: bool = False,
    bias: bool = False,
    device: Device = config.DEVICES["H200"],
    **parameters: Any,
) -> str:
    """The call in one line, then its `plans`, each under a title that says what it computes, and what time they take.

    That time is the measured one where the config was measured for this very size, else predicted by
    `triton_conv.cost`, and compared with the least that the device's data sheet allows.
    """
    if parameters.pop("causal", False):
        how = (transposed, dtype, channels_last, bias, device)
        shown = _causal_plans(input_shape, weight_shape, *how, **parameters)
        lines = [f"causal_conv1d {shown['forward'].asked} {written(dtype)} on {device.name}"]
        for title, causal_one in shown.items():
            lines += [f"\n{title}", str(causal_one), _times(causal_one)]
        return "\n".join(lines)
    if parameters.get("pointwise") is not None:
        how = (transposed, dtype, channels_last, bias, device)
        both = _separable_plans(input_shape, weight_shape, *how, **parameters)
        sizes = f"{'x'.join(map(str, input_shape))}, depthwise {'x'.join(map(str, weight_shape))}"
        lines = [
            f"separable convolution {sizes}, pointwise {parameters['pointwise']} {written(dtype)} on {device.name}"
        ]
        for title, p in both.items():
            lines += [f"\n{title}", str(p), _times(p)]
        return "\n".join(lines)
    name = _name(weight_shape, transposed, dtype, parameters.get("out_dtype"))
    output_shape, calls = _traced(input_shape, weight_shape, transposed, dtype, channels_last, bias, parameters)
    shapes = {"input": input_shape, "weight": weight_shape, "output": output_shape}
    words = [name, *(f"{operand} {'x'.join(map(str, shape))}" for operand, shape in shapes.items())]
    words.append(written(dtype))
    words += [word for word, given in (("channels_last", channels_last), ("bias", bias)) if given]
    defaults = inspect.signature(getattr(functional, name)).parameters
    for parameter, value in parameters.items():
        if parameter not in defaults or written(value) != written(defaults[parameter].default):
            words.append(f"{parameter} {written(value)}")
    lines = [f"{' '.join(words)} on {device.name}"]
    if transposed:
        lines.append("It is the input gradient of a convolution; the geometries are that convolution's.")
    if dtype.is_complex:
        lines.append("Each plan is one of four real convolutions, which make a complex one.")

    for (title, p), meaning in zip(_plans(calls, device).items(), _OF_THE_CONVOLUTION, strict=False):
        lines += [f"\n{title} ({meaning})" if transposed else f"\n{title}", str(p), _times(p)]
    return "\n".join(lines)


def _causal_plans(
    input_shape: Sequence[int],
    weight_shape: Sequence[int],
    transposed: bool,
    dtype: torch.dtype,
    channels_last: bool,
    bias: bool,
    device: Device,
    activation: str | None = None,
    initial_state: bool = False,
) -> dict[str, CausalPlan]:
    if transposed:
        raise ValueError("a causal convolution is not transposed")

    def empty(*shape: int) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    x, w = empty(*input_shape), empty(*weight_shape)
    if channels_last and x.dim() == 3:
        x = x.transpose(1, 2).contiguous().transpose(1, 2)
    b = empty(weight_shape[0]) if bias else None
    state = None
    if x.dim() == 3 and w.dim() == 2:
        state = empty(*input_shape[:2], max(weight_shape[1] - 1, 0))
    y = causal.causal_conv1d(x, w, b, activation, state if initial_state else None)  # which raises what is wrong
    assert isinstance(y, torch.Tensor)
    assert state is not None
    given, silu = state if initial_state else None, activation is not None
    step = x[:, :, :1]
    return {
        "forward": causal.forward_plan(x, w, b, given, silu, device, y),
        "all gradients": causal.backward_plan(y, x, w, b, given, silu, device, y),
        "update by one step": causal.update_plan(step, state, w, b, silu, device, step),
    }


def _separable_plans(
    input_shape: Sequence[int],
    weight_shape: Sequence[int],
    transposed: bool,
    dtype: torch.dtype,
    channels_last: bool,
    bias: bool,
    device: Device,
    pointwise: int,
    groups: int = 1,
    **parameters: Any,
) -> dict[str, plan.Plan | SeparablePlan]:
    if transposed or groups not in (1, input_shape[1]):
        raise ValueError("a separable convolution is not transposed, and has as many groups as channels")
    rank = len(weight_shape) - 2
    layout = _CHANNELS_LAST.get(rank, torch.contiguous_format) if channels_last else torch.contiguous_format
    x = torch.empty(list(input_shape), dtype=dtype, device="meta").contiguous(memory_format=layout)
    depthwise = torch.empty(list(weight_shape), dtype=dtype, device="meta")
    mixing = torch.empty([pointwise, weight_shape[0], *(1,) * rank], dtype=dtype, device="meta")
    biases = [torch.empty(n, dtype=dtype, device="meta") if bias else None for n in (weight_shape[0], pointwise)]
    convolve = getattr(separable, f"separable_conv{rank}d")
    with execute.recording(here=True) as calls:
        y = convolve(x, depthwise, mixing, *biases, **parameters)
    fused = separable.plan_of(calls[0], calls[1], mixing, biases[1], y, device)
    if isinstance(fused, str):
        raise RuntimeError(f"the fused kernel cannot compute this: {fused}")
    return {"both in one kernel": fused, **dict(zip(("depthwise", "pointwise"), fused.apart, strict=True))}


def _times(p: plan.Plan | CausalPlan | SeparablePlan) -> str:
    least = p.roofline
    scaled = f", numbers {p.device.source}" if p.device.source.startswith("scaled") else ""
    moved = f"{_with_prefix(least.flops)}FLOP, {_with_prefix(least.bytes)}B"
    limit = f"roofline   {moved}: at least {_with_prefix(least.seconds)}s, by {least.limit}{scaled}"
    if isinstance(p, CausalPlan):
        share = f"{least.seconds / p.seconds:.0%} of that limit, most of it by {p.limit}"
        programs = f"programs {p.prediction.tiles}, waves {p.prediction.waves}"
        return f"{limit}\ntime       {_with_prefix(p.seconds)}s predicted, not measured: {share}; {programs}"
    if isinstance(p, plan.Plan) and p.kernel not in cost.TILES:
        return f"{limit}\ntime       not predicted: there is no model of this kernel"
    kernel, words, seconds = p.prediction, f"{_with_prefix(p.seconds)}s predicted, not measured", p.seconds
    if isinstance(p, plan.Plan) and p.measured_seconds is not None:
        seconds, around = p.measured_seconds, ", copies around it predicted" if p.packs or p.fold else ""
        words = f"{_with_prefix(seconds)}s measured{around}, {_with_prefix(p.seconds)}s predicted"
    share = f"{least.seconds / seconds:.0%} of that limit"
    tiles = f"tiles {kernel.tiles}, waves {kernel.waves}, {kernel.useful:.0%} of the products useful"
    return f"{limit}\ntime       {words}: {share}; {tiles}; bound by {kernel.limit}"


def _with_prefix(value: float) -> str:
    """Three digits, a space and the unit's prefix: "59.2 G"."""
    for scale, prefix in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"), (1, ""), (1e-3, "m"), (1e-6, "u")):
        if value >= scale:
            return f"{value / scale:.3g} {prefix}"
    return f"{value / 1e-9:.3g} n"


def _plans(calls: Sequence[execute.Call], device: Device) -> dict[str, plan.Plan]:
    return {name: plan.make(problem) for name, problem in _problems(calls, device).items()}


def _problems(calls: Sequence[execute.Call], device: Device) -> dict[str, plan.Problem]:
    return {name: execute.problem_of(_real(call), device) for name, call in zip(_NAMES, calls, strict=False)}


def _name(weight_shape: Sequence[int], transposed: bool, dtype: torch.dtype, out_dtype: torch.dtype | None) -> str:
    """The function for a weight of this many dimensions and these types."""
    kind = "conv_transpose" if transposed else "conv"
    if not transposed and dtype is torch.float8_e4m3fn:
        kind = "scaled_conv"
    elif not transposed and (dtype, out_dtype) == (torch.int8, torch.int32):
        kind = "int_conv"
    name = f"{kind}{len(weight_shape) - 2}d"
    if not hasattr(functional, name):
        raise RuntimeError(f"expected a weight of 3, 4 or 5 dimensions, but got weight of size {list(weight_shape)}")
    return name


def _traced(
    input_shape: Sequence[int],
    weight_shape: Sequence[int],
    transposed: bool,
    dtype: torch.dtype,
    channels_last: bool,
    bias: bool,
    parameters: dict[str, Any],
    training: bool = True,
) -> tuple[torch.Size, list[execute.Call]]:
    """The shape of the output and the calls that forward and backward make."""
    name, out = _name(weight_shape, transposed, dtype, parameters.get("out_dtype")), dtype
    convolve = getattr(functional, name)
    if name.startswith("scaled"):
        out = parameters.get("out_dtype", torch.bfloat16)
        convolve = partial(convolve, scale_a=torch.empty((), device="meta"), scale_b=torch.empty((), device="meta"))
    elif name.startswith("int"):
        out, parameters = torch.int32, {k: v for k, v in parameters.items() if k != "out_dtype"}
    rank = len(weight_shape) - 2
    layout = _CHANNELS_LAST.get(rank, torch.contiguous_format) if channels_last else torch.contiguous_format
    differentiable = training and out is dtype and (dtype.is_floating_point or dtype.is_complex)

    def empty(shape: Sequence[int], dtype: torch.dtype = dtype) -> torch.Tensor:
        t = torch.empty(list(shape), dtype=dtype, device="meta")
        return t.contiguous(memory_format=layout if t.dim() == rank + 2 else torch.contiguous_format)

    x, w = (empty(shape).requires_grad_(differentiable) for shape in (input_shape, weight_shape))
    channels = weight_shape[1] * parameters.get("groups", 1) if transposed else weight_shape[0]
    parameters = {**parameters, "bias": empty([channels], out) if bias else None}
    if parameters.get("scale"):
        parameters["scale"] = empty([channels])
    residual = parameters.pop("residual", "")
    if residual:
        parameters["residual_after_activation"] = residual == "after"
        with torch.no_grad():
            parameters["residual"] = torch.empty_like(convolve(x, w, **parameters))
    with execute.recording(here=True) as calls:
        y = convolve(x, w, **parameters)
        if differentiable:
            torch.autograd.grad(y, (x, w), torch.empty_like(y))
    return y.shape, calls


def _activation_plan(total: int, parameters: dict[str, Any], dtype: torch.dtype, device: Device) -> ActivationPlan:
    """Of the first part of a backward pass, which says by what was saved how its gradient is told."""
    name, slope = parameters["activation"], parameters.get("negative_slope", Epilogue().slope)
    of_output = activation.tells_gradient(name, slope) and parameters.get("residual") != "after"
    return activation_plan.make(ActivationProblem(total, written(dtype), name, slope, of_output, device))


def written(value: Any) -> str:
    """A parameter as the console script takes it: 2,1 or 2:0,1."""
    if isinstance(value, (tuple, list)):
        return ",".join(":".join(map(str, v)) if isinstance(v, (tuple, list)) else str(v) for v in value)
    return str(value).removeprefix("torch.")


def _real(call: execute.Call) -> execute.Call:
    if not call.a.is_complex():
        return call
    return replace(call, a=torch.view_as_real(call.a)[..., 0], b=torch.view_as_real(call.b)[..., 0], bias=None)
