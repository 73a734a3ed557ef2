"""Modules of convolutions written as two thinner ones: depthwise-separable, and spatially separable.

    >>> import torch, triton_conv
    >>> layer = triton_conv.nn.DepthwiseSeparableConv2d(8, 16, 3, padding=1)
    >>> layer(torch.randn(1, 8, 14, 14)).shape
    torch.Size([1, 16, 14, 14])

Their parts are modules of `triton_conv.nn`, with the parameters: hooks, weight_norm and pruning go there.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import Module
from torch.overrides import has_torch_function

from . import arguments, separable
from .arguments import Ints, Modes, Padding
from .unsupported import not_scripted

__all__ = [
    "DepthwiseSeparableConv1d",
    "DepthwiseSeparableConv2d",
    "DepthwiseSeparableConv3d",
    "SpatiallySeparableConv2d",
]


class _Factored(Module):
    convolution: ClassVar[type[Module]]  # what the parts are: `triton_conv.nn` says
    in_channels: int
    out_channels: int

    def __prepare_scriptable__(self) -> None:
        raise RuntimeError(not_scripted(f"triton_conv.nn.{type(self).__name__}"))


class _DepthwiseSeparable(_Factored):
    _function: ClassVar[Callable[..., Tensor]]
    rank: ClassVar[int]

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: Ints,
        stride: Ints = 1,
        padding: Padding = 0,
        dilation: Ints = 1,
        depth_multiplier: int = 1,
        bias: bool = True,
        padding_mode: Modes = "zeros",
        device: Any = None,
        dtype: torch.dtype | None = None,
        *,
        depthwise_bias: bool = False,
        precision: str | None = None,
        fused: bool | None = None,
    ) -> None:
        super().__init__()
        sizes = {"in_channels": in_channels, "out_channels": out_channels, "depth_multiplier": depth_multiplier}
        arguments.check_sizes(
            type(self).__name__,
            self.rank,
            {"kernel_size": kernel_size, "stride": stride, "dilation": dilation},
            **sizes,
        )
        if in_channels < 1:
            raise ValueError(f"in_channels must be a positive integer, but got in_channels={in_channels}")
        if depth_multiplier < 1:
            raise ValueError(
                f"depth_multiplier must be a positive integer, but got depth_multiplier={depth_multiplier}"
            )
        self.in_channels, self.out_channels, self.depth_multiplier = in_channels, out_channels, depth_multiplier
        if fused is not None and not isinstance(fused, bool):
            raise TypeError(f"fused must be bool or None, not {type(fused).__name__}")
        self.fused = fused
        options = {"device": device, "dtype": dtype, "precision": precision}
        between = arguments.index_of(type(self).__name__, "depth_multiplier", in_channels * depth_multiplier)
        self.depthwise: Any = self.convolution(
            in_channels,
            between,
            kernel_size,
            stride,
            padding,
            dilation,
            in_channels,
            depthwise_bias,
            padding_mode,
            **options,
        )
        self.pointwise: Any = self.convolution(between, out_channels, 1, bias=bias, **options)

    def extra_repr(self) -> str:
        return "" if self.fused is None else f"fused={self.fused}"

    def forward(self, input: Tensor) -> Tensor:
        """The pointwise convolution of the depthwise one of `input`."""
        first, second = self.depthwise, self.pointwise
        traced = has_torch_function((input,)) and not self.fused  # a graph of two modules says more
        if traced or not (self._is_plain(first) and self._is_plain(second)):
            return second(first(input))
        how = (first.stride, first.padding, first.dilation)
        options = {"padding_mode": first.padding_mode, "precision": first.precision, "fused": self.fused}
        return self._function(input, first.weight, second.weight, first.bias, second.bias, *how, **options)

    def _is_plain(self, part: Module) -> bool:
        """Whether calling the part does no more than its parameters say."""
        return (
            isinstance(part, self.convolution)
            and type(part).forward is self.convolution.forward
            and not {"forward", "_conv_forward"} & vars(part).keys()
            and not (part._forward_hooks or part._forward_pre_hooks or part._backward_hooks or part._backward_pre_hooks)
            and getattr(part, "activation", None) is None
            and getattr(part, "scale", None) is None
        )


class DepthwiseSeparableConv1d(_DepthwiseSeparable):
    """A filter for each channel by itself, then a 1x1 convolution across channels.

        >>> layer = triton_conv.nn.DepthwiseSeparableConv1d(4, 8, 5, padding="same")
        >>> layer(torch.randn(2, 4, 50)).shape
        torch.Size([2, 8, 50])

    Shapes: (N, C, W) or (C, W) to (N, K, Q) or (K, Q). See `DepthwiseSeparableConv2d` for the rest.
    """

    rank = 1
    _function = staticmethod(separable.separable_conv1d)


class DepthwiseSeparableConv2d(_DepthwiseSeparable):
    """A filter for each channel by itself, then a 1x1 convolution across channels; Chollet 2017, Xception.

        >>> layer = triton_conv.nn.DepthwiseSeparableConv2d(4, 8, 3, stride=2, padding=1, depth_multiplier=2)
        >>> layer
        DepthwiseSeparableConv2d(
          (depthwise): Conv2d(4, 8, kernel_size=(3, 3), stride=(2, 2), padding=(1, 1), groups=4, bias=False)
          (pointwise): Conv2d(8, 8, kernel_size=(1, 1), stride=(1, 1))
        )
        >>> layer(torch.randn(1, 4, 28, 28)).shape
        torch.Size([1, 8, 14, 14])

    The same as these two modules one after the other: `depthwise`, which has stride, padding and its modes, dilation
    and `depth_multiplier` filters for each channel, then `pointwise`. The state_dict has their names, so that of an
    `nn.Sequential(OrderedDict(depthwise=..., pointwise=...))` fits. `bias` is pointwise's; one of depthwise adds
    nothing to what can be learned, and is there with `depthwise_bias=True` for models that have it.

    `fused` is that of `triton_conv.separable_conv2d`. A part with hooks, or put in place of one of ours, is called as
    it is. See `triton_conv.separable_conv2d` for dtypes.

    Shapes: (N, C, H, W) or (C, H, W) to (N, K, P, Q) or (K, P, Q). Raises ValueError, in the constructor, for a
    `depth_multiplier` below 1 and for what `Conv2d` raises it for.
    """

    rank = 2
    _function = staticmethod(separable.separable_conv2d)


class DepthwiseSeparableConv3d(_DepthwiseSeparable):
    """A filter for each channel by itself, then a 1x1x1 convolution across channels.

        >>> layer = triton_conv.nn.DepthwiseSeparableConv3d(4, 8, 3, padding=((2, 0), 1, 1))
        >>> layer(torch.randn(1, 4, 5, 6, 6)).shape
        torch.Size([1, 8, 5, 6, 6])

    Shapes: (N, C, D, H, W) or (C, D, H, W) to (N, K, Z, P, Q) or (K, Z, P, Q). See `DepthwiseSeparableConv2d` for the
    rest.
    """

    rank = 3
    _function = staticmethod(separable.separable_conv3d)


class SpatiallySeparableConv2d(_Factored):
    """An R x 1 convolution, then a 1 x S one; Szegedy et al. 2016, Inception-v3.

        >>> layer = triton_conv.nn.SpatiallySeparableConv2d(4, 8, 7, padding=3, middle_channels=6)
        >>> layer
        SpatiallySeparableConv2d(
          (vertical): Conv2d(4, 6, kernel_size=(7, 1), stride=(1, 1), padding=(3, 0), bias=False)
          (horizontal): Conv2d(6, 8, kernel_size=(1, 7), stride=(1, 1), padding=(0, 3))
        )
        >>> layer(torch.randn(1, 4, 17, 17)).shape
        torch.Size([1, 8, 17, 17])

    The same as these two modules one after the other, and without `middle_bias` as one `Conv2d` whose filters are sums
    of `middle_channels` products of a column and a row: `vertical` has the first entry of kernel_size, stride, padding,
    dilation and padding_mode, `horizontal` the second. `middle_channels` is `out_channels` unless given.

    Shapes: (N, C, H, W) or (C, H, W) to (N, K, P, Q) or (K, P, Q). Dtypes: those of `triton_conv.conv2d`. Raises
    RuntimeError, in the constructor, for a number of entries that is neither one nor two, and what `Conv2d` raises.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: Ints,
        stride: Ints = 1,
        padding: Padding = 0,
        dilation: Ints = 1,
        middle_channels: int | None = None,
        bias: bool = True,
        padding_mode: Modes = "zeros",
        device: Any = None,
        dtype: torch.dtype | None = None,
        *,
        middle_bias: bool = False,
        precision: str | None = None,
    ) -> None:
        super().__init__()
        middle_channels = out_channels if middle_channels is None else middle_channels
        sizes = {"in_channels": in_channels, "out_channels": out_channels, "middle_channels": middle_channels}
        arguments.check_sizes(
            type(self).__name__, 2, {"kernel_size": kernel_size, "stride": stride, "dilation": dilation}, **sizes
        )
        self.in_channels, self.middle_channels, self.out_channels = in_channels, middle_channels, out_channels
        options = {"device": device, "dtype": dtype, "precision": precision}
        (R, S), strides = _two("kernel_size", kernel_size), _two("stride", stride)
        dilations, modes = _two("dilation", dilation), _two("padding_mode", padding_mode)
        above, beside = (padding, padding) if isinstance(padding, str) else _two("padding", padding)
        if not isinstance(padding, str):
            above, beside = (above, 0), (0, beside)
        self.vertical: Any = self.convolution(
            in_channels,
            middle_channels,
            (R, 1),
            (strides[0], 1),
            above,
            (dilations[0], 1),
            bias=middle_bias,
            padding_mode=modes[0],
            **options,
        )
        self.horizontal: Any = self.convolution(
            middle_channels,
            out_channels,
            (1, S),
            (1, strides[1]),
            beside,
            (1, dilations[1]),
            bias=bias,
            padding_mode=modes[1],
            **options,
        )

    def forward(self, input: Tensor) -> Tensor:
        """The horizontal convolution of the vertical one of `input`."""
        return self.horizontal(self.vertical(input))


def _two(argument: str, value: Any) -> list[Any]:
    return arguments.per_axis("SpatiallySeparableConv2d", argument, value, 2)
