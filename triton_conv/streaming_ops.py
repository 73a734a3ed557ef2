"""The operators of causal convolutions whose first frames are in a second tensor; see `streaming` for the functions.

    triton_conv::causal_conv        with all derivatives
    triton_conv::causal_conv_fused  with an epilogue in the same kernel (`triton_conv.epilogue`); where a derivative is
                                    asked for it is the first and functions of plain torch, which round once more

All tensors have five dimensions. `padding` is that of rows and columns, (lower, upper) of each; `padding_mode` one name
for both or two joined by commas; stride and dilation are of three axes.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from . import (
    batching,
    conv_calls,
    derivatives,
    execute,
    fused_ops,
    invariance,
    ops,
    recovery,
    reference,
    schemas,
    streaming_plan,
)
from . import config as configs
from .config import Device
from .epilogue import PLAIN
from .execute import Call
from .geometry import Context, ConvGeometry, Role
from .later import when_imported
from .streaming_plan import Problem

_PARAMS = (
    "SymInt[] stride, SymInt[] padding, SymInt[] dilation, SymInt groups, str padding_mode, str time_mode, "
    "str? precision"
)
_SCHEMAS = {
    "causal_conv": f"(Tensor x, Tensor weight, Tensor? bias, Tensor? context, {_PARAMS}) -> Tensor",
    "causal_conv_fused": (
        "(Tensor x, Tensor weight, Tensor? bias, Tensor? scale, Tensor? residual, Tensor? context, "
        f"{_PARAMS}, str activation, float slope, bool residual_after) -> Tensor"
    ),
}
_lib = torch.library.Library("triton_conv", "FRAGMENT")
for _name, _schema in _SCHEMAS.items():
    _lib.define(_name + _schema, tags=(torch.Tag.pt2_compliant_tag,))
    _lib.define(f"{_name}.traced{_schema.replace('SymInt', 'int')}")

causal_conv = torch.ops.triton_conv.causal_conv.default
causal_conv_fused = torch.ops.triton_conv.causal_conv_fused.default


def recordable(op: Any) -> Any:
    """`op`, or while torch.jit traces what it can record in its place."""
    return getattr(torch.ops.triton_conv, op._schema.name.split("::")[1]).traced if torch.jit.is_tracing() else op


# ---------------------------------------------------------------------------------------------------------------------
# What the operators compute, real and fake


def _conv_params(
    weight: Tensor, context: Tensor | None, stride, padding, dilation, groups, padding_mode, time_mode, precision
) -> tuple:
    """Those of the same convolution of all frames in a row: `triton_conv::conv`'s."""
    first = dilation[0] * (weight.shape[2] - 1) if context is None else 0
    modes = padding_mode.split(",")
    modes = [time_mode if context is None else "zeros", *(modes if len(modes) == 2 else modes * 2)]
    return stride, [first, 0, *padding], dilation, groups, ",".join(modes), precision


def call_of(x, weight, bias, context, *params) -> Call:
    """The convolution of all frames in a row, whose input is x alone; raises for what does not fit."""
    conv_calls.check_given(causal_conv, x=x, weight=weight)
    if x.dim() != 5 or weight.dim() != 5:
        raise RuntimeError(
            f"expected x and weight with five dimensions, but got x {list(x.shape)}, weight {list(weight.shape)}"
        )
    if context is not None:
        sizes = f"context {list(context.shape)}, x {list(x.shape)}"
        if (*context.shape[:2], *context.shape[3:]) != (*x.shape[:2], *x.shape[3:]):
            raise RuntimeError(f"expected context to have the shape of x but for its number of frames, but got {sizes}")
        if context.dtype != x.dtype:
            raise RuntimeError(f"expected context of {x.dtype}, but got {context.dtype} ({sizes})")
        conv_calls.check_device("x", x, "context", context)
    if x.shape[2] < 1:
        raise RuntimeError(f"expected x to have a frame, but got x of size {list(x.shape)}")
    for name, values, length in (("stride", params[0], 3), ("padding", params[1], 4), ("dilation", params[2], 3)):
        if len(values) != length:
            raise RuntimeError(f"expected {length} numbers of {name}, but got {name}={list(values)}")
    stride, padding, dilation, groups, modes, precision = _conv_params(weight, context, *params)
    frames = x.shape[2] + (0 if context is None else context.shape[2])
    geometry = conv_calls.geometry_of(
        ConvGeometry.forward,
        (*x.shape[:2], frames, *x.shape[3:]),
        weight.shape,
        stride,
        conv_calls.pairs_of(padding),
        dilation,
        groups,
        conv_calls.modes_of(modes, weight.shape),
    )
    conv_calls.check_operands(bias, geometry.K, precision, x=x, weight=weight)
    return Call(Role.FPROP, geometry, x, weight, bias, precision)


def fused_call(x, weight, bias, scale, residual, context, *params) -> Call:
    """The same with an epilogue."""
    return fused_ops.call_of(_KIND, False, x, weight, bias, scale, residual, context, *params)


_KIND = fused_ops.Kind(causal_conv_fused, None, call_of, False)


def _run(x, weight, bias, context, *params) -> Tensor:
    return _computed(call_of(x, weight, bias, context, *params), context)


def _run_fused(x, weight, bias, scale, residual, context, *params) -> Tensor:
    return _computed(fused_call(x, weight, bias, scale, residual, context, *params), context)


def _fake(*args) -> Tensor:
    return execute._empty_like_output(call_of(*args))


def _fake_fused(*args) -> Tensor:
    return execute._empty_like_output(fused_call(*args))


def _computed(call: Call, context: Tensor | None) -> Tensor:
    x, weight = call.a, call.b
    output, device = execute._empty_like_output(call), execute.device_of(x.device)
    if output.numel() == 0:
        return output
    if x.numel() == 0 or weight.numel() == 0:
        return execute._finished(call, torch.zeros_like(output, dtype=reference.wide_of(x.dtype)), output)
    if device is None:
        return _by_frames(call, context, output)
    problem = problem_of(call, context, output, device)

    def launched(p: streaming_plan.StreamingPlan) -> Tensor:
        return _launched(p, call, context, output)

    return recovery.run(lambda: streaming_plan.make(problem), launched, problem, configs.chosen(call.role))


def _launched(p: streaming_plan.StreamingPlan, call: Call, context: Tensor | None, output: Tensor) -> Tensor:
    x, problem = call.a, p.problem
    tensors = {"x": x, "w": call.b, "y": output}
    if problem.context.held:  # where there is no context, it is x that repeats
        tensors["context"] = (x if context is None else context)[:, :, : problem.context.held]
    tensors |= {name: _channels_last(tensors[name]) for name in p.packs}
    if call.residual is not None:
        tensors["residual"] = output.clone().copy_(call.residual) if problem.moves_residual else call.residual
    for name, t in (("bias", call.bias), ("scale", call.scale)):
        if t is not None:
            tensors[name] = t.contiguous()
    with execute._on_device(x.device):
        for launch in p.direct:
            launch.run(tensors)
    return output


def problem_of(call: Call, context: Tensor | None, output: Tensor, device: Device) -> Problem:
    """The numbers a plan is made from."""
    x, weight, g = call.a, call.b, call.geometry
    before = Context(0, _strides(x))
    if context is not None and context.shape[2]:
        before = Context(context.shape[2], _strides(context))
    elif g.modes[0] == "replicate":
        first = g.padding[0][0]
        pads, modes = ((0, 0), *g.padding[1:]), ("zeros", *g.modes[1:])
        g = replace(g, input=(first + g.input[0], *g.input[1:]), padding=pads, modes=modes)
        before = Context(first, _strides(x[:, :, :1].expand(-1, -1, first, -1, -1)))
    operands = {"x": x, "context": context, "w": weight}
    there = {name: t for name, t in operands.items() if t is not None and t.device.type != "meta"}
    return Problem(
        g,
        before,
        str(x.dtype).removeprefix("torch."),
        (call.precision or execute.default_precision()) if x.dtype is torch.float32 else "ieee",
        _strides(x),
        weight.stride(),
        _strides(output),
        call.bias is not None,
        tuple(name for name, t in there.items() if t.data_ptr() % 16),
        device,
        call.epilogue,
        call.residual is not None and not (execute._aligned(call.residual) and execute._lies_as(call.residual, output)),
        execute.scale_dtype(call, str(output.dtype).removeprefix("torch.")),
    )


def _strides(t: Tensor) -> tuple[int, ...]:
    """Those of axes with one row or column, which are whatever they are, as 0; for D 0 says that a frame repeats."""
    n, c, d, *rest = t.stride()
    d = d if d or t.shape[2] > 1 else 1
    return (n, c, d, *(0 if extent == 1 else s for s, extent in zip(rest, t.shape[3:], strict=True)))


def _channels_last(t: Tensor) -> Tensor:
    """A dense copy (N, D, H, W, C)."""
    return t.permute(0, 2, 3, 4, 1).clone(memory_format=torch.contiguous_format)


def _by_frames(call: Call, context: Tensor | None, output: Tensor) -> Tensor:
    """By plain torch, one output frame at a time: PyTorch's convolutions may do as they like with several."""
    x, weight, g = call.a, call.b, call.geometry
    if invariance.batch() is not None and g.N > 1:
        one = replace(g, N=1)
        done: list[Tensor] = []
        contexts = [None] * g.N if context is None else context.split(1)
        for a, before, y in zip(x.split(1), contexts, output.split(1), strict=True):
            residual = None if call.residual is None else call.residual[len(done)][None]
            done.append(_by_frames(replace(call, geometry=one, a=a, residual=residual), before, y))
        return output
    taps, before = g.filter[0], 0 if context is None else context.shape[2]
    one = replace(
        g,
        input=(taps, *g.input[1:]),
        output=(1, *g.output[1:]),
        stride=(1, *g.stride[1:]),
        padding=((0, 0), *g.padding[1:]),
        dilation=(1, *g.dilation[1:]),
        modes=("zeros", *g.modes[1:]),
    )
    wide = x.dtype if call.epilogue == PLAIN else reference.wide_of(x.dtype)
    weight = weight.to(wide)
    for z in range(g.output[0]):
        window = x.new_zeros(g.N, g.C, *one.input, dtype=wide)
        for t in range(taps):
            at = z * g.stride[0] - g.padding[0][0] + t * g.dilation[0]
            if context is not None and at < before:
                window[:, :, t] = context[:, :, at]
            elif at >= 0 or g.modes[0] == "replicate":
                window[:, :, t] = x[:, :, max(at - before, 0)]
        frame = slice(z, z + 1)
        if call.epilogue == PLAIN:
            output[:, :, frame] = reference.fprop(window, weight, call.bias, one)
        else:
            residual = None if call.residual is None else call.residual[:, :, frame].contiguous()
            sums = reference.fprop(window, weight, None, one)
            output[:, :, frame] = reference.finished(sums, call.scale, call.bias, residual, call.epilogue)[0]
    return output


# ---------------------------------------------------------------------------------------------------------------------
# Derivatives and transforms


class _Causal(derivatives.SingleLevelFunction):
    @staticmethod
    def forward(op, x, weight, bias, context, *params):
        return derivatives.below_autograd(op, x, weight, bias, context, *params)

    @staticmethod
    def setup_context(ctx, inputs, output):
        _, x, weight, _, context, *ctx.params = inputs
        ctx.output_shape = output.shape
        derivatives.save(ctx, x, weight, context)

    @staticmethod
    def backward(ctx, dy):
        none = (None,) * len(ctx.params)
        if dy is None:
            return (None,) * 5 + none
        (x, weight, context), needs = ctx.saved_tensors, ctx.needs_input_grad
        how = _conv_params(weight, context, *ctx.params)
        frames = [0 if context is None else context.shape[2], x.shape[2]]
        dx = dweight = dcontext = None
        if needs[1] or needs[4]:
            size = [*x.shape[:2], sum(frames), *x.shape[3:]]
            dcontext, dx = ops.conv_dgrad(dy, weight, size, *how).split(frames, dim=2)
        if needs[2]:
            both = x if context is None else torch.cat((context, x), dim=2)
            dweight = ops.conv_wgrad(dy, both, weight.shape, derivatives.gradient_strides(weight), *how)
        dbias = derivatives.bias_gradient(dy) if needs[3] else None
        return None, dx if needs[1] else None, dweight, dbias, dcontext if needs[4] else None, *none

    @staticmethod
    def jvp(ctx, _, dx, dweight, dbias, dcontext, *unused):
        x, weight, context = ctx.saved_tensors
        parts = []
        if dx is not None or dcontext is not None:
            dx = torch.zeros_like(x) if dx is None else dx
            if context is not None and dcontext is None:
                dcontext = torch.zeros_like(context)
            parts.append(causal_conv(dx, weight, None, dcontext, *ctx.params))
        if dweight is not None:
            parts.append(causal_conv(x, dweight, None, context, *ctx.params))
        return derivatives.sum_of(parts, dbias, ctx.output_shape)


def _vmap(info, in_dims, x, weight, bias, context, *params):
    """A batch of x and context is more samples; of filters, that of the convolution of all frames in a row."""
    size, (x_dim, weight_dim, bias_dim, context_dim) = info.batch_size, in_dims[:4]
    if weight_dim is None and bias_dim is None:
        x = batching.fold_batch(x, x_dim, size, 0)
        context = None if context is None else batching.fold_batch(context, context_dim, size, 0)
        return batching.unfold_batch(causal_conv(x, weight, bias, context, *params), size, 0), 0
    frames, dim = x, x_dim
    if context is not None:
        parts, dim = [context, x], None
        if x_dim is not None or context_dim is not None:
            parts, dim = [batching.front(context, context_dim, size), batching.front(x, x_dim, size)], 0
        frames = torch.cat(parts, dim=2 if dim is None else 3)
    how = _conv_params(weight if weight_dim is None else weight.select(weight_dim, 0), context, *params)
    rule = batching.activation_vmap(schemas.fprop_op(how), 0)
    return rule(info, (dim, weight_dim, bias_dim), frames, weight, bias, *how)


def _fused_autograd(*args) -> Tensor:
    if derivatives.derived(args):
        return _composed(*args)
    with torch._C._AutoDispatchBelowAutograd():
        return causal_conv_fused(*args)


def _composed(x, weight, bias, scale, residual, context, *params) -> Tensor:
    """The same as a convolution and functions that have every derivative."""
    *conv, activation, slope, after = params
    z = recordable(causal_conv)(x, weight, bias if scale is None else None, context, *conv)
    channels = [None if scale is None or t is None else fused_ops._along(t, z, 1) for t in (scale, bias)]
    return fused_ops._finished(z, channels[0], channels[1], residual, activation, slope, after)[0]


def _fused_vmap(info, in_dims, x, weight, bias, scale, residual, context, *params):
    *conv, activation, slope, after = params
    x_dim, weight_dim, bias_dim, scale_dim, residual_dim, context_dim = in_dims[:6]
    size, later = info.batch_size, scale is not None or bias_dim is not None  # what is added after the sums
    dims = (x_dim, weight_dim, None if later else bias_dim, context_dim)
    if any(dim is not None for dim in (x_dim, weight_dim, context_dim)):
        z, _ = _vmap(info, dims, x, weight, None if later else bias, context, *conv)
    else:
        z = causal_conv(x, weight, None if later else bias, context, *conv).unsqueeze(0)
    channels = [
        None if t is None or not later else fused_ops._along(t if dim is None else t.movedim(dim, 0), z, 2)
        for t, dim in ((scale, scale_dim), (bias, bias_dim))
    ]
    if residual is not None:
        residual = batching.front(residual, residual_dim, size)
    y = fused_ops._finished(z, channels[0], channels[1], residual, activation, slope, after)[0]
    return y.expand(size, *y.shape[1:]), 0


def _registered(op: Any, run: Any, fake: Any, autograd: Any, vmap: Any, wide: tuple[int, ...] = ()) -> None:
    name = op._schema.name.split("::")[1]
    _lib.impl(name, run, "CPU")
    _lib.impl(name, run, "CUDA")
    _lib.impl(name, autograd, "Autograd")
    _lib.impl(f"{name}.traced", op, "CompositeImplicitAutograd")
    torch.library.register_fake(op._schema.name, fake, lib=_lib)
    torch.library.register_vmap(op._schema.name, vmap, lib=_lib)
    for device, key in (("cpu", "AutocastCPU"), ("cuda", "AutocastCUDA")):
        _lib.impl(name, ops._autocast_kernel(op, device, wide=wide), key)


_registered(causal_conv, _run, _fake, derivatives.autograd_kernel(causal_conv, _Causal), _vmap)
_registered(causal_conv_fused, _run_fused, _fake_fused, _fused_autograd, _fused_vmap, wide=(fused_ops._SCALE,))

conv_calls.CALLS |= {causal_conv: call_of, causal_conv_fused: fused_call}
when_imported("torch.utils.flop_counter", ops._register_flop_formulas)
