"""The registered operators of several convolutions over one input.

    triton_conv::multi_conv        branches side by side in the output's channels, or summed
    triton_conv::multi_conv_dgrad  its input gradient

Their other gradients are `triton_conv::conv_wgrad` of slices. Each is linear in the input and in all weights together,
and the derivatives of each are made of the other and of weight gradients, so gradients of any order exist. Arguments:
of each branch in turn two strides, four paddings ((lower, upper) of H, then of W), two dilations, groups, and the first
and the number of the channels that it reads; `combine` is "concatenate" or "sum". Forward-mode derivatives, functional
transforms and complex numbers go by one `triton_conv::conv` for each branch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import accumulate
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._functorch.autograd_function import enable_single_level_autograd_function

from . import backends, batching, branches_run, conv_calls, derivatives, execute, fast, ops, plan, recovery, schemas
from .branches_run import Calls, Slice
from .execute import Call
from .later import when_imported

COMBINE = ("concatenate", "sum")

_PARAMS = (
    "SymInt[] stride, SymInt[] padding, SymInt[] dilation, SymInt[] groups, SymInt[] channels, str combine, "
    "str? precision, bool? one_launch"
)
_lib = torch.library.Library("triton_conv", "FRAGMENT")
_lib.define(
    f"multi_conv(Tensor input, Tensor[] weights, Tensor?[] biases, {_PARAMS}) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)
_lib.define(
    f"multi_conv_dgrad(Tensor grad_output, Tensor[] weights, SymInt[] input_size, {_PARAMS}) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)
multi_conv = torch.ops.triton_conv.multi_conv.default
multi_conv_dgrad = torch.ops.triton_conv.multi_conv_dgrad.default


class Params(NamedTuple):
    """What all branches are, as the operators take it."""

    stride: Sequence[int]
    padding: Sequence[int]
    dilation: Sequence[int]
    groups: Sequence[int]
    channels: Sequence[int]
    combine: str
    precision: str | None
    one_launch: bool | None

    def of(self, i: int) -> tuple:
        """The parameters of one branch, as `triton_conv::conv` takes them."""
        stride, padding, dilation = self.stride[2 * i : 2 * i + 2], self.padding[4 * i : 4 * i + 4], self.dilation
        return list(stride), list(padding), list(dilation[2 * i : 2 * i + 2]), self.groups[i], "zeros", self.precision

    def read(self, i: int) -> Slice:
        """The input channels that a branch reads."""
        return self.channels[2 * i], self.channels[2 * i + 1]

    def written(self, weights: Sequence[Tensor]) -> list[Slice]:
        """The output channels that each branch writes."""
        counts = [w.shape[0] for w in weights]
        if self.combine == "sum":
            return [(0, counts[0])] * len(counts)
        return list(zip(accumulate(counts[:-1], initial=0), counts, strict=True))


def _checked(what: str, first: Tensor, weights: Sequence[Tensor], params: Params, size: Sequence[int]) -> None:
    """Raises for what does not fit; `size` is the input's."""
    n = len(weights)
    if n == 0:
        raise RuntimeError("expected at least one branch, but got none")
    if params.combine not in COMBINE:
        raise ValueError(f"combine must be one of {COMBINE}, but got combine={params.combine!r}")
    sizes = {"stride": 2, "padding": 4, "dilation": 2, "groups": 1, "channels": 2}
    for name, each in sizes.items():
        if len(getattr(params, name)) != each * n:
            raise RuntimeError(f"expected {each} numbers of {name} for each of {n} branches, but got {params}")
    for i, w in enumerate(weights):
        if w.dim() != 4:
            raise RuntimeError(f"expected 4-dimensional weights, but got weight {i} of size {list(w.shape)}")
    if first.dim() != 4:
        raise RuntimeError(f"expected a 4-dimensional {what}, but got {what} of size {list(first.shape)}")
    if len(size) != 4:
        raise RuntimeError(f"expected input_size to have 4 entries, but got input_size={list(size)}")
    channels = size[1]
    for i in range(n):
        start, count = params.read(i)
        if start < 0 or count < 1 or start + count > channels:
            raise RuntimeError(
                f"branch {i} reads {count} channels from {start} on, but the input has {channels} "
                f"({what} {list(first.shape)}, weight {list(weights[i].shape)})"
            )


def _slice(t: Tensor, channels: Slice) -> Tensor:
    start, count = channels
    return t if count == t.shape[1] else t.narrow(1, start, count)


def _forward(input: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor | None], params: Params) -> Calls:
    _checked("input", input, weights, params, input.shape)
    if len(biases) != len(weights):
        raise RuntimeError(f"expected a bias or None for each of {len(weights)} weights, but got {len(biases)}")
    each: list[Call] = []
    for i, (w, b) in enumerate(zip(weights, biases, strict=True)):
        each.append(conv_calls.conv_call(_slice(input, params.read(i)), w, b, *params.of(i)))
    outputs = [call.output_shape for call in each]
    alike = 1 if params.combine == "sum" else 2
    if any(shape[alike:] != outputs[0][alike:] for shape in outputs):
        what = "channels and extents" if params.combine == "sum" else "extents"
        shapes = ", ".join(f"branch {i} {shape}" for i, shape in enumerate(outputs))
        raise RuntimeError(
            f"expected all branches to have the same output {what}, but got {shapes} (input {list(input.shape)})"
        )
    slices, reads = params.written(weights), (params.read(i) for i in range(len(weights)))
    return Calls(input, tuple(weights), tuple(each), tuple(reads), tuple(slices), sum(slices[-1]))


def _backward(grad_output: Tensor, weights: Sequence[Tensor], input_size: Sequence[int], params: Params) -> Calls:
    _checked("grad_output", grad_output, weights, params, input_size)
    slices = params.written(weights)
    if grad_output.shape[1] != sum(slices[-1]):
        raise RuntimeError(
            f"grad_output of size {list(grad_output.shape)} does not belong to branches with {sum(slices[-1])} channels"
        )
    each: list[Call] = []
    for i, (w, mine) in enumerate(zip(weights, slices, strict=True)):
        size = [input_size[0], params.read(i)[1], *input_size[2:]]
        each.append(conv_calls.conv_dgrad_call(_slice(grad_output, mine), w, size, *params.of(i)))
    read = tuple(params.read(i) for i in range(len(weights)))
    return Calls(grad_output, tuple(weights), tuple(each), tuple(slices), read, input_size[1])


# What calls came to, by all that decides them (`fast`); None where they are not one launch.
_bound = fast.Remembered()


def _computed(make: Callable[..., Calls], source: Tensor, weights: Sequence[Tensor], third: Any, params: tuple):
    """The output of `make(source, weights, third, params)`, at once where a call like it was made before."""
    biases = third if make is _forward else ()
    key = _decided(make, source, weights, third, params)
    bound = None if key is None else _bound.get(key)
    if bound is not None:
        try:
            return bound(source, weights, biases)
        except Exception as error:
            recovery.check(error)
    made = make(source, weights, third, Params(*params))
    output, bound = branches_run.run(made, params[-1])
    if (
        key is not None and _decided(make, source, weights, third, params) == key
    ):  # or a setting has been changed meanwhile
        _bound.remember(key, bound)
    return output


def _decided(make: Any, source: Tensor, weights: Sequence[Tensor], third: Any, params: tuple) -> tuple | None:
    """All that decides a call, None if it is not to be remembered."""
    if execute._recorded is not None or execute._seen:
        return None
    device = execute.device_of(source.device)
    if device is None:
        return None
    tensors = (source, *weights, *(third if make is _forward else ()))
    addresses = 0
    known: list[Any] = []
    for t in tensors:
        if t is not None:
            addresses |= t.data_ptr()
            known.append((t.shape, t.stride(), t.dtype, t.device))
        else:
            known.append(None)
    if addresses % 16:
        return None
    size = () if make is _forward else tuple(third)
    how = tuple(tuple(p) if type(p) is list else p for p in params)
    precision = backends.default_precision() if source.dtype is torch.float32 else None
    return make, size, tuple(known), how, id(device), precision, plan.settings()


def _run(input, weights, biases, *params) -> Tensor:
    conv_calls.check_given(multi_conv, input=input)
    biases = [None if b is None else b.resolve_neg() for b in biases]  # which the dispatcher does not in lists like it
    return _computed(_forward, input, weights, biases, params)


def _fake(input, weights, biases, *params) -> Tensor:
    return branches_run.empty_output(_forward(input, weights, biases, Params(*params)))


def _run_dgrad(grad_output, weights, input_size, *params) -> Tensor:
    conv_calls.check_given(multi_conv_dgrad, grad_output=grad_output)
    return _computed(_backward, grad_output, weights, input_size, params)


def _fake_dgrad(grad_output, weights, input_size, *params) -> Tensor:
    return branches_run.empty_output(_backward(grad_output, weights, input_size, Params(*params)))


# ---------------------------------------------------------------------------------------------------------------------
# The same by one operator for each branch, which has every derivative


def composed(input: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor | None], params: Params) -> Tensor:
    """One `triton_conv::conv` for each branch, then `torch.cat` or sums."""
    if not torch.jit.is_tracing():  # its extents are no numbers
        _forward(input, weights, biases, params)  # for its errors
    parts = [
        schemas.fprop(_slice(input, params.read(i)), w, b, params.of(i))
        for i, (w, b) in enumerate(zip(weights, biases, strict=True))
    ]
    return torch.cat(parts, 1) if params.combine == "concatenate" else sum(parts[1:], parts[0])


def _composed_dgrad(
    grad_output: Tensor, weights: Sequence[Tensor], input_size: Sequence[int], params: Params
) -> Tensor:
    _backward(grad_output, weights, input_size, params)
    total = grad_output.new_zeros(list(input_size))
    for i, (w, mine) in enumerate(zip(weights, params.written(weights), strict=True)):
        start, count = params.read(i)
        size = [input_size[0], count, *input_size[2:]]
        dx = ops.conv_dgrad(_slice(grad_output, mine), w, size, *params.of(i))
        rest = input_size[1] - start - count
        total = total + torch.nn.functional.pad(dx, (0, 0, 0, 0, start, rest))
    return total


# ---------------------------------------------------------------------------------------------------------------------
# Autograd, vmap and autocast


def _weight_gradients(dy: Tensor, x: Tensor, weights: Sequence[Tensor], params: Params, needs) -> list[Tensor | None]:
    found: list[Tensor | None] = []
    for i, (w, mine) in enumerate(zip(weights, params.written(weights), strict=True)):
        if not needs[i]:
            found.append(None)
            continue
        how = (w.shape, derivatives.gradient_strides(w), *params.of(i))
        found.append(ops.conv_wgrad(_slice(dy, mine), _slice(x, params.read(i)), *how))
    return found


class _Multi(derivatives.SingleLevelFunction):
    @staticmethod
    def forward(params, count, x, *tensors):
        return derivatives.below_autograd(multi_conv, x, list(tensors[:count]), list(tensors[count:]), *params)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.params, count, x, *tensors = inputs
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x, *tensors[:count])

    @staticmethod
    def backward(ctx, dy):
        x, *weights = ctx.saved_tensors
        n, needs, params = len(weights), ctx.needs_input_grad, ctx.params
        if dy is None:
            return (None,) * len(needs)
        dx = multi_conv_dgrad(dy, weights, x.shape, *params) if needs[2] else None
        dw = _weight_gradients(dy, x, weights, params, needs[3 : 3 + n])
        dbias: list[Tensor | None] = [None] * n
        if any(needs[3 + n :]):
            every = derivatives.bias_gradient(dy)
            for i, (start, count) in enumerate(params.written(weights)):
                if needs[3 + n + i]:
                    dbias[i] = every.narrow(0, start, count).clone()
        return None, None, dx, *dw, *dbias


class _MultiDgrad(derivatives.SingleLevelFunction):
    @staticmethod
    def forward(params, input_size, dy, *weights):
        return derivatives.below_autograd(multi_conv_dgrad, dy, list(weights), input_size, *params)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.params, _, dy, *weights = inputs
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(dy, *weights)

    @staticmethod
    def backward(ctx, g):
        dy, *weights = ctx.saved_tensors
        needs, params = ctx.needs_input_grad, ctx.params
        if g is None:
            return (None,) * len(needs)
        ddy = None
        if needs[2]:
            with derivatives.without_autocast(dy.device.type):
                ddy = multi_conv(g, weights, [None] * len(weights), *params)
        return None, None, ddy, *_weight_gradients(dy, g, weights, params, needs[3:])


def _plainly(tensors: Sequence[Tensor | None]) -> bool:
    """Whether these are best left to one operator for each branch."""
    return _transformed() or any(t is not None and t.is_complex() for t in tensors)


def _transformed() -> bool:
    """Whether torch.func or forward-mode differentiation is at work."""
    forward_mode = torch.autograd.forward_ad._current_level >= 0
    return forward_mode or torch._C._functorch.peek_interpreter_stack() is not None


def _asked(tensors: Sequence[Tensor | None]) -> bool:
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def _autograd(input, weights, biases, *params):
    function: Any = _Multi
    tensors = (input, *weights, *biases)
    if _plainly(tensors):
        return composed(input, weights, biases, Params(*params))
    if not _asked(tensors):
        return derivatives.below_autograd(multi_conv, input, weights, biases, *params)
    with enable_single_level_autograd_function():
        return function.apply(Params(*params), len(weights), *tensors)


def _autograd_dgrad(grad_output, weights, input_size, *params):
    function: Any = _MultiDgrad
    tensors = (grad_output, *weights)
    if _plainly(tensors):
        return _composed_dgrad(grad_output, weights, input_size, Params(*params))
    if not _asked(tensors):
        return derivatives.below_autograd(multi_conv_dgrad, grad_output, weights, input_size, *params)
    with enable_single_level_autograd_function():
        return function.apply(Params(*params), tuple(input_size), *tensors)


def _front(t: Tensor, dim: int | None) -> tuple[Tensor, int | None]:
    """A tensor with its batch, if it has one, as its first axis."""
    return (t, None) if dim is None else (t.movedim(dim, 0), 0)


def _by_rule(info, op, dims, a: Tensor, w: Tensor, third: Any, how: tuple) -> Tensor:
    """What the rule of an operator for one branch makes of it: (batch, N, channels, H, W)."""
    rule = batching.activation_vmap(op, 1 if op is ops.conv_dgrad else 0)
    y, _ = rule(info, dims, a, w, third, *how)
    return y.expand(info.batch_size, *y.shape[1:])


def _vmap(info, in_dims, input, weights, biases, *params):
    """By the rules of the operators of the branches."""
    p, (x, dim), parts = Params(*params), _front(input, in_dims[0]), []
    for i, (w, b) in enumerate(zip(weights, biases, strict=True)):
        source = x.narrow(x.dim() - 3, *p.read(i))
        dims = (dim, in_dims[1][i], None if b is None else in_dims[2][i])
        parts.append(_by_rule(info, schemas.fprop_op(p.of(i)), dims, source, w, b, p.of(i)))
    return (torch.cat(parts, 2) if p.combine == "concatenate" else sum(parts[1:], parts[0])), 0


def _vmap_dgrad(info, in_dims, grad_output, weights, input_size, *params):
    p, (dy, dim) = Params(*params), _front(grad_output, in_dims[0])
    channels = [w.movedim(d, 0)[0] if d is not None else w for w, d in zip(weights, in_dims[1], strict=True)]
    total = dy.new_zeros((info.batch_size, *input_size))
    for i, (w, mine) in enumerate(zip(weights, p.written(channels), strict=True)):
        start, count = p.read(i)
        size = [input_size[0], count, *input_size[2:]]
        source = dy.narrow(dy.dim() - 3, *mine)
        total.narrow(2, start, count).add_(
            _by_rule(info, ops.conv_dgrad, (dim, in_dims[1][i], None), source, w, size, p.of(i))
        )
    return total, 0


def _autocast(device_type: str):
    key = getattr(torch._C.DispatchKey, {"cpu": "AutocastCPU", "cuda": "AutocastCUDA"}[device_type])
    keys = torch._C.DispatchKeySet(key)

    def kernel(input, weights, biases, *params):
        dtype = torch.get_autocast_dtype(device_type)
        cast = [[ops._autocast(t, dtype, device_type) for t in given] for given in ((input,), weights, biases)]
        with torch._C._ExcludeDispatchKeyGuard(keys):
            return multi_conv(cast[0][0], cast[1], cast[2], *params)

    return kernel


for _key in ("CPU", "CUDA"):
    _lib.impl("multi_conv", _run, _key)
    _lib.impl("multi_conv_dgrad", _run_dgrad, _key)
_lib.impl("multi_conv", _autograd, "Autograd")
_lib.impl("multi_conv_dgrad", _autograd_dgrad, "Autograd")
torch.library.register_fake("triton_conv::multi_conv", _fake, lib=_lib)
torch.library.register_fake("triton_conv::multi_conv_dgrad", _fake_dgrad, lib=_lib)
torch.library.register_vmap("triton_conv::multi_conv", _vmap, lib=_lib)
torch.library.register_vmap("triton_conv::multi_conv_dgrad", _vmap_dgrad, lib=_lib)
for _device, _key in (("cpu", "AutocastCPU"), ("cuda", "AutocastCUDA")):
    _lib.impl("multi_conv", _autocast(_device), _key)


def _register_flop_formulas() -> None:
    from torch.utils.flop_counter import register_flop_formula

    def formula(calls):
        def flops(a, weights, third, *params, out_val=None, **_) -> int:
            return sum(call.geometry.flops for call in calls(a, weights, third, Params(*params)).each)

        return flops

    register_flop_formula(torch.ops.triton_conv.multi_conv, get_raw=True)(formula(_forward))
    register_flop_formula(torch.ops.triton_conv.multi_conv_dgrad, get_raw=True)(formula(_backward))


when_imported("torch.utils.flop_counter", _register_flop_formulas)
