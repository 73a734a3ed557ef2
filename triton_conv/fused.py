"""Convolutions with what follows them in the same kernel: scale, bias, residual, activation.

    y = activation(scale[k] * conv(x, w) + bias[k] + residual)        or, with residual_after,
    y = activation(scale[k] * conv(x, w) + bias[k]) + residual

The operators, as a profile names them (dilated or not):

    triton_conv::conv_fused                  y of a convolution
    triton_conv::conv_transpose_fused        y of a transposed one
    triton_conv::conv_fused_keep             (y, what the activation is applied to); the forward of training
    triton_conv::conv_transpose_fused_keep   the same, transposed

The backward pass computes dz, the gradient of what the activation is applied to, with one kernel
(`triton_conv::activation_backward`), and goes on as that of a convolution without epilogue:

    dx = dgrad(dz, scale * w), dw = scale * wgrad(dz, x), dscale[k] = sum(w[k] * wgrad(dz, x)[k]), dbias = sum(dz)

where scale * w and wgrad(dz, x) are rounded to the dtype of w. The gradient of a residual is dz, or dy itself where it
was added after the activation. Beside x, w and scale are saved:

| activation                                    | no residual, or before it | residual after it     |
|-----------------------------------------------|---------------------------|-----------------------|
| none                                          | nothing                   | nothing               |
| relu, relu6, sigmoid, leaky_relu (slope >= 0) | the output                | what it is applied to |
| silu, gelu, gelu_tanh, hardswish              | what it is applied to     | what it is applied to |

The output costs no memory where the next layer keeps its input; like that of torch.relu it is not to be changed in
place where it is saved. What the activation is applied to is a tensor more, written by the same kernel, and only where
a gradient is asked for that needs it; it is an output to autograd, so that gradients have gradients. No residual is
saved. Under torch.func's transforms and forward-mode AD a fused convolution is a convolution and functions of plain
torch, whose values are rounded once more.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from numbers import Real
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import fast, fused_ops, ops, schemas
from .epilogue import ACTIVATIONS
from .fused_ops import CONV as CONV
from .fused_ops import CONV_TRANSPOSE as CONV_TRANSPOSE
from .fused_ops import Kind
from .unsupported import check_kind


class Fusion(NamedTuple):
    """What a convolution is to do to its sums, in the words of the public functions."""

    activation: str | None
    negative_slope: float
    residual: Tensor | None
    residual_after_activation: bool
    scale: Tensor | None


def asked(name: str, activation: Any, negative_slope: Any, residual: Any, after: Any, scale: Any) -> Fusion | None:
    """None where nothing is."""
    if activation is None and residual is None and scale is None:
        # Dynamo makes a number of a float that is looked at, and begins anew
        ordinary = type(after) is bool and (torch.compiler.is_compiling() or type(negative_slope) is float)
        if not ordinary:
            check(name, None, negative_slope, after)
        return None
    return Fusion(activation, negative_slope, residual, after, scale)


def convolved(
    name: str,
    kind: Kind,
    x: Tensor,
    w: Tensor,
    bias: Tensor | None,
    params: Sequence[Any],
    fusion: Fusion,
    batched: bool,
) -> Tensor:
    """A convolution with its epilogue; the arguments that others have too are checked."""
    activation, slope, residual, after, scale = fusion
    check(name, activation, slope, after)
    for argument, t in (("residual", residual), ("scale", scale)):
        if t is not None:
            check_kind(name, argument, t)
    if not batched:
        if residual is not None and residual.dim() != x.dim():
            raise RuntimeError(
                f"{name}(): expected residual with {x.dim()} dimensions like input, but got residual "
                f"{list(residual.shape)}, input {list(x.shape)}"
            )
        x, residual = x.unsqueeze(0), None if residual is None else residual.unsqueeze(0)
    args = (x, w, bias, scale, residual, *params, activation or "", float(slope), bool(after))
    y = schemas.recordable(kind.op)(*args) if x.is_floating_point() else _exactly(name, kind, *args)
    return y if batched else y.squeeze(0)


def again(kind: Kind, x: Tensor, w: Tensor, bias: Tensor | None, params: tuple, fusion: Fusion) -> Tensor | None:
    """A convolution like one made before, without the dispatcher, as `ops.again` has it; None if there is none."""
    activation, slope, residual, after, scale = fusion
    tensors = [t for t in (x, w, bias, scale, residual) if t is not None]
    plain = type(slope) is float and type(after) is bool and (activation is None or type(activation) is str)
    if not plain or not fast.alone(*tensors):
        return None
    how = (*params, activation or "", slope, bool(after))
    derived = torch.is_grad_enabled() and any(t.requires_grad for t in tensors)
    keep = derived and fused_ops.keeps(x, w, bias, scale, residual, *how)
    call, device_type = kind.calls[keep], x.device.type
    if torch.is_autocast_enabled(device_type):
        dtype = torch.get_autocast_dtype(device_type)
        given = (x, w, bias, how, scale, residual)
        if not fast.hoped(call, dtype, *given):
            return None
        x, w, bias, residual = (ops._autocast(t, dtype, device_type) for t in (x, w, bias, residual))
        scale = scale if scale is None or scale.dtype is torch.float32 else ops._autocast(scale, dtype, device_type)
        bound = fast.found(call, x, w, bias, how, scale, residual)
        if bound is None:
            fast.disappoint(call, dtype, *given)
    else:
        bound = fast.found(call, x, w, bias, how, scale, residual)
    if bound is None:
        return None
    if not derived:
        return bound(x, w, bias, scale, residual)
    function: Any = fused_ops.FusedAgain
    return function.apply((kind, keep, bound, how), x, w, bias, scale, residual)[0]


def check(name: str, activation: Any, negative_slope: Any, after: Any) -> None:
    """Raises for an activation that there is not, a slope that is no number, or a choice that is no bool."""
    if not isinstance(after, bool):
        raise TypeError(f"{name}(): argument 'residual_after_activation' must be bool, not {type(after).__name__}")
    if activation is not None and not isinstance(activation, str):
        raise TypeError(f"{name}(): argument 'activation' must be str or None, not {type(activation).__name__}")
    if activation is not None and activation not in ACTIVATIONS:
        raise ValueError(
            f"{name}(): activation must be None or one of {ACTIVATIONS}, but got activation={activation!r}"
        )
    if not isinstance(negative_slope, (Real, torch.SymFloat)):
        raise TypeError(f"{name}(): argument 'negative_slope' must be float, not {type(negative_slope).__name__}")
    if isinstance(negative_slope, int) and abs(negative_slope) > sys.float_info.max:
        raise ValueError(f"{name}(): argument 'negative_slope' does not fit into a float, but got {negative_slope}")


def _exactly(name: str, kind: Kind, x: Tensor, *args: Any) -> Tensor:
    """Of integers and complex numbers: in several kernels, with the activations that PyTorch has for them."""
    activation = args[-3]
    has = ("sigmoid", "silu") if x.is_complex() else ("relu", "relu6")
    if activation and activation not in has:
        raise NotImplementedError(
            f"{name}(): activation={activation!r} is not implemented for {x.dtype}, which has {has}"
        )
    fused_ops.call_of(kind, False, x, *args, floating=False)  # for its errors
    return fused_ops.composed(kind, x, *args)[0]
