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

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function

from . import fast, fused, ops, schemas
from .arguments import (
    DTYPES,
    Ints,
    Modes,
    Padding,
    check_tensors,
    forward_parameters,
    index_of,
    ints_of,
    mode_names,
    padding_of,
    precision_of,
)
from .low_precision import int_conv1d, int_conv2d, int_conv3d, scaled_conv1d, scaled_conv2d, scaled_conv3d
from .unsupported import refuse_script

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
    batched = check_tensors(name, rank, DTYPES, input=input, weight=weight, bias=bias)
    params = forward_parameters(name, rank, weight, stride, padding, dilation, groups, padding_mode)
    params = (*params, precision_of(name, precision))
    if fusion is not None:
        y = fused.convolved(name, fused.CONV, input, weight, bias, params, fusion, batched)
        _remember(spelled, params)
        return y
    y = schemas.fprop(input if batched else input.unsqueeze(0), weight, bias, params)
    _remember(spelled, params)
    return y if batched else y.squeeze(0)


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
    batched = check_tensors(name, rank, DTYPES, input=input, weight=weight, bias=bias)
    if isinstance(padding, str):
        raise TypeError(f"{name}(): argument 'padding' must be ints or (lower, upper) pairs, not str")
    stride = ints_of(name, "stride", stride, rank)
    dilation = ints_of(name, "dilation", dilation, rank)
    params = (
        stride,
        padding_of(name, padding, rank, weight, stride, dilation),
        ints_of(name, "output_padding", output_padding, rank),
        index_of(name, "groups", groups),
        dilation,
        mode_names(name, padding_mode, rank),
        precision_of(name, precision),
    )
    if fusion is not None:
        y = fused.convolved(name, fused.CONV_TRANSPOSE, input, weight, bias, params, fusion, batched)
        _remember(spelled, params)
        return y
    y = schemas.recordable(ops.conv_transpose)(input if batched else input.unsqueeze(0), weight, bias, *params)
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


refuse_script(*(globals()[_name] for _name in __all__))
