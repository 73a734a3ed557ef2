"""Convolutions with the signatures of `torch.nn.functional`, and a little more.

    >>> import torch, triton_conv
    >>> x, w = torch.randn(1, 3, 32, 32), torch.randn(8, 3, 3, 3)
    >>> triton_conv.conv2d(x, w, padding="same", padding_mode="circular").shape
    torch.Size([1, 8, 32, 32])

Beyond PyTorch: `padding` takes (lower, upper) pairs, one per axis; `padding_mode` is "zeros", "reflect",
"replicate" or "circular", for all axes or one name per axis, and builds no padded copy in the kernels; `precision`
chooses how float32 is multiplied ("ieee", "tf32", "tf32x3"; None follows PyTorch's own settings); `activation`,
`residual` and `scale` say what else is done to the sums in the same kernel.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from numbers import Integral
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function

from . import fast, fused, ops
from .geometry import PADDING_MODES, same_padding
from .unsupported import check_kind, refuse_script

Ints: TypeAlias = int | Sequence[int]
Padding: TypeAlias = str | int | Sequence[int | tuple[int, int]]
Modes: TypeAlias = str | Sequence[str]

_DTYPES = {
    *(torch.float16, torch.bfloat16, torch.float32, torch.float64),
    *(torch.complex32, torch.complex64, torch.complex128),
    *(torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64),
}

__all__ = ["conv1d", "conv2d", "conv3d", "conv_transpose1d", "conv_transpose2d", "conv_transpose3d"]
__all__ += ["int_conv1d", "int_conv2d", "int_conv3d", "scaled_conv1d", "scaled_conv2d", "scaled_conv3d"]


def conv1d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Ints = 1,
    padding: Padding = 0,
    dilation: Ints = 1,
    groups: int = 1,
    *,
    padding_mode: Modes = "zeros",
    precision: str | None = None,
    activation: str | None = None,
    negative_slope: float = 0.01,
    residual: Tensor | None = None,
    residual_after_activation: bool = False,
    scale: Tensor | None = None,
) -> Tensor:
    """1-D convolution; `torch.nn.functional.conv1d` with `padding_mode`, `precision` and an epilogue.

        >>> causal = triton_conv.conv1d(torch.randn(2, 4, 100), torch.randn(8, 4, 3), padding=((2, 0),))
        >>> causal.shape
        torch.Size([2, 8, 100])

    Shapes: input (N, C, W) or (C, W), weight (K, C / groups, S), bias (K); returns (N, K, Q) or (K, Q).
    See `conv2d` for dtypes, errors and the epilogue.
    """
    fusion = fused.asked("conv1d", activation, negative_slope, residual, residual_after_activation, scale)
    return _conv(1, input, weight, bias, stride, padding, dilation, groups, padding_mode, precision, fusion)


def conv2d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Ints = 1,
    padding: Padding = 0,
    dilation: Ints = 1,
    groups: int = 1,
    *,
    padding_mode: Modes = "zeros",
    precision: str | None = None,
    activation: str | None = None,
    negative_slope: float = 0.01,
    residual: Tensor | None = None,
    residual_after_activation: bool = False,
    scale: Tensor | None = None,
) -> Tensor:
    """2-D convolution; `torch.nn.functional.conv2d` with `padding_mode`, `precision` and an epilogue.

        >>> triton_conv.conv2d(torch.randn(1, 3, 8, 8), torch.randn(4, 3, 3, 3), padding=((0, 1), 1)).shape
        torch.Size([1, 4, 7, 8])

    Shapes: input (N, C, H, W) or (C, H, W), weight (K, C / groups, R, S), bias (K); returns (N, K, P, Q) or
    (K, P, Q), in channels-last memory where input or weight is. Dtypes: every floating-point, complex and integer
    type of PyTorch's own convolutions; all tensors share one. 16-bit floats are accumulated in float32.

    padding: an int, one int or (lower, upper) pair per axis, "valid", or "same" (stride 1; an even filter gets its
    odd element above). padding_mode: one name, or one per axis; as in `torch.nn.functional.pad`, reflect needs
    padding below the extent, circular no more than the extent.

    In the same kernel, rounded once: activation(scale[k] * sum + bias[k] + residual), or with
    `residual_after_activation` activation(scale[k] * sum + bias[k]) + residual.

        >>> block, shortcut = torch.randn(4, 4, 3, 3), torch.randn(1, 4, 8, 8)
        >>> y = triton_conv.conv2d(shortcut, block, padding=1, activation="relu", residual=shortcut)
        >>> torch.allclose(y, (triton_conv.conv2d(shortcut, block, padding=1) + shortcut).relu(), atol=1e-5)
        True

    activation: "relu", "relu6", "leaky_relu" (of `negative_slope`), "silu", "gelu", "gelu_tanh" (torch's
    `approximate="tanh"`), "sigmoid" or "hardswish". residual: of the output's shape and dtype, in any memory format;
    that of the output is read without a copy. scale: (K), float32 or the input's dtype. Every gradient exists, of
    any order; `triton_conv.fused` says what is saved for it. Under torch.func's transforms and forward-mode AD, and for
    complex numbers and integers, several kernels compute it; integers have relu and relu6 alone, complex numbers
    sigmoid and silu: NotImplementedError for others, ValueError for an activation that there is not.

    Raises what PyTorch raises for the same mistake, before anything is computed: TypeError for arguments of the
    wrong type, RuntimeError for shapes, dtypes and devices that do not fit, ValueError for an unknown mode.

    Method: implicit GEMM, the filter taps walked by index maps instead of an im2col buffer (Chetlur et al. 2014,
    cuDNN); on a CPU, PyTorch's own convolution.
    """
    fusion = fused.asked("conv2d", activation, negative_slope, residual, residual_after_activation, scale)
    return _conv(2, input, weight, bias, stride, padding, dilation, groups, padding_mode, precision, fusion)


def conv3d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Ints = 1,
    padding: Padding = 0,
    dilation: Ints = 1,
    groups: int = 1,
    *,
    padding_mode: Modes = "zeros",
    precision: str | None = None,
    activation: str | None = None,
    negative_slope: float = 0.01,
    residual: Tensor | None = None,
    residual_after_activation: bool = False,
    scale: Tensor | None = None,
) -> Tensor:
    """3-D convolution; `torch.nn.functional.conv3d` with `padding_mode`, `precision` and an epilogue.

        >>> video, filters = torch.randn(1, 3, 9, 16, 16), torch.randn(8, 3, 3, 3, 3)
        >>> modes = ("replicate", "zeros", "zeros")
        >>> triton_conv.conv3d(video, filters, padding=((2, 0), 1, 1), padding_mode=modes).shape
        torch.Size([1, 8, 9, 16, 16])

    Shapes: input (N, C, D, H, W) or (C, D, H, W), weight (K, C / groups, T, R, S), bias (K); returns (N, K, Z, P, Q)
    or (K, Z, P, Q). See `conv2d` for dtypes, errors and the epilogue.
    """
    fusion = fused.asked("conv3d", activation, negative_slope, residual, residual_after_activation, scale)
    return _conv(3, input, weight, bias, stride, padding, dilation, groups, padding_mode, precision, fusion)


def conv_transpose1d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Ints = 1,
    padding: Ints | Sequence[tuple[int, int]] = 0,
    output_padding: Ints = 0,
    groups: int = 1,
    dilation: Ints = 1,
    *,
    padding_mode: Modes = "zeros",
    precision: str | None = None,
    activation: str | None = None,
    negative_slope: float = 0.01,
    residual: Tensor | None = None,
    residual_after_activation: bool = False,
    scale: Tensor | None = None,
) -> Tensor:
    """1-D transposed convolution; `torch.nn.functional.conv_transpose1d`, with all that `conv1d` has more.

        >>> triton_conv.conv_transpose1d(torch.randn(2, 4, 50), torch.randn(4, 8, 4), stride=2, padding=1).shape
        torch.Size([2, 8, 100])

    Shapes: input (N, K, Q) or (K, Q), weight (K, C / groups, S), bias (C); returns (N, C, W) or (C, W).
    See `conv_transpose2d` for the rest.
    """
    fusion = fused.asked("conv_transpose1d", activation, negative_slope, residual, residual_after_activation, scale)
    return _conv_transpose(
        1, input, weight, bias, stride, padding, output_padding, groups, dilation, padding_mode, precision, fusion
    )


def conv_transpose2d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Ints = 1,
    padding: Ints | Sequence[tuple[int, int]] = 0,
    output_padding: Ints = 0,
    groups: int = 1,
    dilation: Ints = 1,
    *,
    padding_mode: Modes = "zeros",
    precision: str | None = None,
    activation: str | None = None,
    negative_slope: float = 0.01,
    residual: Tensor | None = None,
    residual_after_activation: bool = False,
    scale: Tensor | None = None,
) -> Tensor:
    """2-D transposed convolution; `torch.nn.functional.conv_transpose2d`, with all that `conv2d` has more.

        >>> x, w = torch.randn(1, 8, 14, 14), torch.randn(8, 4, 3, 3)
        >>> triton_conv.conv_transpose2d(x, w, stride=2, padding=1, output_padding=1).shape
        torch.Size([1, 4, 28, 28])

    Shapes: input (N, K, P, Q) or (K, P, Q), weight (K, C / groups, R, S), bias (C); returns (N, C, H, W) or
    (C, H, W). See `conv2d` for dtypes, errors and the epilogue; scale, like bias, is of the output's channels (C).

    It is the input gradient of the convolution that has these parameters, and that is what `padding_mode` means
    here: with "circular", the transpose of a circular convolution, so that what leaves on one side comes back on
    the other. PyTorch has only "zeros".
    """
    fusion = fused.asked("conv_transpose2d", activation, negative_slope, residual, residual_after_activation, scale)
    return _conv_transpose(
        2, input, weight, bias, stride, padding, output_padding, groups, dilation, padding_mode, precision, fusion
    )


def conv_transpose3d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Ints = 1,
    padding: Ints | Sequence[tuple[int, int]] = 0,
    output_padding: Ints = 0,
    groups: int = 1,
    dilation: Ints = 1,
    *,
    padding_mode: Modes = "zeros",
    precision: str | None = None,
    activation: str | None = None,
    negative_slope: float = 0.01,
    residual: Tensor | None = None,
    residual_after_activation: bool = False,
    scale: Tensor | None = None,
) -> Tensor:
    """3-D transposed convolution; `torch.nn.functional.conv_transpose3d`, with all that `conv3d` has more.

        >>> triton_conv.conv_transpose3d(torch.randn(1, 4, 4, 8, 8), torch.randn(4, 2, 2, 2, 2), stride=2).shape
        torch.Size([1, 2, 8, 16, 16])

    Shapes: input (N, K, Z, P, Q) or (K, Z, P, Q), weight (K, C / groups, T, R, S), bias (C); returns
    (N, C, D, H, W) or (C, D, H, W). See `conv_transpose2d` for the rest.
    """
    fusion = fused.asked("conv_transpose3d", activation, negative_slope, residual, residual_after_activation, scale)
    return _conv_transpose(
        3, input, weight, bias, stride, padding, output_padding, groups, dilation, padding_mode, precision, fusion
    )


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


def _conv(rank, input, weight, bias, stride, padding, dilation, groups, padding_mode, precision, fusion) -> Tensor:
    name = f"conv{rank}d"
    tensors = (input, weight, bias)
    if has_torch_function(tensors if fusion is None else (*tensors, fusion.residual, fusion.scale)):
        args = (*tensors, stride, padding, dilation, groups)
        return _hand_over(name, tensors, args, fusion, padding_mode=padding_mode, precision=precision)
    spelled = _spelled(rank, weight, padding, (stride, padding, dilation, groups, padding_mode, precision))
    known = _parameters_of.get(spelled) if spelled else None
    if known is not None:
        if fusion is None:
            again = ops.again(ops.conv, input, weight, bias, known)
        else:
            again = fused.again(fused.CONV, input, weight, bias, known, fusion)
        if again is not None:
            return again
    batched = _check_tensors(name, rank, _DTYPES, input=input, weight=weight, bias=bias)
    params = _parameters(name, rank, weight, stride, padding, dilation, groups, padding_mode)
    params = (*params, _precision(name, precision))
    if fusion is not None:
        y = fused.convolved(name, fused.CONV, input, weight, bias, params, fusion, batched)
        _remember(spelled, params)
        return y
    y = ops.fprop(input if batched else input.unsqueeze(0), weight, bias, params)
    _remember(spelled, params)
    return y if batched else y.squeeze(0)


def _scaled_conv(
    rank, input, weight, scale_a, scale_b, bias, stride, padding, dilation, groups, padding_mode, out_dtype
) -> Tensor:
    name = f"scaled_conv{rank}d"
    tensors = (input, weight, scale_a, scale_b, bias)
    if has_torch_function(tensors):
        args = (*tensors, stride, padding, dilation, groups)
        return _hand_over(name, tensors, args, padding_mode=padding_mode, out_dtype=out_dtype)
    batched = _check_tensors(name, rank, None, input=input, weight=weight, scale_a=scale_a, scale_b=scale_b, bias=bias)
    if not isinstance(out_dtype, torch.dtype):
        raise TypeError(f"{name}(): argument 'out_dtype' must be torch.dtype, not {type(out_dtype).__name__}")
    params = _parameters(name, rank, weight, stride, padding, dilation, groups, padding_mode)
    x = input if batched else input.unsqueeze(0)
    y = ops.recordable(ops.conv_scaled)(x, weight, bias, *params, scale_a, scale_b, out_dtype)
    return y if batched else y.squeeze(0)


def _int_conv(rank, input, weight, bias, stride, padding, dilation, groups, padding_mode) -> Tensor:
    name = f"int_conv{rank}d"
    if has_torch_function((input, weight, bias)):
        args = (input, weight, bias, stride, padding, dilation, groups)
        return _hand_over(name, args[:3], args, padding_mode=padding_mode)
    batched = _check_tensors(name, rank, None, input=input, weight=weight, bias=bias)
    params = _parameters(name, rank, weight, stride, padding, dilation, groups, padding_mode)
    y = ops.recordable(ops.conv_int)(input if batched else input.unsqueeze(0), weight, bias, *params)
    return y if batched else y.squeeze(0)


def _parameters(name, rank, weight, stride, padding, dilation, groups, padding_mode) -> tuple:
    """stride, padding, dilation, groups and modes as forward operators take them."""
    stride = _ints(name, "stride", stride, rank)
    dilation = _ints(name, "dilation", dilation, rank)
    padding = _padding(name, padding, rank, weight, stride, dilation)
    return stride, padding, dilation, _index(name, "groups", groups), _modes(name, padding_mode, rank)


def _conv_transpose(
    rank, input, weight, bias, stride, padding, output_padding, groups, dilation, padding_mode, precision, fusion
) -> Tensor:
    name = f"conv_transpose{rank}d"
    tensors = (input, weight, bias)
    if has_torch_function(tensors if fusion is None else (*tensors, fusion.residual, fusion.scale)):
        args = (*tensors, stride, padding, output_padding, groups, dilation)
        return _hand_over(name, tensors, args, fusion, padding_mode=padding_mode, precision=precision)
    spelling = (stride, padding, output_padding, groups, dilation, padding_mode, precision)
    spelled = _spelled(-rank, weight, padding, spelling)
    known = _parameters_of.get(spelled) if spelled else None
    if known is not None:
        if fusion is None:
            again = ops.again(ops.conv_transpose, input, weight, bias, known)
        else:
            again = fused.again(fused.CONV_TRANSPOSE, input, weight, bias, known, fusion)
        if again is not None:
            return again
    batched = _check_tensors(name, rank, _DTYPES, input=input, weight=weight, bias=bias)
    if isinstance(padding, str):
        raise TypeError(f"{name}(): argument 'padding' must be ints or (lower, upper) pairs, not str")
    stride = _ints(name, "stride", stride, rank)
    dilation = _ints(name, "dilation", dilation, rank)
    params = (
        stride,
        _padding(name, padding, rank, weight, stride, dilation),
        _ints(name, "output_padding", output_padding, rank),
        _index(name, "groups", groups),
        dilation,
        _modes(name, padding_mode, rank),
        _precision(name, precision),
    )
    if fusion is not None:
        y = fused.convolved(name, fused.CONV_TRANSPOSE, input, weight, bias, params, fusion, batched)
        _remember(spelled, params)
        return y
    y = ops.recordable(ops.conv_transpose)(input if batched else input.unsqueeze(0), weight, bias, *params)
    _remember(spelled, params)
    return y if batched else y.squeeze(0)


# Parameters as operators take them, by how they were spelled, for calls that were found right.
_parameters_of = fast.Remembered()


def _spelled(rank: int, weight: Any, padding: Any, given: tuple) -> Any:
    """A key of parameters, None if there is none; "same" depends on the weight's shape too."""
    if torch.compiler.is_compiling() or not _exact(given):
        return None
    if type(padding) is not str:
        return rank, given
    if not isinstance(weight, Tensor) or weight.is_nested or not _exact(weight.shape):  # symbols have no hash
        return None
    return rank, given, weight.shape


def _exact(values: tuple) -> bool:
    """Whether values that are equal are also of the same types: True and 1.0 are no 1."""
    for v in values:
        kind = type(v)
        if kind is not int and kind is not str and v is not None and (kind is not tuple or not _exact(v)):
            return False
    return True


def _remember(spelled: Any, params: tuple) -> None:
    if spelled is not None and spelled not in _parameters_of:
        _parameters_of.remember(spelled, tuple(tuple(p) if isinstance(p, list) else p for p in params))


def _hand_over(name: str, tensors: tuple, args: tuple, fusion: fused.Fusion | None = None, **keywords: Any) -> Tensor:
    """To whoever overrides torch functions: tensor subclasses, fx's proxies, function modes."""
    if fusion is not None:
        keywords |= fusion._asdict()
        tensors = (*tensors, fusion.residual, fusion.scale)
    return handle_torch_function(globals()[name], tensors, *args, **keywords)


def _check_tensors(
    name: str,
    rank: int,
    dtypes: set[torch.dtype] | None,
    input: Any,
    weight: Any,
    *,
    weight_name: str = "weight",
    **rest: Any,
) -> bool:
    """Whether the input is batched; raises for what is not a dense tensor of the right rank on a device we know.

    Without `dtypes`, which ones fit is for the operator to say. The name of what may be None ends with "bias".
    """
    for argument, t in {"input": input, weight_name: weight, **rest}.items():
        if t is None and argument.endswith("bias"):
            continue
        check_kind(name, argument, t)
        if dtypes is not None and t.dtype not in dtypes:
            instead = f"scaled_conv{rank}d takes it" if t.dtype is torch.float8_e4m3fn else "convert it with .to()"
            raise NotImplementedError(
                f"{name}(): {argument} {list(t.shape)} has dtype {t.dtype}, which is not supported; {instead}"
            )
        if t.device != input.device:
            raise RuntimeError(
                f"{name}(): Expected all tensors to be on the same device, but input {list(input.shape)} is on "
                f"{input.device} and {argument} {list(t.shape)} is on {t.device}"
            )
    if weight.dim() != rank + 2:
        raise RuntimeError(
            f"{name}(): expected a {rank + 2}-dimensional {weight_name}, but got {weight_name} of size "
            f"{list(weight.shape)} (input {list(input.shape)})"
        )
    if input.dim() not in (rank + 1, rank + 2):
        raise RuntimeError(
            f"Expected {rank + 1}D (unbatched) or {rank + 2}D (batched) input to {name}, "
            f"but got input of size: {list(input.shape)}"
        )
    return input.dim() == rank + 2


def _index(name: str, argument: str, value: Any, too_large: type[Exception] = ValueError) -> Any:
    if isinstance(value, torch.SymInt):
        return value
    try:
        if isinstance(value, bool):
            raise TypeError
        value = operator.index(value)
    except (TypeError, RuntimeError):  # the latter of a tensor without memory
        raise TypeError(f"{name}(): argument '{argument}' must be int, not {type(value).__name__}") from None
    if not -(2**63) <= value < 2**63:
        raise too_large(f"{name}(): argument '{argument}' does not fit into 64 bits, but got {value}")
    return value


def _is_sequence(value: Any) -> bool:
    return isinstance(value, (tuple, list))  # PyTorch takes no others


def _spread(name: str, argument: str, value: Any, entries: list[Any], rank: int) -> list[Any]:
    """`entries`, of which there are one or `rank`, as one per axis; `value` is what they were made of."""
    if len(entries) == 1:
        entries = entries * rank
    if len(entries) != rank:
        raise RuntimeError(
            f"{name}(): expected {argument} to be a single value or a list of {rank} values to match the convolution "
            f"dimensions, but got {argument}={value}"
        )
    return entries


def _per_axis(name: str, argument: str, value: Any, rank: int) -> list[Any]:
    """One entry per axis from a single entry, or from a sequence of one or `rank` entries."""
    return _spread(name, argument, value, list(value) if _is_sequence(value) else [value], rank)


def _indices(name: str, argument: str, values: Sequence[Any]) -> list[Any]:
    """Whole numbers of a sequence, with PyTorch's exceptions, of which only the first must be no bool."""
    return [
        int(v) if place and isinstance(v, bool) else _index(name, argument, v, TypeError)
        for place, v in enumerate(values)
    ]


def _ints(name: str, argument: str, value: Any, rank: int) -> list[int]:
    # types before lengths
    entries = _indices(name, argument, value) if _is_sequence(value) else [_index(name, argument, value)]
    return _spread(name, argument, value, entries, rank)


def check_sizes(name: str, rank: int, per_axis: dict[str, Any], **numbers: Any) -> None:
    """Raises for arguments of a constructor that are no whole numbers, or negative."""
    for argument, value in numbers.items():
        if not isinstance(value, Integral) or isinstance(value, bool):
            raise TypeError(f"{name}(): argument '{argument}' must be int, not {type(value).__name__}")
    whole = {argument: [_index(name, argument, value)] for argument, value in numbers.items()}
    for argument, value in per_axis.items():
        if not _is_sequence(value) and not isinstance(value, Integral):
            raise TypeError(f"{name}(): argument '{argument}' must be int or one per axis, not {type(value).__name__}")
        whole[argument] = _ints(name, argument, value, rank)
    for argument, values in whole.items():
        if any(v < 0 for v in values):
            raise ValueError(f"{name}(): {argument} must not be negative, but got {argument}={values}")


def _modes(name: str, value: Any, rank: int) -> str:
    """One name if all axes agree, else one per axis joined by commas."""
    modes = _per_axis(name, "padding_mode", value, rank)
    if not all(isinstance(m, str) for m in modes):
        raise TypeError(f"{name}(): argument 'padding_mode' must be str or one str per axis, not {value!r}")
    for mode in modes:
        if mode not in PADDING_MODES:  # here, not below, where "circular,zeros" is two names
            raise ValueError(f"padding_mode must be one of {set(PADDING_MODES)}, but got padding_mode={mode!r}")
    return modes[0] if modes.count(modes[0]) == rank else ",".join(modes)


def _precision(name: str, value: Any) -> str | None:
    if value is not None and not isinstance(value, str):
        raise TypeError(f"{name}(): argument 'precision' must be str or None, not {type(value).__name__}")
    return value


def _padding(name: str, value: Any, rank: int, weight: Tensor, stride: list[int], dilation: list[int]) -> list[int]:
    """(lower, upper) of each axis in turn."""
    if isinstance(value, (str, bytes)):
        if value == "valid":
            return [0] * (2 * rank)
        if value != "same":
            raise RuntimeError(f"Invalid padding string: {value!r}; it must be 'same' or 'valid'")
        if any(s != 1 for s in stride):
            raise RuntimeError(f"padding='same' is not supported for strided convolutions, but got stride={stride}")
        return [p for taps, d in zip(weight.shape[2:], dilation, strict=True) for p in same_padding(taps, d)]
    if not _is_sequence(value) or not any(map(_is_sequence, value)):
        return [p for p in _ints(name, "padding", value, rank) for _ in range(2)]
    pairs: list[list[int]] = []
    for entry in value:
        pair = list(entry) if _is_sequence(entry) else [entry, entry]
        if len(pair) != 2:
            raise RuntimeError(f"{name}(): expected padding entries to be ints or (lower, upper), but got {entry}")
        pairs.append([_index(name, "padding", p) for p in pair])
    return [p for pair in _spread(name, "padding", value, pairs, rank) for p in pair]


refuse_script(*(globals()[_name] for _name in __all__))
