"""What each operator computes: a role, a geometry and the operands, shared by real and fake kernels."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from .config import PRECISIONS
from .execute import Call
from .geometry import ConvGeometry, Role

OUT_DTYPES = (torch.bfloat16, torch.float16, torch.float32)  # what 8-bit floats may become

CALLS: dict[Any, Callable[..., Call]] = {}  # of each operator


def hashable(value: Any) -> Any:
    return tuple(value) if type(value) is list else value


def pairs_of(padding: Sequence[int]) -> tuple[tuple[int, int], ...]:
    if len(padding) % 2:
        raise RuntimeError(f"expected padding to hold (lower, upper) of each axis, but got padding={list(padding)}")
    return tuple(zip(padding[::2], padding[1::2], strict=True))


def modes_of(padding_mode: str, weight_shape: Sequence[int]) -> tuple[str, ...]:
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


def geometry_of(make: Callable[..., ConvGeometry], *args: Any) -> ConvGeometry:
    frozen = tuple(tuple(a) if isinstance(a, (list, torch.Size)) else a for a in args)
    return make(*frozen) if _symbolic(frozen) else _cached(make, *frozen)


def _symbolic(value: Any) -> bool:
    return any(map(_symbolic, value)) if isinstance(value, tuple) else isinstance(value, torch.SymInt)


def conv_call(input, weight, bias, stride, padding, dilation, groups, padding_mode, precision) -> Call:
    geometry = geometry_of(
        ConvGeometry.forward,
        input.shape,
        weight.shape,
        stride,
        pairs_of(padding),
        dilation,
        groups,
        modes_of(padding_mode, weight.shape),
    )
    check_operands(bias, geometry.K, precision, input=input, weight=weight)
    return Call(Role.FPROP, geometry, input, weight, bias, precision)


def conv_transpose_call(
    input, weight, bias, stride, padding, output_padding, groups, dilation, padding_mode, precision
) -> Call:
    geometry = geometry_of(
        ConvGeometry.transposed,
        input.shape,
        weight.shape,
        stride,
        pairs_of(padding),
        output_padding,
        groups,
        dilation,
        modes_of(padding_mode, weight.shape),
    )
    check_operands(bias, geometry.C, precision, input=input, weight=weight)
    return Call(Role.DGRAD, geometry, input, weight, bias, precision)


def conv_dgrad_call(
    grad_output, weight, input_size, stride, padding, dilation, groups, padding_mode, precision
) -> Call:
    geometry = geometry_of(
        ConvGeometry.gradient,
        input_size,
        weight.shape,
        grad_output.shape,
        stride,
        pairs_of(padding),
        dilation,
        groups,
        modes_of(padding_mode, weight.shape),
    )
    check_operands(None, geometry.C, precision, grad_output=grad_output, weight=weight)
    return Call(Role.DGRAD, geometry, grad_output, weight, None, precision)


def conv_wgrad_call(
    grad_output, input, weight_size, weight_stride, stride, padding, dilation, groups, padding_mode, precision
) -> Call:
    geometry = geometry_of(
        ConvGeometry.gradient,
        input.shape,
        weight_size,
        grad_output.shape,
        stride,
        pairs_of(padding),
        dilation,
        groups,
        modes_of(padding_mode, weight_size),
    )
    check_operands(None, geometry.K, precision, grad_output=grad_output, input=input)
    if len(weight_stride) != len(weight_size) or not _dense(weight_size, weight_stride):
        raise RuntimeError(
            f"weight_stride must leave no gaps and no overlaps, but got {list(weight_stride)} for {list(weight_size)}"
        )
    return Call(Role.WGRAD, geometry, grad_output, input, None, precision, tuple(weight_stride))


def conv_scaled_call(
    input, weight, bias, stride, padding, dilation, groups, padding_mode, scale_a, scale_b, out_dtype
) -> Call:
    if out_dtype not in OUT_DTYPES:
        raise RuntimeError(f"expected out_dtype to be one of {OUT_DTYPES}, but got {out_dtype}")
    scales = (scale_a, scale_b)
    check_given(torch.ops.triton_conv.conv_scaled.default, scale_a=scale_a, scale_b=scale_b)
    for name, scale in zip(("scale_a", "scale_b"), scales, strict=True):
        if scale.dtype != torch.float32 or scale.numel() != 1:
            raise RuntimeError(f"expected {name} to be one float32, but got {scale.dtype} {list(scale.shape)}")
        check_device("input", input, name, scale)
    params = (stride, padding, dilation, groups, padding_mode, None)
    return _low_precision_call(torch.float8_e4m3fn, out_dtype, scales, input, weight, bias, params)


def conv_int_call(input, weight, bias, stride, padding, dilation, groups, padding_mode) -> Call:
    params = (stride, padding, dilation, groups, padding_mode, None)
    return _low_precision_call(torch.int8, torch.int32, None, input, weight, bias, params)


def _low_precision_call(dtype, out_dtype, scales, input, weight, bias, params) -> Call:
    for name, t, expected in (("input", input, dtype), ("weight", weight, dtype), ("bias", bias, out_dtype)):
        if t is None:
            continue
        if t.dtype != expected:
            raise RuntimeError(f"expected {name} of {expected}, but got {t.dtype} {list(t.shape)}")
        check_device("input", input, name, t)
    call = conv_call(input, weight, None, *params)
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


def check_operands(bias: Tensor | None, channels: int, precision: str | None, **tensors: Tensor) -> None:
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
        check_device(first_name, first, name, t)


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


def check_device(first_name: str, first: Tensor, name: str, t: Tensor) -> None:
    if t.device != first.device:
        raise RuntimeError(
            f"Expected all tensors to be on the same device, but {first_name} {list(first.shape)} is on "
            f"{first.device} and {name} {list(t.shape)} is on {t.device}"
        )
