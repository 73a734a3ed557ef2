"""Which kernel runs a convolution and why, from shapes alone."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch

from . import (
    activation_plan,
    branches,
    causal,
    causal_ops,
    config,
    deform,
    execute,
    functional,
    plan,
    separable,
    streaming,
)
from . import explain_words as words
from .activation_plan import ActivationPlan, ActivationProblem
from .causal_plan import CausalPlan
from .config import Device
from .epilogue import Epilogue
from .explain_words import AnyPlan as AnyPlan
from .explain_words import written as written
from .separable_plan import SeparablePlan

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
    how = (dtype, channels_last, bias, device)
    named: dict[str, Any] = {"dtype": dtype, "channels_last": channels_last, "bias": bias, "device": device}
    shown = plans(input_shape, weight_shape, transposed=transposed, **named, **parameters)
    if any(parameters.get(kind) for kind in ("causal", "pointwise", "deform", "branches")) or "context" in parameters:
        lines = words.of_kind(input_shape, weight_shape, shown, *how, parameters)
    else:
        lines = _call(input_shape, weight_shape, transposed, *how, parameters)
    meanings = dict(zip(_NAMES, _OF_THE_CONVOLUTION, strict=True)) if transposed else {}
    for title, p in shown.items():
        meaning = f" ({meanings[title]})" if title in meanings else ""
        lines += [f"\n{title}{meaning}", str(p), words.times(p)]
    return "\n".join(lines)


def _call(
    input_shape: Sequence[int],
    weight_shape: Sequence[int],
    transposed: bool,
    dtype: torch.dtype,
    channels_last: bool,
    bias: bool,
    device: Device,
    parameters: dict[str, Any],
) -> list[str]:
    """The first lines about an ordinary convolution."""
    name = _name(weight_shape, transposed, dtype, parameters.get("out_dtype"))
    output_shape, _ = _traced(input_shape, weight_shape, transposed, dtype, channels_last, bias, dict(parameters))
    shapes = {"input": input_shape, "weight": weight_shape, "output": output_shape}
    said = [name, *(f"{operand} {words.sizes(shape)}" for operand, shape in shapes.items()), written(dtype)]
    said += [word for word, given in (("channels_last", channels_last), ("bias", bias)) if given]
    defaults = inspect.signature(getattr(functional, name)).parameters
    for parameter, value in parameters.items():
        if parameter == "scale":
            said += ["scale"] * bool(value)
        elif parameter not in defaults or written(value) != written(defaults[parameter].default):
            said.append(f"{parameter} {written(value)}")
    lines = [f"{' '.join(said)} on {device.name}"]
    if transposed:
        lines.append("It is the input gradient of a convolution; the geometries are that convolution's.")
    if dtype.is_complex:
        lines.append("Each plan is one of four real convolutions, which make a complex one.")
    return [*lines, *words.saved(parameters, output_shape, dtype)]


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
        "forward": causal_ops.forward_plan(x, w, b, given, silu, device, y),
        "all gradients": causal_ops.backward_plan(y, x, w, b, given, silu, device, y),
        "update by one step": causal_ops.update_plan(step, state, w, b, silu, device, step),
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
    problem = ActivationProblem(total, written(dtype), name, slope, words.of_output(parameters), device)
    return activation_plan.make(problem)


def _real(call: execute.Call) -> execute.Call:
    if not call.a.is_complex():
        return call
    return replace(call, a=torch.view_as_real(call.a)[..., 0], b=torch.view_as_real(call.b)[..., 0], bias=None)
