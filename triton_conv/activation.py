"""The gradients of activations, an operator and plain torch.

    triton_conv::activation_backward    dz = dy * activation'(z), from z or from activation(z)

`triton_conv.epilogue` has the names. Where a gradient of the operator itself may be asked for it is plain torch, which
has them of any order; 16-bit floats are computed in float32 either way and rounded once.
"""

from __future__ import annotations

from math import pi, sqrt

import torch
from torch import Tensor

from . import activation_plan, batching, conv_calls, derivatives, execute, fast, reference
from .activation_plan import ActivationProblem
from .epilogue import ACTIVATIONS

_lib = torch.library.Library("triton_conv", "FRAGMENT")
_lib.define(
    "activation_backward(Tensor dy, Tensor saved, str activation, float slope, bool of_output) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)
_op = torch.ops.triton_conv.activation_backward.default

activate = reference.activated

# gelu_tanh(z) = z * sigmoid(_LINEAR * z + _CUBIC * z^3)
_LINEAR = 2 * sqrt(2 / pi)
_CUBIC = 0.044715 * _LINEAR


def tells_gradient(activation: str, slope: float) -> bool:
    """Whether the output of an activation says what its gradient is."""
    return activation in ("relu", "relu6", "sigmoid") or (activation == "leaky_relu" and slope >= 0)


def backward(dy: Tensor, saved: Tensor, activation: str, slope: float, of_output: bool) -> Tensor:
    """dz of an activation's input z, from the gradient of its output and z, or with `of_output` its output."""
    if not activation:
        return dy
    if not torch.is_grad_enabled() and fast.alone(dy, saved):
        return _run(dy, saved, activation, slope, of_output)
    return _op(dy, saved, activation, slope, of_output)


def _reference(dy: Tensor, saved: Tensor, activation: str, slope: float, of_output: bool) -> Tensor:
    """In plain torch, of functions that have derivatives of any order."""
    conv_calls.check_given(_op, dy=dy, saved=saved)
    g, s = dy.to(reference.wide_of(dy.dtype)), saved.to(reference.wide_of(saved.dtype))
    return _gradient(g, s, activation, slope, of_output).to(dy.dtype)


def _gradient(g: Tensor, s: Tensor, activation: str, slope: float, of_output: bool) -> Tensor:
    if activation == "relu":
        return g.masked_fill(s <= 0, 0)
    if activation == "relu6":
        return g.masked_fill((s <= 0) | (s >= 6), 0)
    if activation == "leaky_relu":
        return torch.where(s > 0, g, g * slope)
    if activation == "hardswish":
        return torch.where(s >= 3, g, g * (s / 3 + 0.5)).masked_fill(s <= -3, 0)
    if activation == "gelu":
        return g * (0.5 + 0.5 * torch.erf(s * sqrt(0.5)) + s * (torch.exp(-0.5 * s * s) / sqrt(2 * pi)))
    if activation == "sigmoid":
        y = s if of_output else torch.sigmoid(s)
        return g * (y * (1 - y))
    if activation == "silu":
        y = torch.sigmoid(s)
        return g * (y * (1 + s * (1 - y)))
    y = torch.sigmoid(s * (_LINEAR + _CUBIC * s * s))
    return g * (y + s * y * (1 - y) * (_LINEAR + 3 * _CUBIC * s * s))


# ---------------------------------------------------------------------------------------------------------------------
# The operator


def _checked_empty(dy: Tensor, saved: Tensor, activation: str, slope: float, of_output: bool) -> Tensor:
    """dz, uninitialised: it lies in memory as what was saved."""
    conv_calls.check_given(_op, dy=dy, saved=saved)
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation must be one of {ACTIVATIONS}, but got activation={activation!r}")
    if dy.shape != saved.shape or dy.dtype != saved.dtype or dy.device != saved.device:
        raise RuntimeError(
            f"expected dy {list(saved.shape)} of {saved.dtype} on {saved.device} as saved is, but got {list(dy.shape)} "
            f"of {dy.dtype} on {dy.device}"
        )
    if not saved.is_floating_point():
        raise NotImplementedError(f"triton_conv::activation_backward is not implemented for {saved.dtype}")
    if of_output and not tells_gradient(activation, slope):
        raise RuntimeError(f"the output of {activation} does not tell its gradient: give its input")
    return torch.empty_like(saved)


def _run(dy: Tensor, saved: Tensor, activation: str, slope: float, of_output: bool) -> Tensor:
    dz = _checked_empty(dy, saved, activation, slope, of_output)
    if dz.numel() == 0:
        return dz
    device = execute.device_of(dz.device)
    if device is None:
        return dz.copy_(_reference(dy, saved, activation, slope, of_output))
    dtype = str(dz.dtype).removeprefix("torch.")
    slope = slope if activation == "leaky_relu" else 0.0  # of the others it is one kernel
    plan = activation_plan.make(ActivationProblem(dz.numel(), dtype, activation, slope, of_output, device))
    tensors = {"dy": _laid_out(dy, dz), "saved": _laid_out(saved, dz), "dz": dz}
    with execute._on_device(dz.device):
        for launch in plan.direct:
            launch.run(tensors)
    return dz


def _laid_out(t: Tensor, like: Tensor) -> Tensor:
    """t, or a copy of it where it does not lie in memory as `like`, which is dense."""
    if t.stride() == like.stride():
        return t
    steps = zip(t.shape, t.stride(), like.stride(), strict=True)
    if all(mine == theirs or n == 1 for n, mine, theirs in steps):
        return t
    return torch.empty_like(like).copy_(t)


def _autograd(*args) -> Tensor:
    if derivatives.derived(args):
        return _reference(*args)
    with torch._C._AutoDispatchBelowAutograd():
        return _op(*args)


def _vmap(info, in_dims, dy, saved, *how):
    given = zip((dy, saved), in_dims[:2], strict=True)
    return _op(*(batching.front(t, dim, info.batch_size) for t, dim in given), *how), 0


_lib.impl("activation_backward", _run, "CPU")
_lib.impl("activation_backward", _run, "CUDA")
_lib.impl("activation_backward", _autograd, "Autograd")
torch.library.register_fake("triton_conv::activation_backward", _checked_empty, lib=_lib)
torch.library.register_vmap("triton_conv::activation_backward", _vmap, lib=_lib)
