"""Modules of deformable convolution.

    >>> import torch, triton_conv
    >>> layer = triton_conv.nn.ModulatedDeformConv2d(8, 16, 3, padding=1)
    >>> layer(torch.randn(1, 8, 14, 14)).shape
    torch.Size([1, 16, 14, 14])

`DeformConv2d` is given offsets and mask, as torchvision's is; `ModulatedDeformConv2d` makes its own.
"""

from __future__ import annotations

import math
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import Module, Parameter, init
from torch.nn.modules.utils import _pair

from . import arguments, conv_calls
from .arguments import Ints, Padding
from .deform import deform_conv2d
from .unsupported import not_scripted

__all__ = ["DeformConv2d", "ModulatedDeformConv2d"]

MODULATIONS = ("sigmoid", "none", None)


class DeformConv2d(Module):
    """`torchvision.ops.DeformConv2d`, with `padding` in pairs and by name, `device`, `dtype` and `precision`.

        >>> layer = triton_conv.nn.DeformConv2d(8, 16, 3, padding=1)
        >>> offset, mask = torch.randn(1, 18, 14, 14), torch.rand(1, 9, 14, 14)
        >>> layer(torch.randn(1, 8, 14, 14), offset, mask).shape
        torch.Size([1, 16, 14, 14])

    Constructor, parameters, initialisation, state_dict and repr are torchvision's, which need not be installed.

    Shapes: (N, C, H, W), offset (N, 2 * G * R * S, P, Q) and mask (N, G * R * S, P, Q) to (N, K, P, Q). See
    `triton_conv.deform_conv2d` for dtypes and the errors of a call.

    Raises ValueError, in the constructor, for groups that do not divide the channels and an unknown precision.
    """

    precision: str | None = None  # `convert` swaps classes alone: torchvision's modules have none
    bias: Tensor | None

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: Ints,
        stride: Ints = 1,
        padding: Padding = 0,
        dilation: Ints = 1,
        groups: int = 1,
        bias: bool = True,
        device: Any = None,
        dtype: torch.dtype | None = None,
        *,
        precision: str | None = None,
    ) -> None:
        super().__init__()
        conv_calls.check_precision(precision)
        per_axis = {"kernel_size": kernel_size, "stride": stride, "dilation": dilation}
        sizes = {"in_channels": in_channels, "out_channels": out_channels, "groups": groups}
        arguments.check_sizes(type(self).__name__, 2, per_axis, **sizes)
        for name, channels in {"in_channels": in_channels, "out_channels": out_channels}.items():
            if groups <= 0 or channels % groups:
                raise ValueError(f"{name} must be divisible by groups, but got {name}={channels}, groups={groups}")
        self.in_channels = in_channels
        self.out_channels = out_channels
        self.kernel_size = _pair(kernel_size)
        self.stride = _pair(stride)
        self.padding = _pair(padding) if isinstance(padding, (int, tuple, list)) else padding
        self.dilation = _pair(dilation)
        self.groups = groups
        if precision is not None:
            self.precision = precision
        shape = (out_channels, in_channels // groups, *self.kernel_size)
        self.weight = Parameter(torch.empty(shape, device=device, dtype=dtype))
        how = (list(self.stride), list(self.dilation))
        arguments.padding_of(type(self).__name__, padding, 2, self.weight, *how)  # for its errors
        if bias:
            self.bias = Parameter(torch.empty(out_channels, device=device, dtype=dtype))
        else:
            self.register_parameter("bias", None)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialises weight and bias as torch's convolutions do."""
        init.kaiming_uniform_(self.weight, a=math.sqrt(5))
        if self.bias is not None:
            fan_in, _ = init._calculate_fan_in_and_fan_out(self.weight)
            if fan_in != 0:
                bound = 1 / math.sqrt(fan_in)
                init.uniform_(self.bias, -bound, bound)

    def forward(self, input: Tensor, offset: Tensor, mask: Tensor | None = None) -> Tensor:
        """The convolution of `input`, its taps moved by `offset` and scaled by `mask`."""
        return deform_conv2d(
            input,
            offset,
            self.weight,
            self.bias,
            self.stride,
            self.padding,
            self.dilation,
            mask,
            precision=self.precision,
        )

    def extra_repr(self) -> str:
        text = f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}, stride={self.stride}"
        text += f", padding={self.padding}" if self.padding != (0, 0) else ""
        text += f", dilation={self.dilation}" if self.dilation != (1, 1) else ""
        text += f", groups={self.groups}" if self.groups != 1 else ""
        text += ", bias=False" if self.bias is None else ""
        return text + (f", precision={self.precision}" if self.precision is not None else "")

    def __prepare_scriptable__(self) -> None:
        """What torch.jit.script asks of a module before it reads its code."""
        raise RuntimeError(not_scripted(f"triton_conv.nn.{type(self).__name__}"))


class ModulatedDeformConv2d(DeformConv2d):
    """A `DeformConv2d` whose offsets and mask come from a convolution of the same input, `conv_offset`.

        >>> layer = triton_conv.nn.ModulatedDeformConv2d(8, 8, 3, padding=1, groups=8, modulation="none")
        >>> layer(torch.randn(1, 8, 14, 14)).shape
        torch.Size([1, 8, 14, 14])

    modulation: what makes the mask of the last channels of `conv_offset`. "sigmoid" is DCN v2; "none" takes them as
    they are, unbounded, as DCN v4 does; with None there is no mask, which is DCN v1. offset_groups: how many groups of
    input channels have offsets and masks of their own. `conv_offset` has the parameters' kernel_size, stride, padding
    and dilation, and starts at zeros, so that at first no tap moves and each counts half ("sigmoid") or fully: without
    a sigmoid its biases of the mask start at ones, for where all masks are zero no weight has a gradient.

    state_dict: weight, bias, conv_offset.weight and conv_offset.bias, as in mmcv's DeformConv2dPack and
    ModulatedDeformConv2dPack, in the same order of channels.

    Shapes: (N, C, H, W) to (N, K, P, Q). Raises ValueError, in the constructor, for another modulation, or offset
    groups that do not divide the channels. See `DeformConv2d` for dtypes, other arguments and errors.
    """

    convolution: ClassVar[type[Module]]  # what makes offsets: `triton_conv.nn` says

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: Ints,
        stride: Ints = 1,
        padding: Padding = 0,
        dilation: Ints = 1,
        groups: int = 1,
        bias: bool = True,
        offset_groups: int = 1,
        modulation: str | None = "sigmoid",
        device: Any = None,
        dtype: torch.dtype | None = None,
        *,
        precision: str | None = None,
    ) -> None:
        if modulation is not None and not isinstance(modulation, str):
            raise TypeError(f"modulation must be str or None, not {type(modulation).__name__}")
        if modulation not in MODULATIONS:
            raise ValueError(f"modulation must be one of {MODULATIONS}, but got modulation={modulation!r}")
        arguments.check_sizes(type(self).__name__, 2, {}, in_channels=in_channels, offset_groups=offset_groups)
        if offset_groups <= 0 or in_channels % offset_groups:
            raise ValueError(
                f"in_channels must be divisible by offset_groups, but got in_channels={in_channels}, "
                f"offset_groups={offset_groups}"
            )
        how = (kernel_size, stride, padding, dilation)
        super().__init__(in_channels, out_channels, *how, groups, bias, device, dtype, precision=precision)
        self.offset_groups = offset_groups
        self.modulation = modulation
        taps = offset_groups * math.prod(self.kernel_size)
        channels = taps * (2 if modulation is None else 3)
        convolution: Any = self.convolution
        self.conv_offset = convolution(in_channels, channels, *how, device=device, dtype=dtype, precision=precision)
        if modulation == "none":
            self.conv_offset.ones = taps
            self.conv_offset.reset_parameters()

    def forward(self, input: Tensor) -> Tensor:  # type: ignore[override]
        """The convolution of `input`, which says itself where its taps go."""
        found = self.conv_offset(input)
        if self.modulation is None:
            return super().forward(input, found)
        pairs = found.shape[1] // 3 * 2
        offset, mask = found[:, :pairs], found[:, pairs:]
        return super().forward(input, offset, mask.sigmoid() if self.modulation == "sigmoid" else mask)

    def extra_repr(self) -> str:
        text = super().extra_repr()
        text += f", offset_groups={self.offset_groups}" if self.offset_groups != 1 else ""
        return text + f", modulation={self.modulation}"
