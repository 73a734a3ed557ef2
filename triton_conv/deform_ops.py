"""The operators of deformable convolution: schemas, fake kernels, autograd, autocast and vmap.

    triton_conv::deform_conv           the convolution
    triton_conv::deform_conv_backward  the gradients of input, offset, mask and weight that are asked for

Gradients of gradients, and derivatives in forward mode, are those of plain torch. Arguments are those of `ops`; how
many groups and offset groups there are is read from shapes.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import conv_calls, deform_reference, deform_run, derivatives, execute, invariance, ops
from .batching import fold_batch, unfold_batch
from .derivatives import SingleLevelFunction, below_autograd, bias_gradient
from .devices import Device
from .geometry import ConvGeometry
from .later import when_imported

_PARAMS = "SymInt[] stride, SymInt[] padding, SymInt[] dilation, str? precision"
_FORWARD = f"(Tensor input, Tensor offset, Tensor weight, Tensor? mask, Tensor? bias, {_PARAMS}) -> Tensor"
_BACKWARD = (
    f"(Tensor grad_output, Tensor input, Tensor offset, Tensor weight, Tensor? mask, {_PARAMS}, bool[] wanted)"
    " -> (Tensor, Tensor, Tensor, Tensor)"
)
_lib = torch.library.Library("triton_conv", "FRAGMENT")
_lib.define("deform_conv" + _FORWARD, tags=(torch.Tag.pt2_compliant_tag,))
_lib.define("deform_conv.traced" + _FORWARD.replace("SymInt", "int"))  # what torch.jit.trace can record
_lib.define("deform_conv_backward" + _BACKWARD, tags=(torch.Tag.pt2_compliant_tag,))
deform_conv = torch.ops.triton_conv.deform_conv.default
deform_conv_backward = torch.ops.triton_conv.deform_conv_backward.default
traced = torch.ops.triton_conv.deform_conv.traced


# ---------------------------------------------------------------------------------------------------------------------
# What is computed, and what is wrong with arguments


class _Checked(NamedTuple):
    """The ordinary convolution of these tensors, and how many groups of channels have offsets of their own."""

    call: execute.Call
    offset_groups: int

    @property
    def geometry(self) -> ConvGeometry:
        return self.call.geometry


def undeformed(input, weight, bias, stride, padding, dilation, precision) -> execute.Call:
    """The ordinary convolution of these tensors, whose groups are as many as its channels say."""
    conv_calls.check_given(deform_conv, input=input, weight=weight)
    if input.dim() != 4 or weight.dim() != 4:
        raise RuntimeError(
            f"expected input (N, C, H, W) and weight (K, C / groups, R, S), but got input {list(input.shape)}, weight "
            f"{list(weight.shape)}"
        )
    channels, of_group = input.shape[1], weight.shape[1]
    if of_group == 0 or channels == 0 or channels % of_group:
        raise RuntimeError(
            f"expected input channels to be a multiple of weight.size(1) = {of_group}, but got input "
            f"{list(input.shape)}, weight {list(weight.shape)}"
        )
    groups = channels // of_group
    return conv_calls.conv_call(input, weight, bias, stride, padding, dilation, groups, "zeros", precision)


def _checked(input, offset, weight, mask, bias, stride, padding, dilation, precision) -> _Checked:
    call = undeformed(input, weight, bias, stride, padding, dilation, precision)
    conv_calls.check_given(deform_conv, offset=offset)
    (N, C), taps, (_, P, Q) = input.shape[:2], call.geometry.taps, call.geometry.output
    offset_groups = offset.shape[1] // (2 * taps) if offset.dim() == 4 else 0
    if offset_groups == 0 or offset.shape[1] % (2 * taps):
        R, S = weight.shape[2:]
        raise RuntimeError(
            f"the shape of the offset tensor at dimension 1 is not valid: expected offset of size [{N}, 2 * offset "
            f"groups * {R} * {S}, {P}, {Q}], but got offset {list(offset.shape)} {_sizes(input, weight)}"
        )
    if C % offset_groups:
        raise RuntimeError(
            f"expected input channels to be divisible by the {offset_groups} offset groups of offset "
            f"{list(offset.shape)}, but got {C} channels {_sizes(input, weight)}"
        )
    for name, t, channels in (("offset", offset, 2 * offset_groups * taps), ("mask", mask, offset_groups * taps)):
        if t is None:
            continue
        if t.shape != (N, channels, P, Q):
            raise RuntimeError(
                f"expected {name} of size {[N, channels, P, Q]}, but got {name} {list(t.shape)} {_sizes(input, weight)}"
            )
        conv_calls.check_device("input", input, name, t)
        if t.dtype not in (input.dtype, torch.float32) or t.dtype != offset.dtype:
            raise RuntimeError(
                f"expected offset and mask both of input's {input.dtype}, or both of torch.float32, but got {name} "
                f"{list(t.shape)} of {t.dtype} and offset of {offset.dtype} {_sizes(input, weight)}"
            )
    return _Checked(call, offset_groups)


def _sizes(input: Tensor, weight: Tensor) -> str:
    return f"(input {list(input.shape)}, weight {list(weight.shape)})"


# ---------------------------------------------------------------------------------------------------------------------
# The operators


def _output(*args) -> Tensor:
    return execute._empty_like_output(_checked(*args).call)


def _forward(input, offset, weight, mask, bias, *params) -> Tensor:
    checked = _checked(input, offset, weight, mask, bias, *params)
    y = execute._empty_like_output(checked.call)
    if y.numel() == 0:
        return y
    device = execute.device_of(input.device)
    if device is not None:
        how = (checked.geometry, checked.offset_groups, params[-1], device)
        return deform_run.forward(input, offset, weight, mask, bias, *how, y)
    for y_of, g, x, o, m in _samples(checked, y, input, offset, mask):
        y_of.copy_(deform_reference.forward(x, o, weight, m, bias, g, checked.offset_groups))
    return y


def _samples(checked: _Checked, *tensors: Tensor | None) -> list[tuple[Any, ...]]:
    """The first tensor, the geometry and the others: all at once, or each sample alone if no batch may matter."""
    g = checked.geometry
    if invariance.batch() is None:
        return [(tensors[0], g, *tensors[1:])]
    columns = [[None] * g.N if t is None else t.split(1) for t in tensors]
    return list(zip(columns[0], [replace(g, N=1)] * g.N, *columns[1:], strict=True))


def _backward_checked(dy, input, offset, weight, mask, *rest) -> tuple[_Checked, tuple[bool, ...]]:
    """What is computed, and which gradients of input, offset, mask and weight are wanted and possible."""
    *params, wanted = rest
    checked = _checked(input, offset, weight, mask, None, *params)
    expected = checked.call.output_shape
    if list(dy.shape) != expected or dy.dtype != input.dtype:
        raise RuntimeError(
            f"expected grad_output {expected} of {input.dtype}, but got {list(dy.shape)} of {dy.dtype} "
            f"(input {list(input.shape)})"
        )
    conv_calls.check_device("input", input, "grad_output", dy)
    if len(wanted) != 4:
        raise RuntimeError(f"expected wanted to have 4 entries, but got {list(wanted)}")
    to_x, to_offset, to_mask, to_w = wanted
    return checked, (to_x, to_offset, to_mask and mask is not None, to_w)


def _gradients_like(dy, input, offset, weight, mask, *rest) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Uninitialised gradients; empty where there is nothing to differentiate, or nobody asks."""
    _, wanted = _backward_checked(dy, input, offset, weight, mask, *rest)
    tensors = (input, offset, mask, weight)
    dx, doffset, dmask, dw = (
        torch.empty_like(t) if want else input.new_empty(0) for t, want in zip(tensors, wanted, strict=True)
    )
    return dx, doffset, dmask, dw


def _backward(dy, input, offset, weight, mask, *rest) -> tuple[Tensor, ...]:
    conv_calls.check_given(deform_conv_backward, grad_output=dy, input=input)
    device = execute.device_of(input.device)
    if device is not None and dy.numel():
        return _launched(device, dy, input, offset, weight, mask, *rest)
    outputs = _gradients_like(dy, input, offset, weight, mask, *rest)
    if dy.numel() == 0:
        return tuple(output.zero_() for output in outputs)
    checked, wanted = _backward_checked(dy, input, offset, weight, mask, *rest)
    found = [
        deform_reference.gradients(dy_of, x, o, weight, m, g, checked.offset_groups, wanted)
        for dy_of, g, x, o, m in _samples(checked, dy, input, offset, mask)
    ]
    for output, parts, want, of_samples in zip(
        outputs, zip(*found, strict=True), wanted, (True, True, True, False), strict=True
    ):
        if want:
            output.copy_(torch.cat(parts) if of_samples else sum(parts[1:], parts[0]))
    return outputs


def _launched(device: Device, dy, input, offset, weight, mask, *rest) -> tuple[Tensor, ...]:
    checked, (to_x, to_offset, to_mask, to_w) = _backward_checked(dy, input, offset, weight, mask, *rest)
    how = (checked.geometry, checked.offset_groups, rest[-2], device)
    dx: Any = None
    doffset = dmask = dw = dx
    if to_x:
        dx = deform_run.input_gradient(dy, offset, weight, mask, *how, torch.empty_like(input))
    if to_offset or to_mask:  # one kernel for both
        doffset, dmask = deform_run.offset_gradients(dy, input, offset, weight, mask, *how)
    if to_w:
        dw = deform_run.weight_gradient(dy, input, offset, mask, *how, torch.empty_like(weight))
    found = zip((dx, doffset, dmask, dw), (to_x, to_offset, to_mask, to_w), strict=True)
    return tuple(g if want else input.new_empty(0) for g, want in found)


# ---------------------------------------------------------------------------------------------------------------------
# Autograd


class _Forward(SingleLevelFunction):
    @staticmethod
    def forward(op, *args):
        return below_autograd(op, *args)

    @staticmethod
    def setup_context(ctx, inputs, output):
        _, *tensors, _, ctx.stride, ctx.padding, ctx.dilation, ctx.precision = inputs
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*tensors)

    @staticmethod
    def backward(ctx, dy):
        if dy is None:
            return (None,) * 10
        _, *needs, bias = ctx.needs_input_grad[:6]
        to_x, to_offset, to_w, to_mask = needs
        gradients = [None] * 4
        if any(needs):
            wanted = [to_x, to_offset, to_mask, to_w]
            params = (ctx.stride, ctx.padding, ctx.dilation, ctx.precision, wanted)
            found = deform_conv_backward(dy, *ctx.saved_tensors, *params)
            gradients = [g if want else None for g, want in zip(found, wanted, strict=True)]
        dx, doffset, dmask, dw = gradients
        return None, dx, doffset, dw, dmask, bias_gradient(dy) if bias else None, *[None] * 4


class _Backward(SingleLevelFunction):
    @staticmethod
    def forward(op, *args):
        return below_autograd(op, *args)

    @staticmethod
    def setup_context(ctx, inputs, output):
        _, *tensors, ctx.stride, ctx.padding, ctx.dilation, ctx.precision, ctx.wanted = inputs
        ctx.save_for_backward(*tensors)

    @staticmethod
    def backward(ctx, *cotangents):
        params = (ctx.stride, ctx.padding, ctx.dilation, ctx.precision, ctx.wanted)
        checked, wanted = _backward_checked(*ctx.saved_tensors, *params)

        def gradients(dy, x, offset, weight, mask=None):
            found = deform_reference.gradients(
                dy, x, offset, weight, mask, checked.geometry, checked.offset_groups, wanted
            )
            return tuple(g for g in found if g is not None)

        present = [t for t in ctx.saved_tensors if t is not None]
        outputs, pull = torch.func.vjp(gradients, *present)  # type: ignore[misc]
        given = [c for c, want in zip(cotangents, wanted, strict=True) if want]
        found = pull(tuple(c.to(o.dtype) for c, o in zip(given, outputs, strict=True)))
        return None, *found, *[None] * (5 - len(present)), *[None] * 5


def _plain(input, offset, weight, mask, bias, *params) -> Tensor:
    """The convolution as operators of torch's, which have derivatives in forward mode."""
    checked = _checked(input, offset, weight, mask, bias, *params)
    y = deform_reference.forward(input, offset, weight, mask, bias, checked.geometry, checked.offset_groups)
    return y.to(input.dtype)


def _plain_backward(dy, input, offset, weight, mask, *rest) -> tuple[Tensor, ...]:
    checked, wanted = _backward_checked(dy, input, offset, weight, mask, *rest)
    found = deform_reference.gradients(dy, input, offset, weight, mask, checked.geometry, checked.offset_groups, wanted)
    tensors = (input, offset, mask, weight)
    return tuple(input.new_empty(0) if g is None else g.to(t.dtype) for g, t in zip(found, tensors, strict=True))


def _autograd_kernel(op, function, plain):
    backward_mode = derivatives.autograd_kernel(op, function)

    def kernel(*args):
        forward_mode = torch.autograd.forward_ad._current_level >= 0
        return plain(*args) if forward_mode else backward_mode(*args)

    return kernel


# ---------------------------------------------------------------------------------------------------------------------
# Autocast and vmap


def _autocast_kernel(device_type: str):
    key = getattr(torch._C.DispatchKey, {"cpu": "AutocastCPU", "cuda": "AutocastCUDA"}[device_type])
    keys = torch._C.DispatchKeySet(key)

    def kernel(input, offset, weight, mask, bias, *params):
        dtype = torch.get_autocast_dtype(device_type)
        input, weight, bias = (ops._autocast(t, dtype, device_type) for t in (input, weight, bias))
        theirs = {t.dtype for t in (offset, mask) if t is not None}
        if theirs not in ({input.dtype}, {torch.float32}):
            offset, mask = (ops._autocast(t, torch.float32, device_type) for t in (offset, mask))
        with torch._C._ExcludeDispatchKeyGuard(keys):
            return deform_conv(input, offset, weight, mask, bias, *params)

    return kernel


def _forward_vmap(info, in_dims, *args):
    """A batch of images joins N; a batch of filters makes more channels, groups and offset groups."""
    shared = in_dims[2] is None and in_dims[4] is None
    axes = (0, 0, None, 0, None) if shared else (1, 1, 0, 1, 0)
    y = deform_conv(*_all_folded(args[:5], in_dims, info.batch_size, axes), *args[5:])
    return unfold_batch(y, info.batch_size, 0 if shared else 1), 0


def _backward_vmap(info, in_dims, *args):
    folded = _all_folded(args[:5], in_dims, info.batch_size, (1, 1, 1, 0, 1))
    _, wanted = _backward_checked(*folded, *args[5:])
    outputs = [
        unfold_batch(g, info.batch_size, axis) if want else g
        for g, axis, want in zip(deform_conv_backward(*folded, *args[5:]), (1, 1, 1, 0), wanted, strict=True)
    ]
    return tuple(outputs), tuple(0 if want else None for want in wanted)


def _all_folded(tensors, in_dims, size: int, axes) -> list[Tensor | None]:
    return [
        t if t is None or axis is None else fold_batch(t, dim, size, axis)
        for t, dim, axis in zip(tensors, in_dims, axes, strict=False)
    ]


# ---------------------------------------------------------------------------------------------------------------------
# Registration

for _op, _run, _fake, _kernel, _vmap in (
    (deform_conv, _forward, _output, _autograd_kernel(deform_conv, _Forward, _plain), _forward_vmap),
    (
        deform_conv_backward,
        _backward,
        _gradients_like,
        _autograd_kernel(deform_conv_backward, _Backward, _plain_backward),
        _backward_vmap,
    ),
):
    _name = _op._schema.name.split("::")[1]
    _lib.impl(_name, _run, "CPU")
    _lib.impl(_name, _run, "CUDA")
    _lib.impl(_name, _kernel, "Autograd")
    torch.library.register_fake(_op._schema.name, _fake, lib=_lib)
    torch.library.register_vmap(_op._schema.name, _vmap, lib=_lib)
_lib.impl("deform_conv.traced", deform_conv, "CompositeImplicitAutograd")
for _device, _key in (("cpu", "AutocastCPU"), ("cuda", "AutocastCUDA")):
    _lib.impl("deform_conv", _autocast_kernel(_device), _key)


def _register_flop_formulas() -> None:
    from torch.utils.flop_counter import register_flop_formula

    def forward(*args, out_val=None, **kwargs) -> int:
        return _checked(*args, **kwargs).geometry.flops

    def backward(dy, input, offset, weight, mask, *rest, out_val=None) -> int:
        """What is least: gradients of images and of offsets come of one product, those of filters of another."""
        checked, (to_x, to_offset, to_mask, to_w) = _backward_checked(dy, input, offset, weight, mask, *rest)
        return ((to_x or to_offset or to_mask) + to_w) * checked.geometry.flops

    register_flop_formula(deform_conv.overloadpacket, get_raw=True)(forward)
    register_flop_formula(deform_conv_backward.overloadpacket, get_raw=True)(backward)


when_imported("torch.utils.flop_counter", _register_flop_formulas)
