"""The registered operators: schemas, fake kernels, autograd, autocast and vmap.

    triton_conv::conv            forward convolution
    triton_conv::conv_dilated    the same with any dilation above 1, named apart so that a profile tells them apart
    triton_conv::conv_transpose  transposed convolution
    triton_conv::conv_dgrad      input gradient
    triton_conv::conv_wgrad      weight gradient
    triton_conv::conv_scaled     forward convolution of 8-bit floats, to wider ones
    triton_conv::conv_int        forward convolution of int8, to int32

The first five are one of three bilinear primitives, fprop(x, w), dgrad(dy, w) and wgrad(dy, x), and the derivative of
each is made of the other two, so gradients of any order exist; the last two have none. `triton_conv.fused` has more,
for what else a kernel does to its sums; those have no other name for a dilation. Arguments: `padding` holds
(lower, upper) of each axis in turn, `padding_mode` is one name for all axes, or one per axis joined by commas
(torch.jit.trace and ONNX cannot record lists of strings), `precision` is one of `config.PRECISIONS` or None (PyTorch's
settings, read at each call). Inputs are batched; `triton_conv.functional` takes everything else.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch._functorch.autograd_function import enable_single_level_autograd_function
from torch.autograd.forward_ad import _set_fwd_grad_enabled

from . import fast
from .config import PRECISIONS
from .execute import Call, empty_output, execute
from .geometry import ConvGeometry, Role
from .later import when_imported

_PLAIN = "SymInt[] stride, SymInt[] padding, SymInt[] dilation, SymInt groups, str padding_mode"
_PARAMS = f"{_PLAIN}, str? precision"
_TRANSPOSED = (
    "SymInt[] stride, SymInt[] padding, SymInt[] output_padding, SymInt groups, SymInt[] dilation, "
    "str padding_mode, str? precision"
)
_SCHEMAS = {
    "conv": f"(Tensor input, Tensor weight, Tensor? bias, {_PARAMS}) -> Tensor",
    "conv_dilated": f"(Tensor input, Tensor weight, Tensor? bias, {_PARAMS}) -> Tensor",
    "conv_transpose": f"(Tensor input, Tensor weight, Tensor? bias, {_TRANSPOSED}) -> Tensor",
    "conv_dgrad": f"(Tensor grad_output, Tensor weight, SymInt[] input_size, {_PARAMS}) -> Tensor",
    "conv_wgrad": (
        f"(Tensor grad_output, Tensor input, SymInt[] weight_size, SymInt[] weight_stride, {_PARAMS}) -> Tensor"
    ),
    "conv_scaled": (
        f"(Tensor input, Tensor weight, Tensor? bias, {_PLAIN}, Tensor scale_a, Tensor scale_b, ScalarType out_dtype)"
        " -> Tensor"
    ),
    "conv_int": f"(Tensor input, Tensor weight, Tensor? bias, {_PLAIN}) -> Tensor",
}

OUT_DTYPES = (torch.bfloat16, torch.float16, torch.float32)  # what 8-bit floats may become

_lib = torch.library.Library("triton_conv", "DEF")
for _name, _schema in _SCHEMAS.items():
    _lib.define(_name + _schema, tags=(torch.Tag.pt2_compliant_tag,))

conv = torch.ops.triton_conv.conv.default
conv_dilated = torch.ops.triton_conv.conv_dilated.default
conv_transpose = torch.ops.triton_conv.conv_transpose.default
conv_dgrad = torch.ops.triton_conv.conv_dgrad.default
conv_wgrad = torch.ops.triton_conv.conv_wgrad.default
conv_scaled = torch.ops.triton_conv.conv_scaled.default
conv_int = torch.ops.triton_conv.conv_int.default

# torch.jit.trace records no list of SymInts: while it runs, calls go to an overload with plain ones.
_TRACED: dict[Any, Any] = {}


def define_traced(lib: torch.library.Library, op: Any, schemas: Mapping[str, str]) -> None:
    """Gives `op` that overload; `schemas` has its own under its name."""
    name = op._schema.name.split("::")[1]
    lib.define(f"{name}.traced{schemas[name].replace('SymInt', 'int')}")
    lib.impl(f"{name}.traced", op, "CompositeImplicitAutograd")
    _TRACED[op] = getattr(torch.ops.triton_conv, name).traced


for _op in (conv, conv_dilated, conv_transpose, conv_scaled, conv_int):
    define_traced(_lib, _op, _SCHEMAS)


def recordable(op):
    """`op`, or while torch.jit traces what it can record in its place."""
    return _TRACED[op] if torch.jit.is_tracing() else op


def fprop(x: Tensor, w: Tensor, bias: Tensor | None, params: Sequence[Any]) -> Tensor:
    """`conv` or `conv_dilated`, by the dilation in `params` (stride, padding, dilation, groups, mode, precision)."""
    return recordable(_fprop_op(params))(x, w, bias, *params)


def _fprop_op(params: Sequence[Any]):
    return conv_dilated if any(d > 1 for d in params[2]) else conv


def again(op, x: Tensor, w: Tensor, bias: Tensor | None, params: tuple) -> Tensor | None:
    """A convolution, plain (`conv`) or transposed, like one made before, without the dispatcher; None if there is none.

    It is differentiable. `params` are the operator's, frozen: lists are tuples.
    """
    if not fast.alone(x, w, *() if bias is None else (bias,)):
        return None
    call, function = _AGAIN[op]
    device_type = x.device.type
    if torch.is_autocast_enabled(device_type):
        dtype = torch.get_autocast_dtype(device_type)
        if not fast.hoped(call, dtype, x, w, bias, params):
            return None
        given, (x, w, bias) = (x, w, bias), (_autocast(t, dtype, device_type) for t in (x, w, bias))
        bound = fast.found(call, x, w, bias, params)
        if bound is None:
            fast.disappoint(call, dtype, *given, params)
    else:
        bound = fast.found(call, x, w, bias, params)
    if bound is None:
        return None
    asked = x.requires_grad or w.requires_grad or (bias is not None and bias.requires_grad)
    if asked and torch.is_grad_enabled():
        return function.apply((bound, params), x, w, bias)
    return bound(x, w, bias)


def _caller(*tensors: Tensor) -> Callable[..., Tensor]:
    """How a backward pass calls operators on these: not by the dispatcher where nobody would see the difference."""
    if torch.is_grad_enabled() or tensors[0].is_complex():  # of complex ones a lazy conjugate is taken
        return _dispatched
    return _straight if fast.alone(*tensors) else _dispatched


def _dispatched(op, *args: Any) -> Tensor:
    return op(*args)


def _straight(op, a: Tensor, b: Tensor, third: Any, *params: Any) -> Tensor:
    return fast.computed(_CALLS[op], a, b, _frozen(third), tuple(map(_frozen, params)))


def _frozen(value: Any) -> Any:
    return tuple(value) if type(value) is list else value


# ---------------------------------------------------------------------------------------------------------------------
# What each operator computes: a role, a geometry and the operands, shared by real and fake kernels.


def _pairs(padding: Sequence[int]) -> tuple[tuple[int, int], ...]:
    if len(padding) % 2:
        raise RuntimeError(f"expected padding to hold (lower, upper) of each axis, but got padding={list(padding)}")
    return tuple(zip(padding[::2], padding[1::2], strict=True))


def _modes(padding_mode: str, weight_shape: Sequence[int]) -> tuple[str, ...]:
    """A mode per axis."""
    rank, modes = len(weight_shape) - 2, tuple(padding_mode.split(","))
    if len(modes) not in (1, rank):
        raise RuntimeError(
            f"expected padding_mode to be one name or {rank} joined by commas, but got padding_mode={padding_mode!r} "
            f"(weight {list(weight_shape)})"
        )
    return modes if len(modes) == rank else modes * rank


@lru_cache(maxsize=8192)
def _cached(make: Callable[..., ConvGeometry], *args: Any) -> ConvGeometry:
    return make(*args)


def _geometry(make: Callable[..., ConvGeometry], *args: Any) -> ConvGeometry:
    frozen = tuple(tuple(a) if isinstance(a, (list, torch.Size)) else a for a in args)
    return make(*frozen) if _symbolic(frozen) else _cached(make, *frozen)


def _symbolic(value: Any) -> bool:
    return any(map(_symbolic, value)) if isinstance(value, tuple) else isinstance(value, torch.SymInt)


def _conv_call(input, weight, bias, stride, padding, dilation, groups, padding_mode, precision) -> Call:
    geometry = _geometry(
        ConvGeometry.forward,
        input.shape,
        weight.shape,
        stride,
        _pairs(padding),
        dilation,
        groups,
        _modes(padding_mode, weight.shape),
    )
    _check_operands(bias, geometry.K, precision, input=input, weight=weight)
    return Call(Role.FPROP, geometry, input, weight, bias, precision)


def _conv_transpose_call(
    input, weight, bias, stride, padding, output_padding, groups, dilation, padding_mode, precision
) -> Call:
    geometry = _geometry(
        ConvGeometry.transposed,
        input.shape,
        weight.shape,
        stride,
        _pairs(padding),
        output_padding,
        groups,
        dilation,
        _modes(padding_mode, weight.shape),
    )
    _check_operands(bias, geometry.C, precision, input=input, weight=weight)
    return Call(Role.DGRAD, geometry, input, weight, bias, precision)


def _conv_dgrad_call(
    grad_output, weight, input_size, stride, padding, dilation, groups, padding_mode, precision
) -> Call:
    geometry = _geometry(
        ConvGeometry.gradient,
        input_size,
        weight.shape,
        grad_output.shape,
        stride,
        _pairs(padding),
        dilation,
        groups,
        _modes(padding_mode, weight.shape),
    )
    _check_operands(None, geometry.C, precision, grad_output=grad_output, weight=weight)
    return Call(Role.DGRAD, geometry, grad_output, weight, None, precision)


def _conv_wgrad_call(
    grad_output, input, weight_size, weight_stride, stride, padding, dilation, groups, padding_mode, precision
) -> Call:
    geometry = _geometry(
        ConvGeometry.gradient,
        input.shape,
        weight_size,
        grad_output.shape,
        stride,
        _pairs(padding),
        dilation,
        groups,
        _modes(padding_mode, weight_size),
    )
    _check_operands(None, geometry.K, precision, grad_output=grad_output, input=input)
    if len(weight_stride) != len(weight_size) or not _dense(weight_size, weight_stride):
        raise RuntimeError(
            f"weight_stride must leave no gaps and no overlaps, but got {list(weight_stride)} for {list(weight_size)}"
        )
    return Call(Role.WGRAD, geometry, grad_output, input, None, precision, tuple(weight_stride))


def _conv_scaled_call(
    input, weight, bias, stride, padding, dilation, groups, padding_mode, scale_a, scale_b, out_dtype
) -> Call:
    if out_dtype not in OUT_DTYPES:
        raise RuntimeError(f"expected out_dtype to be one of {OUT_DTYPES}, but got {out_dtype}")
    scales = (scale_a, scale_b)
    check_given(conv_scaled, scale_a=scale_a, scale_b=scale_b)
    for name, scale in zip(("scale_a", "scale_b"), scales, strict=True):
        if scale.dtype != torch.float32 or scale.numel() != 1:
            raise RuntimeError(f"expected {name} to be one float32, but got {scale.dtype} {list(scale.shape)}")
        _check_device("input", input, name, scale)
    params = (stride, padding, dilation, groups, padding_mode, None)
    return _low_precision_call(torch.float8_e4m3fn, out_dtype, scales, input, weight, bias, params)


def _conv_int_call(input, weight, bias, stride, padding, dilation, groups, padding_mode) -> Call:
    params = (stride, padding, dilation, groups, padding_mode, None)
    return _low_precision_call(torch.int8, torch.int32, None, input, weight, bias, params)


def _low_precision_call(dtype, out_dtype, scales, input, weight, bias, params) -> Call:
    for name, t, expected in (("input", input, dtype), ("weight", weight, dtype), ("bias", bias, out_dtype)):
        if t is None:
            continue
        if t.dtype != expected:
            raise RuntimeError(f"expected {name} of {expected}, but got {t.dtype} {list(t.shape)}")
        _check_device("input", input, name, t)
    call = _conv_call(input, weight, None, *params)
    _check_bias(bias, call.geometry.K, weight)
    return replace(call, bias=bias, scales=scales, out_dtype=out_dtype)


def _dense(size: Sequence[int], stride: Sequence[int]) -> bool:
    """Whether elements of these strides fill one block of memory, in whatever order of dimensions."""
    expected = 1
    if any(n == 0 for n in size):
        return True
    for step, extent in sorted((s, n) for s, n in zip(stride, size, strict=True) if n != 1):
        if step != expected:
            return False
        expected *= extent
    return True


def check_precision(precision: Any) -> None:
    if precision is not None and (not isinstance(precision, str) or precision not in PRECISIONS):
        raise ValueError(f"precision must be None or one of {PRECISIONS}, but got precision={precision!r}")


def _check_operands(bias: Tensor | None, channels: int, precision: str | None, **tensors: Tensor) -> None:
    (first_name, first), (second_name, second) = tensors.items()
    _check_bias(bias, channels, second)
    check_precision(precision)
    for name, t in ((second_name, second), ("bias", bias)):
        if t is None:
            continue
        if t.dtype != first.dtype:
            raise RuntimeError(
                f"{first_name.capitalize()} type ({first.dtype}) and {name} type ({t.dtype}) should be the same "
                f"({first_name} {list(first.shape)}, {name} {list(t.shape)})"
            )
        _check_device(first_name, first, name, t)


def check_given(op: Any, **tensors: Tensor | None) -> None:
    """Raises for a tensor that is not there: PyTorch takes None for any, and leaves it to the operator."""
    for name, t in tensors.items():
        if t is None:
            raise TypeError(f"{op._schema.name}(): argument '{name}' must be Tensor, not NoneType")


def _check_bias(bias: Tensor | None, channels: int, weight: Tensor) -> None:
    if bias is not None and (bias.dim() != 1 or bias.shape[0] != channels):
        raise RuntimeError(
            f"Given weight of size {list(weight.shape)}, expected bias to be 1-dimensional with {channels} elements, "
            f"but got bias of size {list(bias.shape)} instead"
        )


def _check_device(first_name: str, first: Tensor, name: str, t: Tensor) -> None:
    if t.device != first.device:
        raise RuntimeError(
            f"Expected all tensors to be on the same device, but {first_name} {list(first.shape)} is on "
            f"{first.device} and {name} {list(t.shape)} is on {t.device}"
        )


# ---------------------------------------------------------------------------------------------------------------------
# Autograd. `_SingleLevelFunction` is the autograd.Function that a dispatcher kernel may use: torch.func's transforms
# call the operator's Autograd kernel once per level and must not be entered again from inside it.


def _below_autograd(op, *args):
    with torch._C._AutoDispatchBelowAutograd():
        if torch._C._functorch.peek_interpreter_stack() is None:
            return op(*args)
        with torch.enable_grad(), _set_fwd_grad_enabled(True):  # a Function turns both off; outer transforms want them
            return op(*args)


class _SingleLevelFunction(torch.autograd.function._SingleLevelFunction):
    @staticmethod
    def _compiled_autograd_key(ctx):
        """What compiled autograd asks of a node, and torch gives to torch.autograd.Function alone."""
        return (ctx._autograd_function_id,)


class _Fprop(_SingleLevelFunction):
    @staticmethod
    def forward(op, x, w, bias, *params):
        return _below_autograd(op, x, w, bias, *params)

    @staticmethod
    def setup_context(ctx, inputs, output):
        _, x, w, _, *ctx.params = inputs
        ctx.output_shape = output.shape
        _save(ctx, x, w)

    @staticmethod
    def backward(ctx, dy):
        if dy is None:
            return (None,) * (4 + len(ctx.params))
        (x, w), needs = ctx.saved_tensors, ctx.needs_input_grad
        dx, dw = fprop_gradients(dy, x, w, ctx.params, needs[1], needs[2])
        return None, dx, dw, _bias_gradient(dy) if needs[3] else None, *[None] * len(ctx.params)

    @staticmethod
    def jvp(ctx, _, dx, dw, dbias, *unused):
        x, w = ctx.saved_tensors
        parts = [
            None if dx is None else fprop(dx, w, None, ctx.params),
            None if dw is None else fprop(x, dw, None, ctx.params),
        ]
        return _sum_of(parts, dbias, ctx.output_shape)


def fprop_gradients(
    dy: Tensor, x: Tensor, w: Tensor, params: Sequence[Any], of_x: bool, of_w: bool
) -> tuple[Tensor | None, Tensor | None]:
    """(dx, dw) of a convolution with these parameters, where they are asked for."""
    call = _caller(dy, x, w)
    dx = call(conv_dgrad, dy, w.conj(), x.shape, *params) if of_x else None
    dw = call(conv_wgrad, dy, x.conj(), w.shape, _gradient_strides(w), *params) if of_w else None
    return dx, dw


class _Transpose(_SingleLevelFunction):
    @staticmethod
    def forward(op, x, w, bias, *params):
        return _below_autograd(op, x, w, bias, *params)

    @staticmethod
    def setup_context(ctx, inputs, output):
        _, x, w, _, *ctx.params = inputs
        ctx.output_shape = output.shape
        _save(ctx, x, w)

    @staticmethod
    def backward(ctx, dy):
        if dy is None:
            return (None,) * (4 + len(ctx.params))
        (x, w), needs = ctx.saved_tensors, ctx.needs_input_grad
        dx, dw = transpose_gradients(dy, x, w, ctx.params, needs[1], needs[2])
        return None, dx, dw, _bias_gradient(dy) if needs[3] else None, *[None] * len(ctx.params)

    @staticmethod
    def jvp(ctx, _, dx, dw, dbias, *unused):
        x, w = ctx.saved_tensors
        parts = [
            None if dx is None else conv_transpose(dx, w, None, *ctx.params),
            None if dw is None else conv_transpose(x, dw, None, *ctx.params),
        ]
        return _sum_of(parts, dbias, ctx.output_shape)


def transpose_gradients(
    dy: Tensor, x: Tensor, w: Tensor, params: Sequence[Any], of_x: bool, of_w: bool
) -> tuple[Tensor | None, Tensor | None]:
    """(dx, dw) of a transposed convolution with these parameters, where they are asked for."""
    forward = _forward_params(params)
    dx = _fprop_cropped(dy, w.conj(), x, forward) if of_x else None
    how = (w.shape, _gradient_strides(w), *forward)
    dw = _caller(x, dy)(conv_wgrad, x.conj(), dy, *how) if of_w else None
    return dx, dw


def _forward_params(params: Sequence[Any]) -> tuple:
    """Those of the convolution whose transpose has `params`."""
    stride, padding, _, groups, dilation, mode, precision = params
    return stride, padding, dilation, groups, mode, precision


class _Dgrad(_SingleLevelFunction):
    @staticmethod
    def forward(op, dy, w, input_size, *params):
        return _below_autograd(op, dy, w, input_size, *params)

    @staticmethod
    def setup_context(ctx, inputs, output):
        _, dy, w, ctx.input_size, *ctx.params = inputs
        _save(ctx, dy, w)

    @staticmethod
    def backward(ctx, g):
        if g is None:
            return (None,) * (4 + len(ctx.params))
        (dy, w), needs = ctx.saved_tensors, ctx.needs_input_grad
        ddy = _fprop_cropped(g, w.conj(), dy, ctx.params) if needs[1] else None
        dw = conv_wgrad(dy.conj(), g, w.shape, _gradient_strides(w), *ctx.params) if needs[2] else None
        return None, ddy, dw, None, *[None] * len(ctx.params)

    @staticmethod
    def jvp(ctx, _, ddy, dw, *unused):
        dy, w = ctx.saved_tensors
        parts = [
            None if ddy is None else conv_dgrad(ddy, w, ctx.input_size, *ctx.params),
            None if dw is None else conv_dgrad(dy, dw, ctx.input_size, *ctx.params),
        ]
        return _sum_of(parts, None)


class _Wgrad(_SingleLevelFunction):
    @staticmethod
    def forward(op, dy, x, weight_size, weight_stride, *params):
        return _below_autograd(op, dy, x, weight_size, weight_stride, *params)

    @staticmethod
    def setup_context(ctx, inputs, output):
        _, dy, x, ctx.weight_size, ctx.weight_stride, *ctx.params = inputs
        _save(ctx, dy, x)

    @staticmethod
    def backward(ctx, g):
        if g is None:
            return (None,) * (5 + len(ctx.params))
        (dy, x), needs = ctx.saved_tensors, ctx.needs_input_grad
        ddy = _fprop_cropped(x.conj(), g, dy, ctx.params) if needs[1] else None
        dx = conv_dgrad(dy.conj(), g, x.shape, *ctx.params) if needs[2] else None
        return None, ddy, dx, None, None, *[None] * len(ctx.params)

    @staticmethod
    def jvp(ctx, _, ddy, dx, *unused):
        dy, x = ctx.saved_tensors
        parts = [
            None if ddy is None else conv_wgrad(ddy, x, ctx.weight_size, ctx.weight_stride, *ctx.params),
            None if dx is None else conv_wgrad(dy, dx, ctx.weight_size, ctx.weight_stride, *ctx.params),
        ]
        return _sum_of(parts, None)


def _save(ctx, *tensors: Tensor) -> None:
    ctx.set_materialize_grads(False)  # a tangent that is not there is not convolved as zeros
    ctx.save_for_backward(*tensors)
    ctx.save_for_forward(*tensors)


def _fprop_cropped(x: Tensor, w: Tensor, like: Tensor, params: Sequence[Any]) -> Tensor:
    """fprop with the output extents of `like`, which an output_padding >= stride makes smaller than the full ones."""
    with _without_autocast(x.device.type):  # a gradient has its operands' precision, like those that are not autocast
        y = _caller(x, w)(recordable(_fprop_op(params)), x, w, None, *params)
    for axis in range(2, y.dim()):
        if y.shape[axis] != like.shape[axis]:
            y = y.narrow(axis, 0, like.shape[axis])
    return y


def _without_autocast(device_type: str) -> Any:
    if torch.compiler.is_compiling():  # compiled autograd reads this, and knows no other
        return torch.autocast(device_type, enabled=False)
    return torch._C._DisableAutocast()


def _gradient_strides(w: Tensor) -> Sequence[int]:
    """The strides autograd wants a gradient to have: the parameter's own where it is dense, else contiguous."""
    if type(w) in fast.PLAIN_TYPES and (w.is_contiguous() or _channels_last(w)):
        return w.stride()  # the question below takes 20 us
    dense = torch._prims_common.is_non_overlapping_and_dense_or_false(w)
    return w.stride() if dense else torch._prims_common.make_contiguous_strides_for(w.shape)


def _channels_last(t: Tensor) -> bool:
    memory_format = {4: torch.channels_last, 5: torch.channels_last_3d}.get(t.dim())
    return memory_format is not None and t.is_contiguous(memory_format=memory_format)


def _bias_gradient(dy: Tensor) -> Tensor:
    return dy.sum([0, *range(2, dy.dim())])


def _sum_of(parts: Sequence[Tensor | None], bias: Tensor | None, shape: Sequence[int] = ()) -> Tensor:
    """The tangent of an output of this shape: whatever of its parts is there."""
    present = [p for p in parts if p is not None]
    if bias is not None:
        wide = bias.view(1, -1, *(1,) * (len(shape) - 2))
        present.append(wide if present else wide.expand(shape).contiguous())
    total = present[0]
    for p in present[1:]:
        total = total + p
    return total


class _Again(_SingleLevelFunction):
    """A forward of a `fast.Bound`, as a Function that need not find out how it was called."""

    @staticmethod
    def forward(ctx, how, x, w, bias):
        bound, ctx.params = how
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x, w)
        return bound(x, w, bias)


class _FpropAgain(_Again):
    @staticmethod
    def backward(ctx, dy):
        return _Fprop.backward(ctx, dy)[:4]


class _TransposeAgain(_Again):
    @staticmethod
    def backward(ctx, dy):
        return _Transpose.backward(ctx, dy)[:4]


_AGAIN: dict[Any, tuple[Callable[..., Call], Any]] = {
    conv: (_conv_call, _FpropAgain),
    conv_transpose: (_conv_transpose_call, _TransposeAgain),
}


class _NoGradient(_SingleLevelFunction):
    """An operator that has no derivative, and says so where one is asked for."""

    @staticmethod
    def forward(op, *args):
        return _below_autograd(op, *args)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.name = inputs[0]._schema.name

    @staticmethod
    def backward(ctx, dy):
        raise RuntimeError(f"{ctx.name} has no gradient: it is for inference")

    @staticmethod
    def jvp(ctx, *tangents):
        raise RuntimeError(f"{ctx.name} has no derivative: it is for inference")


# ---------------------------------------------------------------------------------------------------------------------
# vmap. A batch of one operand folds into an axis that no other operand has: inputs into N, weights and gradients into
# their channels of the output. A batch of both folds into groups.


_GROUPS = 3  # the place of groups in every operator's parameters


def _front(t: Tensor, dim: int | None, size: int) -> Tensor:
    return t.unsqueeze(0).expand(size, *t.shape) if dim is None else t.movedim(dim, 0)


def _folded(t: Tensor, dim: int | None, size: int, axis: int) -> Tensor:
    """t with its batch as the outer part of `axis`; without a batch it is repeated."""
    return _front(t, dim, size).movedim(0, axis).flatten(axis, axis + 1)


def _unfolded(t: Tensor, size: int, axis: int) -> Tensor:
    return t.unflatten(axis, (size, t.shape[axis] // size)).movedim(axis, 0)


def _with_bias(y: Tensor, bias: Tensor | None, dim: int | None) -> Tensor:
    """Adds bias (C) or a batch of them to y (batch, N, C, ...)."""
    if bias is None:
        return y
    bias = bias.unsqueeze(0) if dim is None else bias.movedim(dim, 0)
    return y + bias.reshape(bias.shape[0], 1, bias.shape[1], *(1,) * (y.dim() - 3))


def _activation_vmap(op, output_channels: int):
    """The rule of an operator that maps an activation and a weight, whose axis it names, to an activation."""

    def rule(info, in_dims, a, w, third, *params):
        bias, bias_dim, sizes = (third, in_dims[2], None) if op is not conv_dgrad else (None, None, third)
        size, (a_dim, w_dim) = info.batch_size, in_dims[:2]
        if a_dim is None and w_dim is None:
            return _with_bias(op(a, w, None, *params).unsqueeze(0), bias, bias_dim), 0
        if w_dim is None:
            folded = _folded(a, a_dim, size, 0)
            last = [folded.shape[0], *sizes[1:]] if sizes is not None else (bias if bias_dim is None else None)
            y = _unfolded(op(folded, w, last, *params), size, 0)
            return (y if bias_dim is None else _with_bias(y, bias, bias_dim)), 0
        last = None if sizes is None else [sizes[0], sizes[1] * size, *sizes[2:]]
        if a_dim is None and params[_GROUPS] == 1:  # with more, the channels of a group would not stay together
            y = op(a, _folded(w, w_dim, size, output_channels), last, *params)
        else:
            grouped = list(params)
            grouped[_GROUPS] = params[_GROUPS] * size
            y = op(_folded(a, a_dim, size, 1), _folded(w, w_dim, size, 0), last, *grouped)
        return _with_bias(_unfolded(y, size, 1), bias, bias_dim), 0

    return rule


def _scaled_vmap(info, in_dims, a, w, bias, *params):
    if any(dim is not None for dim in in_dims[-3:-1]):
        raise NotImplementedError("vmap over the scales of triton_conv::conv_scaled is not supported")
    return _activation_vmap(conv_scaled, 0)(info, in_dims, a, w, bias, *params)


def _wgrad_vmap(info, in_dims, dy, x, weight_size, weight_stride, *params):
    size, (dy_dim, x_dim) = info.batch_size, in_dims[:2]
    grouped, axis = list(params), 0
    if params[_GROUPS] == 1 and x_dim is None:
        dy = _folded(dy, dy_dim, size, 1)
    elif params[_GROUPS] == 1 and dy_dim is None:
        x, axis = _folded(x, x_dim, size, 1), 1
    else:
        dy, x = _folded(dy, dy_dim, size, 1), _folded(x, x_dim, size, 1)
        grouped[_GROUPS] = params[_GROUPS] * size
    many = [*weight_size[:axis], weight_size[axis] * size, *weight_size[axis + 1 :]]
    strides = torch._prims_common.make_contiguous_strides_for(many)
    return _unfolded(conv_wgrad(dy, x, many, strides, *grouped), size, axis), 0


# ---------------------------------------------------------------------------------------------------------------------
# Registration.


def _derived(args: Sequence[Any]) -> bool:
    """Whether anything may be differentiated with respect to one of these arguments."""
    if torch.autograd.forward_ad._current_level >= 0 or torch._C._functorch.peek_interpreter_stack() is not None:
        return True
    return torch.is_grad_enabled() and any(isinstance(a, Tensor) and a.requires_grad for a in args)


def _autograd_kernel(op, function):
    def kernel(*args):
        if not _derived(args):  # a third of the time of a Function
            with torch._C._AutoDispatchBelowAutograd():
                return op(*args)
        with enable_single_level_autograd_function():
            return function.apply(op, *args)

    return kernel


def _autocast(value: Any, dtype: torch.dtype, device_type: str) -> Any:
    """An argument as autocast to `dtype` on that kind of device wants it."""
    eligible = isinstance(value, Tensor) and value.is_floating_point() and value.dtype != torch.float64
    return value.to(dtype) if eligible and value.device.type == device_type else value


def _autocast_kernel(op, device_type: str, wide: Sequence[int] = ()):
    """Casts its arguments, but for those at the places in `wide` if they are float32."""
    key = getattr(torch._C.DispatchKey, {"cpu": "AutocastCPU", "cuda": "AutocastCUDA"}[device_type])
    keys = torch._C.DispatchKeySet(key)

    def kernel(*args):
        dtype = torch.get_autocast_dtype(device_type)
        cast = [_autocast(a, dtype, device_type) for a in args]
        for place in wide:
            if args[place] is not None and args[place].dtype is torch.float32:
                cast[place] = args[place]
        with torch._C._ExcludeDispatchKeyGuard(keys):
            return op(*cast)

    return kernel


_CALLS: dict[Any, Callable[..., Call]] = {}


def _register(op, call: Callable[..., Call], function, vmap_rule, autocast: bool) -> None:
    name = op._schema.name.split("::")[1]
    _CALLS[op] = call

    first, second = (argument.name for argument in op._schema.arguments[:2])

    def run(a, b, third, *params):
        if a is None or b is None:
            check_given(op, **{first: a, second: b})
        if op is conv_scaled:  # its parameters hold tensors
            return execute(call(a, b, third, *params))
        return fast.computed(call, a, b, _frozen(third), tuple(map(_frozen, params)))

    def fake(*args):
        return empty_output(call(*args))

    _lib.impl(name, run, "CPU")
    _lib.impl(name, run, "CUDA")
    torch.library.register_fake(op._schema.name, fake, lib=_lib)
    _lib.impl(name, _autograd_kernel(op, function), "Autograd")
    torch.library.register_vmap(op._schema.name, vmap_rule, lib=_lib)
    if autocast:
        for device_type, key in (("cpu", "AutocastCPU"), ("cuda", "AutocastCUDA")):
            _lib.impl(name, _autocast_kernel(op, device_type), key)


_register(conv, _conv_call, _Fprop, _activation_vmap(conv, 0), True)
_register(conv_dilated, _conv_call, _Fprop, _activation_vmap(conv_dilated, 0), True)
_register(conv_transpose, _conv_transpose_call, _Transpose, _activation_vmap(conv_transpose, 1), True)
_register(conv_dgrad, _conv_dgrad_call, _Dgrad, _activation_vmap(conv_dgrad, 1), False)
_register(conv_wgrad, _conv_wgrad_call, _Wgrad, _wgrad_vmap, False)
_register(conv_scaled, _conv_scaled_call, _NoGradient, _scaled_vmap, False)
_register(conv_int, _conv_int_call, _NoGradient, _activation_vmap(conv_int, 0), False)


# ---------------------------------------------------------------------------------------------------------------------
# FLOP counting.


def _register_flop_formulas() -> None:
    from torch.utils.flop_counter import flop_registry, register_flop_formula

    def formula(call: Callable[..., Call]) -> Callable[..., int]:
        return lambda *args, out_val=None, **kwargs: call(*args, **kwargs).geometry.flops

    for op, call in _CALLS.items():
        if op.overloadpacket in flop_registry:
            continue
        register_flop_formula(op.overloadpacket, get_raw=True)(formula(call))


# Importing it here would take a fifth of a second, and import Triton, which reads TRITON_INTERPRET as it loads.
when_imported("torch.utils.flop_counter", _register_flop_formulas)
