"""Convolutions of 8-bit operands, floats and integers, to wider results: `functional` for types PyTorch has none of."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function

from . import ops, schemas
from .arguments import Ints, Modes, Padding, check_tensors, forward_parameters

__all__ = ["int_conv1d", "int_conv2d", "int_conv3d", "scaled_conv1d", "scaled_conv2d", "scaled_conv3d"]


def scaled_conv1d(
    input: Tensor,
    weight: Tensor,
    scale_a: Tensor,
    scale_b: Tensor,
    bias: Tensor | None = None,
    stride: Ints = 1,
    padding: Padding = 0,
    dilation: Ints = 1,
    groups: int = 1,
    *,
    padding_mode: Modes = "zeros",
    out_dtype: torch.dtype = torch.bfloat16,
) -> Tensor:
    """1-D convolution of 8-bit floats, each tensor with a scale.

        >>> x, w = (torch.randn(s).to(torch.float8_e4m3fn) for s in ((2, 4, 100), (8, 4, 3)))
        >>> one = torch.ones(())
        >>> triton_conv.scaled_conv1d(x, w, one, one, padding=((2, 0),)).shape
        torch.Size([2, 8, 100])

    Shapes: input (N, C, W) or (C, W), weight (K, C / groups, S), bias (K), scales one element each; returns
    (N, K, Q) or (K, Q). See `scaled_conv2d` for the rest.
    """
    return _scaled_conv(
        1, input, weight, scale_a, scale_b, bias, stride, padding, dilation, groups, padding_mode, out_dtype
    )


def scaled_conv2d(
    input: Tensor,
    weight: Tensor,
    scale_a: Tensor,
    scale_b: Tensor,
    bias: Tensor | None = None,
    stride: Ints = 1,
    padding: Padding = 0,
    dilation: Ints = 1,
    groups: int = 1,
    *,
    padding_mode: Modes = "zeros",
    out_dtype: torch.dtype = torch.bfloat16,
) -> Tensor:
    """2-D convolution of 8-bit floats, each tensor with a scale; named and scaled as `torch._scaled_mm` is.

        >>> x, w = torch.randn(1, 16, 8, 8), torch.randn(32, 16, 3, 3)
        >>> scale_a, scale_b = x.abs().max() / 448, w.abs().max() / 448
        >>> a, b = (x / scale_a).to(torch.float8_e4m3fn), (w / scale_b).to(torch.float8_e4m3fn)
        >>> y = triton_conv.scaled_conv2d(a, b, scale_a, scale_b, padding=1)
        >>> y.shape, y.dtype
        (torch.Size([1, 32, 8, 8]), torch.bfloat16)

    Shapes: input (N, C, H, W) or (C, H, W), weight (K, C / groups, R, S), bias (K), scales one element each; returns
    (N, K, P, Q) or (K, P, Q). Dtypes: input and weight float8_e4m3fn, scales float32, `out_dtype` bfloat16, float16 or
    float32, bias and output `out_dtype`. Stride, padding and its modes, dilation and groups are those of `conv2d`.

    The result is conv2d(input, weight) * scale_a * scale_b + bias, summed and scaled in float32 and rounded once. The
    GPU reads the scales where they are: nothing waits for it. Hopper's matrix units add 8-bit floats up with fewer bits
    than float32 has; they do so for one block of up to 128 channels, whose sum then goes to float32 (what
    `torch._scaled_mm` calls `use_fast_accum=False`).

    Raises RuntimeError for dtypes, shapes and devices that do not fit, and in backward: there is no gradient; on a GPU
    of compute capability below 8.9 NotImplementedError. On a CPU it is a float32 convolution of the same values.
    """
    return _scaled_conv(
        2, input, weight, scale_a, scale_b, bias, stride, padding, dilation, groups, padding_mode, out_dtype
    )


def scaled_conv3d(
    input: Tensor,
    weight: Tensor,
    scale_a: Tensor,
    scale_b: Tensor,
    bias: Tensor | None = None,
    stride: Ints = 1,
    padding: Padding = 0,
    dilation: Ints = 1,
    groups: int = 1,
    *,
    padding_mode: Modes = "zeros",
    out_dtype: torch.dtype = torch.bfloat16,
) -> Tensor:
    """3-D convolution of 8-bit floats, each tensor with a scale.

        >>> x, w = (torch.randn(s).to(torch.float8_e4m3fn) for s in ((1, 3, 9, 16, 16), (8, 3, 3, 3, 3)))
        >>> one = torch.ones(())
        >>> triton_conv.scaled_conv3d(x, w, one, one, padding=((2, 0), 1, 1), out_dtype=torch.float32).shape
        torch.Size([1, 8, 9, 16, 16])

    Shapes: input (N, C, D, H, W) or (C, D, H, W), weight (K, C / groups, T, R, S), bias (K), scales one element each;
    returns (N, K, Z, P, Q) or (K, Z, P, Q). See `scaled_conv2d` for the rest.
    """
    return _scaled_conv(
        3, input, weight, scale_a, scale_b, bias, stride, padding, dilation, groups, padding_mode, out_dtype
    )


def int_conv1d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Ints = 1,
    padding: Padding = 0,
    dilation: Ints = 1,
    groups: int = 1,
    *,
    padding_mode: Modes = "zeros",
) -> Tensor:
    """1-D convolution of int8 tensors, summed and returned in int32.

        >>> x, w = (torch.randint(-9, 9, s, dtype=torch.int8) for s in ((2, 4, 100), (8, 4, 3)))
        >>> triton_conv.int_conv1d(x, w, stride=2).shape
        torch.Size([2, 8, 49])

    Shapes: input (N, C, W) or (C, W), weight (K, C / groups, S), bias (K); returns
    (N, K, Q) or (K, Q). See `int_conv2d` for the rest.
    """
    return _int_conv(1, input, weight, bias, stride, padding, dilation, groups, padding_mode)


def int_conv2d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Ints = 1,
    padding: Padding = 0,
    dilation: Ints = 1,
    groups: int = 1,
    *,
    padding_mode: Modes = "zeros",
) -> Tensor:
    """2-D convolution of int8 tensors, summed and returned in int32, as `torch._int_mm` does.

        >>> x, w = torch.full((1, 1, 2, 2), 100, dtype=torch.int8), torch.full((1, 1, 2, 2), -100, dtype=torch.int8)
        >>> triton_conv.int_conv2d(x, w)
        tensor([[[[-40000]]]], dtype=torch.int32)

    Shapes: input (N, C, H, W) or (C, H, W), weight (K, C / groups, R, S), bias (K); returns (N, K, P, Q) or (K, P, Q).
    Dtypes: input and weight int8, bias and output int32; sums wrap as int32's do. Stride, padding and its modes,
    dilation and groups are those of `conv2d`, which keeps the low 8 bits of these sums. Raises RuntimeError for dtypes,
    shapes and devices that do not fit.
    """
    return _int_conv(2, input, weight, bias, stride, padding, dilation, groups, padding_mode)


def int_conv3d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Ints = 1,
    padding: Padding = 0,
    dilation: Ints = 1,
    groups: int = 1,
    *,
    padding_mode: Modes = "zeros",
) -> Tensor:
    """3-D convolution of int8 tensors, summed and returned in int32.

        >>> x, w = (torch.randint(-9, 9, s, dtype=torch.int8) for s in ((1, 3, 4, 6, 6), (8, 3, 3, 3, 3)))
        >>> triton_conv.int_conv3d(x, w, padding="same").shape
        torch.Size([1, 8, 4, 6, 6])

    Shapes: input (N, C, D, H, W) or (C, D, H, W), weight (K, C / groups, T, R, S), bias (K); returns
    (N, K, Z, P, Q) or (K, Z, P, Q). See `int_conv2d` for the rest.
    """
    return _int_conv(3, input, weight, bias, stride, padding, dilation, groups, padding_mode)


def _scaled_conv(
    rank, input, weight, scale_a, scale_b, bias, stride, padding, dilation, groups, padding_mode, out_dtype
) -> Tensor:
    name = f"scaled_conv{rank}d"
    tensors = (input, weight, scale_a, scale_b, bias)
    if has_torch_function(tensors):
        args = (*tensors, stride, padding, dilation, groups)
        return handle_torch_function(globals()[name], tensors, *args, padding_mode=padding_mode, out_dtype=out_dtype)
    batched = check_tensors(name, rank, None, input=input, weight=weight, scale_a=scale_a, scale_b=scale_b, bias=bias)
    if not isinstance(out_dtype, torch.dtype):
        raise TypeError(f"{name}(): argument 'out_dtype' must be torch.dtype, not {type(out_dtype).__name__}")
    params = forward_parameters(name, rank, weight, stride, padding, dilation, groups, padding_mode)
    x = input if batched else input.unsqueeze(0)
    y = schemas.recordable(ops.conv_scaled)(x, weight, bias, *params, scale_a, scale_b, out_dtype)
    return y if batched else y.squeeze(0)


def _int_conv(rank, input, weight, bias, stride, padding, dilation, groups, padding_mode) -> Tensor:
    name = f"int_conv{rank}d"
    if has_torch_function((input, weight, bias)):
        args = (input, weight, bias, stride, padding, dilation, groups)
        return handle_torch_function(globals()[name], args[:3], *args, padding_mode=padding_mode)
    batched = check_tensors(name, rank, None, input=input, weight=weight, bias=bias)
    params = forward_parameters(name, rank, weight, stride, padding, dilation, groups, padding_mode)
    y = schemas.recordable(ops.conv_int)(input if batched else input.unsqueeze(0), weight, bias, *params)
    return y if batched else y.squeeze(0)
