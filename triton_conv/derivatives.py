"""Autograd of the operators: each derivative is made of the other primitives.

`SingleLevelFunction` is the autograd.Function that a dispatcher kernel may use: torch.func's transforms call the
operator's Autograd kernel once per level and must not be entered again from inside it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._functorch.autograd_function import enable_single_level_autograd_function
from torch.autograd.forward_ad import _set_fwd_grad_enabled

from . import fast
from .conv_calls import CALLS, hashable
from .schemas import conv_dgrad, conv_transpose, conv_wgrad, fprop, fprop_op, recordable


def _caller(*tensors: Tensor) -> Callable[..., Tensor]:
    """How a backward pass calls operators on these: not by the dispatcher where nobody would see the difference."""
    if torch.is_grad_enabled() or tensors[0].is_complex():  # of complex ones a lazy conjugate is taken
        return _dispatched
    return _straight if fast.alone(*tensors) else _dispatched


def _dispatched(op, *args: Any) -> Tensor:
    return op(*args)


def _straight(op, a: Tensor, b: Tensor, third: Any, *params: Any) -> Tensor:
    return fast.computed(CALLS[op], a, b, hashable(third), tuple(map(hashable, params)))


def below_autograd(op, *args):
    with torch._C._AutoDispatchBelowAutograd():
        if torch._C._functorch.peek_interpreter_stack() is None:
            return op(*args)
        with torch.enable_grad(), _set_fwd_grad_enabled(True):  # a Function turns both off; outer transforms want them
            return op(*args)


class SingleLevelFunction(torch.autograd.function._SingleLevelFunction):
    @staticmethod
    def _compiled_autograd_key(ctx):
        """What compiled autograd asks of a node, and torch gives to torch.autograd.Function alone."""
        return (ctx._autograd_function_id,)


class Fprop(SingleLevelFunction):
    @staticmethod
    def forward(op, x, w, bias, *params):
        return below_autograd(op, x, w, bias, *params)

    @staticmethod
    def setup_context(ctx, inputs, output):
        _, x, w, _, *ctx.params = inputs
        ctx.output_shape = output.shape
        save(ctx, x, w)

    @staticmethod
    def backward(ctx, dy):
        if dy is None:
            return (None,) * (4 + len(ctx.params))
        (x, w), needs = ctx.saved_tensors, ctx.needs_input_grad
        dx, dw = fprop_gradients(dy, x, w, ctx.params, needs[1], needs[2])
        return None, dx, dw, bias_gradient(dy) if needs[3] else None, *[None] * len(ctx.params)

    @staticmethod
    def jvp(ctx, _, dx, dw, dbias, *unused):
        x, w = ctx.saved_tensors
        parts = [
            None if dx is None else fprop(dx, w, None, ctx.params),
            None if dw is None else fprop(x, dw, None, ctx.params),
        ]
        return sum_of(parts, dbias, ctx.output_shape)


def fprop_gradients(
    dy: Tensor, x: Tensor, w: Tensor, params: Sequence[Any], of_x: bool, of_w: bool
) -> tuple[Tensor | None, Tensor | None]:
    """(dx, dw) of a convolution with these parameters, where they are asked for."""
    call = _caller(dy, x, w)
    dx = call(conv_dgrad, dy, w.conj(), x.shape, *params) if of_x else None
    dw = call(conv_wgrad, dy, x.conj(), w.shape, gradient_strides(w), *params) if of_w else None
    return dx, dw


class Transpose(Fprop):
    @staticmethod
    def backward(ctx, dy):
        if dy is None:
            return (None,) * (4 + len(ctx.params))
        (x, w), needs = ctx.saved_tensors, ctx.needs_input_grad
        dx, dw = transpose_gradients(dy, x, w, ctx.params, needs[1], needs[2])
        return None, dx, dw, bias_gradient(dy) if needs[3] else None, *[None] * len(ctx.params)

    @staticmethod
    def jvp(ctx, _, dx, dw, dbias, *unused):
        x, w = ctx.saved_tensors
        parts = [
            None if dx is None else conv_transpose(dx, w, None, *ctx.params),
            None if dw is None else conv_transpose(x, dw, None, *ctx.params),
        ]
        return sum_of(parts, dbias, ctx.output_shape)


def transpose_gradients(
    dy: Tensor, x: Tensor, w: Tensor, params: Sequence[Any], of_x: bool, of_w: bool
) -> tuple[Tensor | None, Tensor | None]:
    """(dx, dw) of a transposed convolution with these parameters, where they are asked for."""
    forward = _forward_params(params)
    dx = _fprop_cropped(dy, w.conj(), x, forward) if of_x else None
    how = (w.shape, gradient_strides(w), *forward)
    dw = _caller(x, dy)(conv_wgrad, x.conj(), dy, *how) if of_w else None
    return dx, dw


def _forward_params(params: Sequence[Any]) -> tuple:
    """Those of the convolution whose transpose has `params`."""
    stride, padding, _, groups, dilation, mode, precision = params
    return stride, padding, dilation, groups, mode, precision


class Dgrad(SingleLevelFunction):
    @staticmethod
    def forward(op, dy, w, input_size, *params):
        return below_autograd(op, dy, w, input_size, *params)

    @staticmethod
    def setup_context(ctx, inputs, output):
        _, dy, w, ctx.input_size, *ctx.params = inputs
        save(ctx, dy, w)

    @staticmethod
    def backward(ctx, g):
        if g is None:
            return (None,) * (4 + len(ctx.params))
        (dy, w), needs = ctx.saved_tensors, ctx.needs_input_grad
        ddy = _fprop_cropped(g, w.conj(), dy, ctx.params) if needs[1] else None
        dw = conv_wgrad(dy.conj(), g, w.shape, gradient_strides(w), *ctx.params) if needs[2] else None
        return None, ddy, dw, None, *[None] * len(ctx.params)

    @staticmethod
    def jvp(ctx, _, ddy, dw, *unused):
        dy, w = ctx.saved_tensors
        parts = [
            None if ddy is None else conv_dgrad(ddy, w, ctx.input_size, *ctx.params),
            None if dw is None else conv_dgrad(dy, dw, ctx.input_size, *ctx.params),
        ]
        return sum_of(parts, None)


class Wgrad(SingleLevelFunction):
    @staticmethod
    def forward(op, dy, x, weight_size, weight_stride, *params):
        return below_autograd(op, dy, x, weight_size, weight_stride, *params)

    @staticmethod
    def setup_context(ctx, inputs, output):
        _, dy, x, ctx.weight_size, ctx.weight_stride, *ctx.params = inputs
        save(ctx, dy, x)

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
        return sum_of(parts, None)


def save(ctx, *tensors: Tensor) -> None:
    ctx.set_materialize_grads(False)  # a tangent that is not there is not convolved as zeros
    ctx.save_for_backward(*tensors)
    ctx.save_for_forward(*tensors)


def _fprop_cropped(x: Tensor, w: Tensor, like: Tensor, params: Sequence[Any]) -> Tensor:
    """fprop with the output extents of `like`, which an output_padding >= stride makes smaller than the full ones."""
    with without_autocast(x.device.type):  # a gradient has its operands' precision, like those that are not autocast
        y = _caller(x, w)(recordable(fprop_op(params)), x, w, None, *params)
    for axis in range(2, y.dim()):
        if y.shape[axis] != like.shape[axis]:
            y = y.narrow(axis, 0, like.shape[axis])
    return y


def without_autocast(device_type: str) -> Any:
    if torch.compiler.is_compiling():  # compiled autograd reads this, and knows no other
        return torch.autocast(device_type, enabled=False)
    return torch._C._DisableAutocast()


def gradient_strides(w: Tensor) -> Sequence[int]:
    """The strides autograd wants a gradient to have: the parameter's own where it is dense, else contiguous."""
    if type(w) in fast.PLAIN_TYPES and (w.is_contiguous() or _channels_last(w)):
        return w.stride()  # the question below takes 20 us
    dense = torch._prims_common.is_non_overlapping_and_dense_or_false(w)
    return w.stride() if dense else torch._prims_common.make_contiguous_strides_for(w.shape)


def _channels_last(t: Tensor) -> bool:
    memory_format = {4: torch.channels_last, 5: torch.channels_last_3d}.get(t.dim())
    return memory_format is not None and t.is_contiguous(memory_format=memory_format)


def bias_gradient(dy: Tensor) -> Tensor:
    return dy.sum([0, *range(2, dy.dim())])


def sum_of(parts: Sequence[Tensor | None], bias: Tensor | None, shape: Sequence[int] = ()) -> Tensor:
    """The tangent of an output of this shape: whatever of its parts is there."""
    present = [p for p in parts if p is not None]
    if bias is not None:
        wide = bias.view(1, -1, *(1,) * (len(shape) - 2))
        present.append(wide if present else wide.expand(shape).contiguous())
    total = present[0]
    for p in present[1:]:
        total = total + p
    return total


class _Again(SingleLevelFunction):
    """A forward of a `fast.Bound`, as a Function that need not find out how it was called."""

    @staticmethod
    def forward(ctx, how, x, w, bias):
        bound, ctx.params = how
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x, w)
        return bound(x, w, bias)


class FpropAgain(_Again):
    @staticmethod
    def backward(ctx, dy):
        return Fprop.backward(ctx, dy)[:4]


class TransposeAgain(_Again):
    @staticmethod
    def backward(ctx, dy):
        return Transpose.backward(ctx, dy)[:4]


class NoGradient(SingleLevelFunction):
    """An operator that has no derivative, and says so where one is asked for."""

    @staticmethod
    def forward(op, *args):
        return below_autograd(op, *args)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.name = inputs[0]._schema.name

    @staticmethod
    def backward(ctx, dy):
        raise RuntimeError(f"{ctx.name} has no gradient: it is for inference")

    @staticmethod
    def jvp(ctx, *tangents):
        raise RuntimeError(f"{ctx.name} has no derivative: it is for inference")


def derived(args: Sequence[Any]) -> bool:
    """Whether anything may be differentiated with respect to one of these arguments."""
    if torch.autograd.forward_ad._current_level >= 0 or torch._C._functorch.peek_interpreter_stack() is not None:
        return True
    return torch.is_grad_enabled() and any(isinstance(a, Tensor) and a.requires_grad for a in args)


def autograd_kernel(op, function):
    def kernel(*args):
        if not derived(args):  # a third of the time of a Function
            with torch._C._AutoDispatchBelowAutograd():
                return op(*args)
        with enable_single_level_autograd_function():
            return function.apply(op, *args)

    return kernel
