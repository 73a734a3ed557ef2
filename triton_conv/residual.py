"""Convolutions that add a residual in their kernel where it fits their output, and after it where it does not.

A torch.fx graph does not say of what shape a tensor will be: `conv(x) + t` may repeat t along an axis, or have a wider
dtype than either. `fuse` puts these classes into graphs, where they find out at each call.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.fx import Proxy

from . import arguments, nn
from .geometry import output_extent, transposed_extent
from .reference import activated


class _Adding:
    """What all of them add to ours; attributes have defaults, as only the class of a module is swapped."""

    in_place = False  # the sum keeps the shape and dtype of the convolution's output, as += does

    def forward(self: Any, input: Tensor, *rest: Any, residual: Any, **keywords: Any) -> Tensor:
        traced = isinstance(input, Proxy) or isinstance(residual, Proxy)  # a graph of a graph: it has no shapes either
        if traced or self._fits(residual, input, *rest, **keywords):
            return super().forward(input, *rest, residual=residual, **keywords)  # type: ignore[misc]
        y = self._alone(input, *rest, **keywords)
        activation = self.activation or ""
        if self.residual_after_activation:
            y, activation = activated(y, activation, self.negative_slope), ""
        y = y.add_(residual) if self.in_place else y + residual
        return activated(y, activation, self.negative_slope)

    def _fits(self: Any, residual: Any, input: Tensor, *rest: Any, **keywords: Any) -> bool:
        """Whether the sum has the dtype and the shape of both."""
        if not isinstance(residual, Tensor) or residual.device != input.device:
            return False
        rank, device = len(self.kernel_size), input.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else input.dtype
        extents = tuple(residual.shape[-rank:]) if residual.dim() == input.dim() else ()
        shape = (*input.shape[: -rank - 1], self.out_channels, *extents)
        fits = residual.dtype is dtype and residual.shape == shape
        return bool(fits and extents == self._extents(input, *rest, **keywords))


class _Forward(_Adding):
    def _alone(self: Any, input: Tensor) -> Tensor:
        return nn.convolved(self, self._function, input, self.weight, self.bias, self.precision)

    def _extents(self: Any, input: Tensor) -> tuple[int, ...]:
        how = (nn.padding_of(self), self.kernel_size, self.stride, self.dilation)
        return _computed(_convolved, tuple(input.shape[-len(self.kernel_size) :]), *how)


class _Transposed(_Adding):
    def _alone(self: Any, input: Tensor, output_size: Any = None) -> Tensor:
        return nn.transposed(self, self._function, input, output_size, self.precision)

    def _extents(self: Any, input: Tensor, output_size: Any = None) -> tuple[int, ...]:
        more = nn.output_padding_of(self, input, output_size)
        how = (self.padding, self.kernel_size, self.stride, self.dilation, more)
        return _computed(_transposed, tuple(input.shape[-len(self.kernel_size) :]), *how)


def _computed(function: Any, *args: Any) -> tuple[int, ...]:
    """Remembered, but for torch.compile, which reads through it."""
    return (function.__wrapped__ if torch.compiler.is_compiling() else function)(*args)


@lru_cache(4096)
def _convolved(spatial: Any, padding: Any, taps: Any, stride: Any, dilation: Any) -> tuple[int, ...]:
    if padding == "same":
        return spatial
    axes = zip(spatial, *_sides(0 if padding == "valid" else padding, len(taps)), taps, stride, dilation, strict=True)
    return tuple(output_extent(*axis) for axis in axes)


@lru_cache(4096)
def _transposed(spatial: Any, padding: Any, taps: Any, stride: Any, dilation: Any, more: Any) -> tuple[int, ...]:
    axes = zip(spatial, *_sides(padding, len(taps)), taps, stride, dilation, more, strict=True)
    return tuple(transposed_extent(*axis) for axis in axes)


def _sides(padding: Any, rank: int) -> tuple[list[int], list[int]]:
    """Lower and upper padding of each axis."""
    flat = arguments.padding_of("forward", padding, rank, None, [], [])  # type: ignore[arg-type]
    return flat[::2], flat[1::2]


class Conv1d(_Forward, nn.Conv1d):  # type: ignore[misc]
    """`nn.Conv1d`, with a residual of any shape that can be added to its output."""


class Conv2d(_Forward, nn.Conv2d):  # type: ignore[misc]
    """`nn.Conv2d`, with a residual of any shape that can be added to its output."""


class Conv3d(_Forward, nn.Conv3d):  # type: ignore[misc]
    """`nn.Conv3d`, with a residual of any shape that can be added to its output."""


class ConvTranspose1d(_Transposed, nn.ConvTranspose1d):  # type: ignore[misc]
    """`nn.ConvTranspose1d`, with a residual of any shape that can be added to its output."""


class ConvTranspose2d(_Transposed, nn.ConvTranspose2d):  # type: ignore[misc]
    """`nn.ConvTranspose2d`, with a residual of any shape that can be added to its output."""


class ConvTranspose3d(_Transposed, nn.ConvTranspose3d):  # type: ignore[misc]
    """`nn.ConvTranspose3d`, with a residual of any shape that can be added to its output."""


ADDING: dict[type, type] = {
    cls.__mro__[3]: cls for cls in (Conv1d, Conv2d, Conv3d, ConvTranspose1d, ConvTranspose2d, ConvTranspose3d)
}
