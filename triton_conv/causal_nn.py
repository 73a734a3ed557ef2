"""Causal convolutions as modules; see `triton_conv.streaming`."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor

from . import arguments, conv_calls, streaming
from .arguments import Ints, Modes, Padding
from .causal import causal_conv1d
from .streaming import causal_conv3d
from .unsupported import not_scripted


class _CausalConv:
    """What causal classes share. They take torch's constructor for the rest: its padding is not theirs."""

    rank: ClassVar[int]
    precision: str | None = None
    time_mode: str

    def _construct(self, time_mode: str, precision: str | None, *given: Any) -> None:
        conv_calls.check_precision(precision)
        name = type(self).__name__
        streaming.check_time_mode(name, time_mode)
        in_channels, out_channels, kernel_size, stride, dilation, groups, bias, device, dtype = given
        sizes = {"in_channels": in_channels, "out_channels": out_channels, "groups": groups}
        arguments.check_sizes(
            name, self.rank, {"kernel_size": kernel_size, "stride": stride, "dilation": dilation}, **sizes
        )
        super().__init__(  # type: ignore[call-arg]
            in_channels,
            out_channels,
            kernel_size,
            stride=stride,
            dilation=dilation,
            groups=groups,
            bias=bias,
            device=device,
            dtype=dtype,
        )
        self.time_mode, self.precision = time_mode, precision

    def extra_repr(self) -> str:
        text = super().extra_repr()  # type: ignore[misc]
        text += "" if self.time_mode == "zeros" else f", time_mode={self.time_mode}"
        return text if self.precision is None else f"{text}, precision={self.precision}"

    def __prepare_scriptable__(self) -> None:
        raise RuntimeError(not_scripted(f"triton_conv.nn.{type(self).__name__}"))


class CausalConv1d(_CausalConv, torch.nn.Conv1d):
    """`triton_conv.causal_conv1d` over all channels of a group as a module; parameters are those of `torch.nn.Conv1d`.

        >>> layer = triton_conv.nn.CausalConv1d(4, 8, 3, dilation=2)
        >>> y, context = layer(torch.randn(2, 4, 100), return_context=True)
        >>> layer(torch.randn(2, 4, 10), context).shape
        torch.Size([2, 8, 10])

    Shapes: (N, C, L) or (C, L) to (N, K, Q) or (K, Q), context (N, C, positions). See `CausalConv3d` for the rest.
    """

    rank = 1

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: Ints,
        stride: Ints = 1,
        dilation: Ints = 1,
        groups: int = 1,
        bias: bool = True,
        time_mode: str = "zeros",
        device: Any = None,
        dtype: torch.dtype | None = None,
        *,
        precision: str | None = None,
    ) -> None:
        rest = (in_channels, out_channels, kernel_size, stride, dilation, groups, bias, device, dtype)
        self._construct(time_mode, precision, *rest)

    def forward(  # type: ignore[override]
        self, input: Tensor, context: Tensor | None = None, return_context: bool = False
    ) -> Tensor | tuple[Tensor, Tensor]:
        """The convolution of `input`, after `context`; with `return_context` a pair of it and the next context."""
        return causal_conv1d(
            input,
            self.weight,
            self.bias,
            context=context,
            return_context=return_context,
            stride=self.stride,
            dilation=self.dilation,
            groups=self.groups,
            time_mode=self.time_mode,
            precision=self.precision,
        )


class CausalConv3d(_CausalConv, torch.nn.Conv3d):
    """`triton_conv.causal_conv3d` as a module; parameters, and so state_dicts, are those of `torch.nn.Conv3d`.

        >>> layer = triton_conv.nn.CausalConv3d(3, 8, 3, padding=1, time_mode="replicate")
        >>> y, context = layer(torch.randn(1, 3, 1, 16, 16), return_context=True)
        >>> layer(torch.randn(1, 3, 4, 16, 16), context).shape
        torch.Size([1, 8, 4, 16, 16])

    padding and padding_mode are those of rows and columns: an int or (lower, upper) pair for both or for each, and a
    name for both or for each. In time a layer looks back as far as its filter reaches. A decoder that gets its video in
    chunks keeps one context per layer; None is the beginning:

        >>> layers = torch.nn.ModuleList(triton_conv.nn.CausalConv3d(8, 8, 3, padding=1) for _ in range(2))
        >>> contexts = [None] * len(layers)
        >>> def decode(chunk):
        ...     for i, layer in enumerate(layers):
        ...         chunk, contexts[i] = layer(torch.relu(chunk), contexts[i], return_context=True)
        ...     return chunk
        >>> video = torch.randn(1, 8, 5, 6, 6)
        >>> chunks = torch.cat([decode(chunk) for chunk in video.split((1, 4), dim=2)], dim=2)
        >>> contexts = [None] * len(layers)
        >>> torch.equal(chunks, decode(video))
        True

    Shapes: (N, C, D, H, W) or (C, D, H, W) to (N, K, Z, P, Q) or (K, Z, P, Q), context (N, C, frames, H, W). See
    `triton_conv.causal_conv3d` for dtypes and the errors of a call.

    Raises, in the constructor, ValueError for groups that do not divide the channels and for an unknown mode or
    precision, RuntimeError for padding or modes whose number is not two.
    """

    rank = 3

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
        padding_mode: Modes = "zeros",
        time_mode: str = "zeros",
        device: Any = None,
        dtype: torch.dtype | None = None,
        *,
        precision: str | None = None,
    ) -> None:
        rest = (in_channels, out_channels, kernel_size, stride, dilation, groups, bias, device, dtype)
        self._construct(time_mode, precision, *rest)
        name = type(self).__name__
        arguments.padding_of(name, padding, 2, self.weight[:, :, 0], list(self.stride[1:]), list(self.dilation[1:]))
        names = arguments.mode_names(name, padding_mode, 2).split(",")
        self.padding: Any = padding if isinstance(padding, str) else _entries(padding)
        self.padding_mode: Any = names[0] if len(names) == 1 else tuple(names)

    def forward(  # type: ignore[override]
        self, input: Tensor, context: Tensor | None = None, return_context: bool = False
    ) -> Tensor | tuple[Tensor, Tensor]:
        """The convolution of `input`, after `context`; with `return_context` a pair of it and the next context."""
        return causal_conv3d(
            input,
            self.weight,
            self.bias,
            context,
            stride=self.stride,
            padding=self.padding,
            dilation=self.dilation,
            groups=self.groups,
            padding_mode=self.padding_mode,
            time_mode=self.time_mode,
            return_context=return_context,
            precision=self.precision,
        )


def _entries(padding: Any) -> tuple[Any, ...]:
    """One int or (lower, upper) for rows and one for columns."""
    entries = arguments.per_axis("", "padding", padding, 2)
    return tuple(entry if isinstance(entry, int) else tuple(entry) for entry in entries)
