"""The operators of fused convolutions, and their gradients; `triton_conv.fused` has both in formulas."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor
from torch._functorch.autograd_function import enable_single_level_autograd_function

from . import activation as activations
from . import batching, conv_calls, derivatives, fast, ops, reference, schemas
from .epilogue import ACTIVATIONS, Epilogue
from .execute import Call, _empty_like_output, empty_output
from .later import when_imported

_TENSORS = "Tensor input, Tensor weight, Tensor? bias, Tensor? scale, Tensor? residual"
_SCALE = 3  # its place among the tensors
_EPILOGUE = "str activation, float slope, bool residual_after"
_SCHEMAS = {
    "conv_fused": f"({_TENSORS}, {schemas.PARAMS}, {_EPILOGUE}) -> Tensor",
    "conv_transpose_fused": f"({_TENSORS}, {schemas.TRANSPOSED}, {_EPILOGUE}) -> Tensor",
    "conv_fused_keep": f"({_TENSORS}, {schemas.PARAMS}, {_EPILOGUE}) -> (Tensor, Tensor)",
    "conv_transpose_fused_keep": f"({_TENSORS}, {schemas.TRANSPOSED}, {_EPILOGUE}) -> (Tensor, Tensor)",
}
_lib = torch.library.Library("triton_conv", "FRAGMENT")
for _name, _schema in _SCHEMAS.items():
    _lib.define(_name + _schema, tags=(torch.Tag.pt2_compliant_tag,))

conv_fused = torch.ops.triton_conv.conv_fused.default
conv_transpose_fused = torch.ops.triton_conv.conv_transpose_fused.default
conv_fused_keep = torch.ops.triton_conv.conv_fused_keep.default
conv_transpose_fused_keep = torch.ops.triton_conv.conv_transpose_fused_keep.default


# ---------------------------------------------------------------------------------------------------------------------
# What the operators compute


class Kind:
    """The operators of plain or transposed convolutions; `call` makes that of the convolution in them.

    `calls` are those of the two operators: functions that are always the same, by which they are remembered.
    """

    def __init__(self, op: Any, keeping: Any, call: Callable[..., Call], transposed: bool):
        self.op, self.keeping, self.call, self.transposed = op, keeping, call, transposed
        self.calls = (partial(call_of, self, False), partial(_keeping_call, self))


def call_of(
    kind: Kind,
    keep: bool,
    x: Tensor,
    w: Tensor,
    bias: Tensor | None,
    scale: Tensor | None,
    residual: Tensor | None,
    *params: Any,
    floating: bool = True,
) -> Call:
    *conv, activation, slope, after = params
    call = kind.call(x, w, bias, *conv)
    if floating and not x.is_floating_point():
        raise NotImplementedError(f"{kind.op._schema.name} is not implemented for {x.dtype} (input {list(x.shape)})")
    if activation and activation not in ACTIVATIONS:
        raise ValueError(f"activation must be one of {ACTIVATIONS}, but got activation={activation!r}")
    sizes = f"(input {list(x.shape)}, weight {list(w.shape)})"
    if scale is not None:
        channels = call.geometry.C if kind.transposed else call.geometry.K
        allowed = {x.dtype, torch.float32} if floating else {x.dtype}
        if scale.dim() != 1 or scale.shape[0] != channels or scale.dtype not in allowed:
            dtypes = " or ".join(sorted(map(str, allowed)))
            raise RuntimeError(
                f"expected scale to be 1-dimensional with {channels} elements of {dtypes}, but got scale of size "
                f"{list(scale.shape)} of {scale.dtype} {sizes}"
            )
        conv_calls.check_device("input", x, "scale", scale)
    if residual is not None:
        shape = call.output_shape
        if list(residual.shape) != shape or residual.dtype != x.dtype:
            raise RuntimeError(
                f"expected residual of the output's size {shape} of {x.dtype}, but got {list(residual.shape)} of "
                f"{residual.dtype} {sizes}"
            )
        conv_calls.check_device("input", x, "residual", residual)
    place = "" if residual is None else "after" if after and activation else "before"
    slope = float(slope) if activation == "leaky_relu" else Epilogue().slope
    epilogue = Epilogue(activation, slope, place, scale is not None, keep)
    return replace(call, epilogue=epilogue, scale=scale, residual=residual)


def _keeping_call(kind: Kind, *args: Any) -> Call:
    call = call_of(kind, True, *args)
    return replace(call, kept=_empty_like_output(call))


CONV = Kind(conv_fused, conv_fused_keep, conv_calls.conv_call, False)
CONV_TRANSPOSE = Kind(conv_transpose_fused, conv_transpose_fused_keep, conv_calls.conv_transpose_call, True)


def _run(call: Callable[..., Call]) -> Callable:
    """What an operator does."""

    def run(x, w, bias, scale, residual, *params):
        if x is None or w is None:
            conv_calls.check_given(conv_fused, input=x, weight=w)
        return fast.computed(call, x, w, bias, tuple(map(conv_calls.hashable, params)), scale, residual)

    return run


def _fake(kind: Kind) -> tuple[Callable, Callable]:
    """What the two operators do with tensors that have no memory."""

    def fake(*args) -> Tensor:
        return empty_output(call_of(kind, False, *args))

    def fake_keeping(*args) -> tuple[Tensor, Tensor]:
        call = call_of(kind, True, *args)
        return empty_output(call), _empty_like_output(call)

    return fake, fake_keeping


def composed(
    kind: Kind, x: Tensor, w: Tensor, bias: Tensor | None, scale: Tensor | None, residual: Tensor | None, *params: Any
) -> tuple[Tensor, Tensor]:
    """(output, what the activation is applied to) of operators that have every derivative."""
    *conv, activation, slope, after = params
    op = ops.conv_transpose if kind.transposed else schemas.fprop_op(conv)
    z = schemas.recordable(op)(x, w, bias if scale is None else None, *conv)
    channels = [None if scale is None or t is None else _along(t, z, 1) for t in (scale, bias)]
    return _finished(z, channels[0], channels[1], residual, activation, slope, after)


def _along(values: Tensor, like: Tensor, axis: int) -> Tensor:
    """One value a channel, or a batch of them in front, to be combined with `like`, whose channels are on `axis`."""
    between = (1,) * (axis + 1 - values.dim())
    return values.reshape(*values.shape[:-1], *between, -1, *(1,) * (like.dim() - axis - 1))


def _finished(
    sums: Tensor,
    scale: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    activation: str,
    slope: float,
    after: bool,
) -> tuple[Tensor, Tensor]:
    """(output, what the activation is applied to), where everything broadcasts."""
    dtype = sums.dtype
    wide = reference.wide_of(dtype) if dtype.is_floating_point else dtype  # integers wrap at each step, as PyTorch's do
    wide = torch.complex64 if dtype is torch.complex32 else wide
    scale, bias, residual = (None if t is None else t.to(wide) for t in (scale, bias, residual))
    z = sums.to(wide)
    z = z if scale is None else z * scale
    z = z if bias is None else z + bias
    z = z if residual is None or after else z + residual
    y = reference.activated(z, activation, slope)
    y = y + residual if residual is not None and after else y
    return y.to(dtype), z.to(dtype)


# ---------------------------------------------------------------------------------------------------------------------
# Autograd


class _Fused(derivatives.SingleLevelFunction):
    """`keep` says whether the second output is there: what the activation is applied to, else None."""

    @staticmethod
    def forward(kind, keep, *args):
        made = derivatives.below_autograd(kind.keeping if keep else kind.op, *args)
        return made if keep else (made, None)

    @staticmethod
    def setup_context(ctx, inputs, output):
        kind, keep, x, w, _, scale, residual, *params = inputs
        _prepare(ctx, kind, keep, x, w, scale, residual, params, output)

    @staticmethod
    def backward(ctx, dy, dz):
        return None, None, *_gradients(ctx, dy, dz, ctx.needs_input_grad[2:7]), *(None,) * (len(ctx.params) + 3)


class FusedAgain(derivatives.SingleLevelFunction):
    """A forward of a `fast.FusedBound`, as a Function that need not find out how it was called."""

    @staticmethod
    def forward(ctx, how, x, w, bias, scale, residual):
        kind, keep, bound, params = how
        made = bound(x, w, bias, scale, residual)
        made = made if keep else (made, None)
        _prepare(ctx, kind, keep, x, w, scale, residual, params, made)
        return made

    @staticmethod
    def backward(ctx, dy, dz):
        return None, *_gradients(ctx, dy, dz, ctx.needs_input_grad[1:6])


def _prepare(ctx, kind, keep, x, w, scale, residual, params, made) -> None:
    """What backward will need; `made` are output and what is kept."""
    *ctx.params, activation, slope, after = params
    ctx.kind, ctx.of_output, ctx.after = kind, not keep, after and residual is not None
    ctx.how = (activation, slope)
    saved = made[1] if keep else made[0] if activations.tells_gradient(activation, slope) else None
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x, w, scale, saved)


def _gradients(ctx, dy: Tensor | None, dz: Tensor | None, wanted: Sequence[bool]) -> tuple[Tensor | None, ...]:
    """Those of x, w, bias, scale and residual; `dz` is the gradient of what is kept, that of others by way of it."""
    x, w, scale, saved = ctx.saved_tensors
    of_x, of_w, of_bias, of_scale, of_residual = wanted
    if dy is not None and (of_x or of_w or of_bias or of_scale or (of_residual and not ctx.after)):
        activation, slope = ctx.how
        first = activations.backward(dy, saved, activation, slope, ctx.of_output)
        dz = first if dz is None else first + dz
    dresidual = (dy if ctx.after else dz) if of_residual else None
    if dz is None:
        return None, None, None, None, dresidual
    scales = None if scale is None else _of_filters(scale, w, ctx)
    filters = w if scales is None or not of_x else (w * scales).to(w.dtype)
    gradients: Any = derivatives.transpose_gradients if ctx.kind.transposed else derivatives.fprop_gradients
    dx, dw = gradients(dz, x, filters, ctx.params, of_x, of_w or of_scale)
    dscale = None
    if of_scale:
        dscale = _sum_of_channels(w * dw.to(reference.wide_of(w.dtype)), ctx).to(scale.dtype)
    if of_w and scales is not None:
        dw = (dw * scales).to(w.dtype)
    dbias = derivatives.bias_gradient(dz) if of_bias else None
    return dx, dw if of_w else None, dbias, dscale, dresidual


def _of_filters(scale: Tensor, w: Tensor, ctx) -> Tensor:
    """The scale of each output channel, to be multiplied with the filters w that it belongs to."""
    if not ctx.kind.transposed:
        return _along(scale, w, 0)
    groups = ctx.params[batching.GROUPS]
    return _along(scale.reshape(groups, -1).repeat_interleave(w.shape[0] // groups, 0), w, 1)


def _sum_of_channels(products: Tensor, ctx) -> Tensor:
    """The sum over the filters of each output channel of products like filters."""
    if not ctx.kind.transposed:
        return products.flatten(1).sum(1)
    return products.flatten(2).sum(2).unflatten(0, (ctx.params[batching.GROUPS], -1)).sum(1).flatten()


def _autograd(kind: Kind, keeping: bool):
    op, function = (kind.keeping if keeping else kind.op), cast(Any, _Fused)

    def kernel(*args):
        if not derivatives.derived(args):
            with torch._C._AutoDispatchBelowAutograd():
                return op(*args)
        if torch.autograd.forward_ad._current_level >= 0 or torch._C._functorch.peek_interpreter_stack() is not None:
            made = composed(kind, *args)
        else:
            with enable_single_level_autograd_function():
                made = function.apply(kind, keeping or keeps(*args), *args)
        return made if keeping else made[0]

    return kernel


def keeps(x, w, bias, scale, residual, *params) -> bool:
    """Whether backward needs what the activation is applied to."""
    *_, activation, slope, after = params
    if not activation:
        return False
    after = after and residual is not None
    if activations.tells_gradient(activation, slope) and not after:
        return False
    through = (x, w, bias, scale, None if after else residual)
    return any(t is not None and t.requires_grad for t in through)


# ---------------------------------------------------------------------------------------------------------------------
# vmap, autocast, registration


def _vmap(kind: Kind, keeping: bool):
    def rule(info, in_dims, x, w, bias, scale, residual, *params):
        *conv, activation, slope, after = params
        size = info.batch_size
        if all(dim is None for dim in in_dims[1:4]):  # the batch becomes more samples
            given = zip((x, residual), (in_dims[0], in_dims[4]), strict=True)
            x, residual = (None if t is None else batching.fold_batch(t, dim, size, 0) for t, dim in given)
            made = (kind.keeping if keeping else kind.op)(x, w, bias, scale, residual, *params)
            if keeping:
                return tuple(batching.unfold_batch(t, size, 0) for t in made), (0, 0)
            return batching.unfold_batch(made, size, 0), 0
        op, axis = (ops.conv_transpose, 1) if kind.transposed else (schemas.fprop_op(conv), 0)
        if in_dims[0] is None and in_dims[1] is None:
            z = op(x, w, None, *conv).unsqueeze(0)
        else:
            z, _ = batching.activation_vmap(op, axis)(info, (*in_dims[:2], None), x, w, None, *conv)
        channels = [
            None if t is None else _along(t if dim is None else t.movedim(dim, 0), z, 2)
            for t, dim in ((scale, in_dims[3]), (bias, in_dims[2]))
        ]
        residual = None if residual is None else batching.front(residual, in_dims[4], size)
        made = _finished(z, channels[0], channels[1], residual, activation, slope, after)
        return (made, (0, 0)) if keeping else (made[0], 0)

    return rule


def _register(kind: Kind) -> None:
    runs, fakes = [_run(call) for call in kind.calls], _fake(kind)
    for keeping, op in enumerate((kind.op, kind.keeping)):
        name = op._schema.name.split("::")[1]
        _lib.impl(name, runs[keeping], "CPU")
        _lib.impl(name, runs[keeping], "CUDA")
        _lib.impl(name, _autograd(kind, bool(keeping)), "Autograd")
        torch.library.register_fake(op._schema.name, fakes[keeping], lib=_lib)
        torch.library.register_vmap(op._schema.name, _vmap(kind, bool(keeping)), lib=_lib)
        for device_type, key in (("cpu", "AutocastCPU"), ("cuda", "AutocastCUDA")):
            _lib.impl(name, ops._autocast_kernel(op, device_type, wide=(_SCALE,)), key)
        conv_calls.CALLS[op] = partial(call_of, kind, bool(keeping))
    schemas.define_traced(_lib, kind.op, _SCHEMAS)


for _kind in (CONV, CONV_TRANSPOSE):
    _register(_kind)
when_imported("torch.utils.flop_counter", ops._register_flop_formulas)
