"""Blocks of networks whose parallel convolutions are one launch, forward and input gradient each.

    >>> import torch, triton_conv
    >>> triton_conv.nn.ASPP(16, 8, rates=(2, 4)).eval()(torch.randn(1, 16, 9, 9)).shape
    torch.Size([1, 8, 9, 9])

Each computes what the same block of torch.nn does, one branch after the other. Branches of one launch share one batch
norm, over the channels of all of them, which is the same as one for each. Their convolutions are submodules that hold
parameters and are not called: hooks on them never run.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from numbers import Real
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import adaptive_avg_pool2d, max_pool2d, relu

from . import arguments, branches_ops, functional
from .branches import Branch, multi_conv2d

__all__ = ["ASPP", "InceptionBranches", "SelectiveKernel"]


def _branches(convs: Iterable[nn.Module], slices: Sequence[tuple[int, int] | None] = ()) -> list[Branch]:
    """What convolution modules compute, of these channels each."""
    found = []
    for i, conv in enumerate(convs):
        assert isinstance(conv, nn.Conv2d)
        how = (conv.stride, conv.padding, conv.dilation, conv.groups)
        found.append(Branch(conv.weight, conv.bias, *how, channels=slices[i] if slices else None))
    return found


def _conv(C: int, K: int, taps: int = 1, dilation: int = 1, **options) -> nn.Conv2d:
    """A convolution that keeps the image's extents, in front of a batch norm."""
    return nn.Conv2d(C, K, taps, padding=taps // 2 * dilation, dilation=dilation, bias=False, **options)


def _check_sizes(module: nn.Module, **numbers: Any) -> None:
    """Raises for what is no whole number, or below one."""
    name = type(module).__name__
    arguments.check_sizes(name, 2, {}, **numbers)
    for argument, value in numbers.items():
        if value < 1:
            raise ValueError(f"{name}(): {argument} must be a positive integer, but got {argument}={value}")


class ASPP(nn.Module):
    """Atrous spatial pyramid pooling: DeepLabv3 (Chen et al. 2017, arXiv 1706.05587), section 3.3.

        >>> pyramid = ASPP(32, 16, rates=(6, 12, 18))
        >>> pyramid(torch.randn(2, 32, 33, 33)).shape
        torch.Size([2, 16, 33, 33])

    A 1x1 convolution, one of 3x3 for each of `rates`, its dilation, and the image's mean go through batch norm and
    ReLU, side by side through a 1x1 projection, batch norm and ReLU, and dropout. The mean is the same at every pixel,
    so that its share of the projection is computed once for each image and added.

    Shapes: (N, in_channels, H, W) to (N, out_channels, H, W). Dtypes: floats, one for input and parameters. Raises
    ValueError, in the constructor, for numbers below 1 and a dropout beyond [0, 1], TypeError for what is no number,
    and in training ValueError for an N of 1, as batch norm does. See `triton_conv.multi_conv2d` for other errors.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int = 256,
        rates: Sequence[int] = (6, 12, 18),
        dropout: float = 0.5,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        _check_sizes(self, in_channels=in_channels, out_channels=out_channels)
        if not isinstance(rates, (tuple, list)):
            raise TypeError(f"ASPP(): argument 'rates' must be a sequence of int, not {type(rates).__name__}")
        for rate in rates:
            _check_sizes(self, rates=rate)
        number: Any = dropout
        if not isinstance(number, Real) or isinstance(number, bool):
            raise TypeError(f"ASPP(): argument 'dropout' must be float, not {type(dropout).__name__}")
        where: dict[str, Any] = {"device": device, "dtype": dtype}
        shape = (in_channels, out_channels)
        pyramid = [_conv(*shape, **where), *(_conv(*shape, 3, rate, **where) for rate in rates)]
        self.convs = nn.ModuleList(pyramid)
        self.norm = nn.BatchNorm2d(len(pyramid) * out_channels, **where)
        self.pool_conv, self.pool_norm = _conv(*shape, **where), nn.BatchNorm2d(out_channels, **where)
        self.project = _conv((len(pyramid) + 1) * out_channels, out_channels, **where)
        self.project_norm = nn.BatchNorm2d(out_channels, **where)
        self.dropout = nn.Dropout(dropout)

    def forward(self, input: Tensor) -> Tensor:
        """The pyramid's features of `input`."""
        features = relu(self.norm(multi_conv2d(input, _branches(self.convs))))
        mean = functional.conv2d(adaptive_avg_pool2d(input, 1), self.pool_conv.weight)
        mean = relu(self.pool_norm(mean))
        of_features, of_mean = self.project.weight.split((features.shape[1], mean.shape[1]), 1)
        y = functional.conv2d(features, of_features) + functional.conv2d(mean, of_mean)
        return self.dropout(relu(self.project_norm(y)))


class InceptionBranches(nn.Module):
    """An Inception block: GoogLeNet (Szegedy et al. 2014, arXiv 1409.4842), figure 2b, with batch norm.

        >>> block = InceptionBranches(24, 8, 12, 16, 4, 8, 8)  # in_channels, then as in torchvision's GoogLeNet
        >>> block(torch.randn(2, 24, 14, 14)).shape
        torch.Size([2, 40, 14, 14])

    Side by side: a 1x1 convolution to ch1x1 channels; one to ch3x3red, then 3x3 to ch3x3; one to ch5x5red, then 5x5 to
    ch5x5; a 3x3 max pooling, then 1x1 to pool_proj; each with batch norm and ReLU. The 1x1 convolutions of the input
    are one launch; the 3x3 and the 5x5, which read slices of what these wrote, are another. Without gradients the last
    ReLUs write their slices of the output; else what they wrote is put together by torch.cat.

    Shapes: (N, in_channels, H, W) to (N, ch1x1 + ch3x3 + ch5x5 + pool_proj, H, W). Dtypes: floats, one for input and
    parameters. Raises, in the constructor, ValueError for numbers below 1 and TypeError for what is no number, and
    RuntimeError for an input of another number of channels. See `triton_conv.multi_conv2d` for other errors.
    """

    def __init__(
        self,
        in_channels: int,
        ch1x1: int,
        ch3x3red: int,
        ch3x3: int,
        ch5x5red: int,
        ch5x5: int,
        pool_proj: int,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        _check_sizes(self, in_channels=in_channels, ch1x1=ch1x1, ch3x3red=ch3x3red, ch3x3=ch3x3)
        _check_sizes(self, ch5x5red=ch5x5red, ch5x5=ch5x5, pool_proj=pool_proj)
        where: dict[str, Any] = {"device": device, "dtype": dtype}
        self.entry = nn.ModuleList([_conv(in_channels, K, **where) for K in (ch1x1, ch3x3red, ch5x5red)])
        self.entry_norm = nn.BatchNorm2d(ch1x1 + ch3x3red + ch5x5red, eps=1e-3, **where)
        self.convs = nn.ModuleList([_conv(ch3x3red, ch3x3, 3, **where), _conv(ch5x5red, ch5x5, 5, **where)])
        self.norm = nn.BatchNorm2d(ch3x3 + ch5x5, eps=1e-3, **where)
        self.pool_conv = _conv(in_channels, pool_proj, **where)
        self.pool_norm = nn.BatchNorm2d(pool_proj, eps=1e-3, **where)
        self.ch1x1, self.slices = ch1x1, ((ch1x1, ch3x3red), (ch1x1 + ch3x3red, ch5x5red))

    def forward(self, input: Tensor) -> Tensor:
        """The four branches of `input`, side by side."""
        entry = relu(self.entry_norm(multi_conv2d(input, _branches(self.entry))))
        wide = self.norm(multi_conv2d(entry, _branches(self.convs, self.slices)))
        pooled = self.pool_norm(functional.conv2d(max_pool2d(input, 3, 1, 1), self.pool_conv.weight))
        first = entry[:, : self.ch1x1]
        recorded = torch.compiler.is_compiling() or torch.jit.is_tracing()
        if torch.is_grad_enabled() or recorded or branches_ops._transformed():
            return torch.cat((first, relu(wide), relu(pooled)), 1)
        sizes = [t.shape[1] for t in (first, wide, pooled)]
        y = _empty_beside(entry, sum(sizes))
        parts = y.split(sizes, 1)
        parts[0].copy_(first)
        for part, t in zip(parts[1:], (wide, pooled), strict=True):
            torch.clamp_min(t, 0, out=part)
        return y


def _empty_beside(t: Tensor, channels: int) -> Tensor:
    """Uninitialised, as large as `t` but for its channels, and in its memory format."""
    last = t.is_contiguous(memory_format=torch.channels_last) and not t.is_contiguous()
    memory_format = torch.channels_last if last else torch.contiguous_format
    shape = (t.shape[0], channels, *t.shape[2:])
    return torch.empty(shape, dtype=t.dtype, device=t.device, memory_format=memory_format)


class SelectiveKernel(nn.Module):
    """A selective kernel unit: SKNet (Li et al. 2019, arXiv 1903.06586), section 3.1.

        >>> unit = SelectiveKernel(64, branches=2, groups=32)
        >>> unit(torch.randn(2, 64, 14, 14)).shape
        torch.Size([2, 64, 14, 14])

    `branches` 3x3 convolutions of dilation 1, 2, ..., with `groups` groups, batch norm and ReLU. The mean over pixels
    of their sum is squeezed to max(channels / reduction, 32) numbers, from which one layer for each branch computes
    weights of the channels; a softmax over branches makes them add up to 1, and the output is the branches' weighted
    sum.

    Shapes: (N, channels, H, W) to the same. Dtypes: floats, one for input and parameters. Raises ValueError, in the
    constructor, for numbers below 1 and groups that do not divide the channels, TypeError for what is no number, and in
    training ValueError for an N of 1, as batch norm does. See `triton_conv.multi_conv2d` for other errors.
    """

    def __init__(
        self,
        channels: int,
        branches: int = 2,
        groups: int = 32,
        reduction: int = 16,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        _check_sizes(self, channels=channels, branches=branches, groups=groups, reduction=reduction)
        where: dict[str, Any] = {"device": device, "dtype": dtype}
        every = arguments.index_of(type(self).__name__, "branches", branches * channels)
        norm = nn.BatchNorm2d(every, **where)  # before its branches: it raises where they are too many
        convs = [_conv(channels, channels, 3, 1 + i, groups=groups, **where) for i in range(branches)]
        self.convs, self.norm = nn.ModuleList(convs), norm
        squeezed = max(channels // reduction, 32)
        self.squeeze = nn.Linear(channels, squeezed, bias=False, **where)
        self.squeeze_norm = nn.BatchNorm1d(squeezed, **where)
        self.select = nn.Linear(squeezed, branches * channels, **where)

    def forward(self, input: Tensor) -> Tensor:
        """The weighted sum of the branches of `input`."""
        every = relu(self.norm(multi_conv2d(input, _branches(self.convs))))
        every = every.unflatten(1, (len(self.convs), -1))  # (N, branches, channels, H, W)
        squeezed = relu(self.squeeze_norm(self.squeeze(every.mean((3, 4)).sum(1))))
        weights = self.select(squeezed).unflatten(1, (len(self.convs), -1)).softmax(1)
        weighted = zip(every.unbind(1), weights[..., None, None].unbind(1), strict=True)
        first, weight = next(weighted)  # one after the other: a sum over axis 1 would not be channels-last
        y = first * weight
        for features, weight in weighted:
            y = torch.addcmul(y, features, weight)
        return y
