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

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from . import fast
from .batching import activation_vmap, scaled_vmap, wgrad_vmap
from .conv_calls import (
    CALLS,
    check_given,
    conv_call,
    conv_dgrad_call,
    conv_int_call,
    conv_scaled_call,
    conv_transpose_call,
    conv_wgrad_call,
    hashable,
)
from .derivatives import Dgrad, Fprop, FpropAgain, NoGradient, Transpose, TransposeAgain, Wgrad, autograd_kernel
from .execute import Call, empty_output, execute
from .later import when_imported
from .schemas import LIBRARY, conv, conv_dgrad, conv_dilated, conv_int, conv_scaled, conv_transpose, conv_wgrad


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


_AGAIN: dict[Any, tuple[Callable[..., Call], Any]] = {
    conv: (conv_call, FpropAgain),
    conv_transpose: (conv_transpose_call, TransposeAgain),
}


# ---------------------------------------------------------------------------------------------------------------------
# Registration.


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


def _register(op, call: Callable[..., Call], function, vmap_rule, autocast: bool) -> None:
    name = op._schema.name.split("::")[1]
    CALLS[op] = call

    first, second = (argument.name for argument in op._schema.arguments[:2])

    def run(a, b, third, *params):
        if a is None or b is None:
            check_given(op, **{first: a, second: b})
        if op is conv_scaled:  # its parameters hold tensors
            return execute(call(a, b, third, *params))
        return fast.computed(call, a, b, hashable(third), tuple(map(hashable, params)))

    def fake(*args):
        return empty_output(call(*args))

    LIBRARY.impl(name, run, "CPU")
    LIBRARY.impl(name, run, "CUDA")
    torch.library.register_fake(op._schema.name, fake, lib=LIBRARY)
    LIBRARY.impl(name, autograd_kernel(op, function), "Autograd")
    torch.library.register_vmap(op._schema.name, vmap_rule, lib=LIBRARY)
    if autocast:
        for device_type, key in (("cpu", "AutocastCPU"), ("cuda", "AutocastCUDA")):
            LIBRARY.impl(name, _autocast_kernel(op, device_type), key)


_register(conv, conv_call, Fprop, activation_vmap(conv, 0), True)
_register(conv_dilated, conv_call, Fprop, activation_vmap(conv_dilated, 0), True)
_register(conv_transpose, conv_transpose_call, Transpose, activation_vmap(conv_transpose, 1), True)
_register(conv_dgrad, conv_dgrad_call, Dgrad, activation_vmap(conv_dgrad, 1), False)
_register(conv_wgrad, conv_wgrad_call, Wgrad, wgrad_vmap, False)
_register(conv_scaled, conv_scaled_call, NoGradient, scaled_vmap, False)
_register(conv_int, conv_int_call, NoGradient, activation_vmap(conv_int, 0), False)


# ---------------------------------------------------------------------------------------------------------------------
# FLOP counting.


def _register_flop_formulas() -> None:
    from torch.utils.flop_counter import flop_registry, register_flop_formula

    def formula(call: Callable[..., Call]) -> Callable[..., int]:
        return lambda *args, out_val=None, **kwargs: call(*args, **kwargs).geometry.flops

    for op, call in CALLS.items():
        if op.overloadpacket in flop_registry:
            continue
        register_flop_formula(op.overloadpacket, get_raw=True)(formula(call))


# Importing it here would take a fifth of a second, and import Triton, which reads TRITON_INTERPRET as it loads.
when_imported("torch.utils.flop_counter", _register_flop_formulas)
