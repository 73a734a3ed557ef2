"""Drop-in modules for `torch.nn`'s convolutions.

    >>> import torch, triton_conv
    >>> triton_conv.nn.Conv1d(4, 8, 3, padding=((2, 0),), padding_mode="replicate")
    Conv1d(4, 8, kernel_size=(3,), stride=(1,), padding=((2, 0),), padding_mode=replicate)

Each class that torch has too derives from torch's: constructor, parameters, initialisation, state_dict and repr are
torch's, and `isinstance(module, torch.nn.Conv2d)` holds. Beyond torch, `padding` takes (lower, upper) pairs, one per
axis; `padding_mode` takes one name per axis, and builds no padded copy in the kernels; `precision` is that of
`triton_conv.functional`. So are `activation` and `negative_slope`, computed in the convolution's kernel; `forward`
takes a residual, which is added there too, with `residual_after_activation` after the activation; with `scale` the
module has a parameter of that name, one number for each output channel, that multiplies the sums before the bias is
added. Tuples must have one entry per axis, or one entry for all. A lazy class takes the number of input channels from
its first input, and becomes the class it is named after.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from types import FunctionType
from typing import Any, ClassVar

import torch
from torch import Tensor

from . import conv_calls, functional
from .arguments import Ints, Modes, Padding, is_sequence
from .branch_modules import ASPP, InceptionBranches, SelectiveKernel
from .causal_nn import CausalConv1d, CausalConv3d
from .deform_nn import DeformConv2d, ModulatedDeformConv2d
from .factored import (
    DepthwiseSeparableConv1d,
    DepthwiseSeparableConv2d,
    DepthwiseSeparableConv3d,
    SpatiallySeparableConv2d,
)
from .fused_nn import Fusing
from .geometry import PADDING_MODES
from .unsupported import not_scripted

__all__ = [
    "ASPP",
    "CausalConv1d",
    "CausalConv3d",
    "Conv1d",
    "Conv2d",
    "Conv3d",
    "ConvTranspose1d",
    "ConvTranspose2d",
    "ConvTranspose3d",
    "DeformConv2d",
    "DepthwiseSeparableConv1d",
    "DepthwiseSeparableConv2d",
    "DepthwiseSeparableConv3d",
    "InceptionBranches",
    "LazyConv1d",
    "LazyConv2d",
    "LazyConv3d",
    "LazyConvTranspose1d",
    "LazyConvTranspose2d",
    "LazyConvTranspose3d",
    "ModulatedDeformConv2d",
    "SelectiveKernel",
    "SpatiallySeparableConv2d",
]


def convolved(
    module: Any,
    function: Callable[..., Tensor],
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    precision: str | None = None,
    **fusion: Any,
) -> Tensor:
    """`function` of these tensors, with the parameters of a module of torch's or ours; `fusion` goes with them."""
    return function(
        input,
        weight,
        bias,
        module.stride,
        padding_of(module),
        module.dilation,
        module.groups,
        padding_mode=module.padding_mode,
        precision=precision,
        **fusion,
    )


def padding_of(module: Any) -> Any:
    """The padding of a module that is not transposed, as functions take it."""
    if module.padding_mode == "zeros":
        return module.padding
    # What torch hands to F.pad in the other modes; code that patches torch's modules sets this one attribute.
    border = module._reversed_padding_repeated_twice
    return tuple((border[i], border[i + 1]) for i in range(len(border) - 2, -1, -2))  # lists are not remembered


def transposed(
    module: Any,
    function: Callable[..., Tensor],
    input: Tensor,
    output_size: Sequence[int] | None,
    precision: str | None = None,
    **fusion: Any,
) -> Tensor:
    """The same of a transposed convolution."""
    return function(
        input,
        module.weight,
        module.bias,
        module.stride,
        module.padding,
        output_padding_of(module, input, output_size),
        module.groups,
        module.dilation,
        precision=precision,
        **fusion,
    )


def output_padding_of(module: Any, input: Tensor, output_size: Sequence[int] | None) -> tuple[int, ...]:
    """That of a transposed module, for an output of this size."""
    output_padding = module._output_padding(
        input,
        output_size,
        module.stride,
        # torch's formula doubles the padding of an axis: hand it half of lower + upper.
        [sum(p) / 2 if is_sequence(p) else p for p in module.padding],
        module.kernel_size,
        len(module.kernel_size),
        module.dilation,
    )
    halves = output_size is not None and any(map(is_sequence, module.padding))
    return tuple(int(p) for p in output_padding) if halves else tuple(output_padding)


class _Ours(Fusing):
    """What all classes add to torch's. `convert` swaps classes alone, so every attribute here has a default."""

    _function: ClassVar[Callable[..., Tensor]]
    precision: str | None = None
    kernel_size: tuple[int, ...]
    padding: Any

    def _construct(
        self, padding: Any, precision: str | None, fusion: tuple[str | None, float, bool, bool], **arguments: Any
    ) -> None:
        """torch's constructor, then what it does not know: pairs, precision and `fusion`, as `_set_fusion` takes it."""
        conv_calls.check_precision(precision)
        self._check_fusion(*fusion)
        pairs = is_sequence(padding) and any(is_sequence(p) for p in padding)
        super().__init__(padding=0 if pairs else padding, **arguments)  # type: ignore[call-arg]
        if pairs:
            self.padding = _padding_entries(padding, len(self.kernel_size))
            self._reversed_padding_repeated_twice = [p for pair in self.padding[::-1] for p in _pair(pair)]
        if precision is not None:
            self.precision = precision
        self._set_fusion(*fusion, arguments["out_channels"], arguments["device"], arguments["dtype"])

    def extra_repr(self) -> str:
        text = super().extra_repr() + self._fusion_repr()  # type: ignore[misc]
        return text if self.precision is None else f"{text}, precision={self.precision}"

    def __prepare_scriptable__(self) -> None:
        """What torch.jit.script asks of a module before it reads its code."""
        raise RuntimeError(not_scripted(f"triton_conv.nn.{type(self).__name__}"))


class _Conv(_Ours):
    stride: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int
    padding_mode: Modes
    weight: Tensor
    bias: Tensor | None
    _reversed_padding_repeated_twice: list[int]

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
        device: Any = None,
        dtype: torch.dtype | None = None,
        *,
        precision: str | None = None,
        activation: str | None = None,
        negative_slope: float = 0.01,
        residual_after_activation: bool = False,
        scale: bool = False,
    ) -> None:
        modes = is_sequence(padding_mode)
        self._construct(
            padding,
            precision,
            (activation, negative_slope, residual_after_activation, scale),
            in_channels=in_channels,
            out_channels=out_channels,
            kernel_size=kernel_size,
            stride=stride,
            dilation=dilation,
            groups=groups,
            bias=bias,
            padding_mode="zeros" if modes else padding_mode,
            device=device,
            dtype=dtype,
        )
        if modes:
            self.padding_mode = _mode_entries(padding_mode, len(self.kernel_size))

    def forward(self, input: Tensor, residual: Tensor | None = None) -> Tensor:
        """The convolution of `input`, with a residual of the output's shape added where one is given."""
        if residual is None:  # the signature that subclasses override
            return self._conv_forward(input, self.weight, self.bias)
        return self._conv_forward(input, self.weight, self.bias, residual)

    def _conv_forward(
        self, input: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None = None
    ) -> Tensor:
        return convolved(self, self._function, input, weight, bias, self.precision, **self._fusion(residual))


class _ConvTranspose(_Ours):
    stride: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int
    padding_mode: str
    weight: Tensor
    bias: Tensor | None
    _output_padding: Callable[..., Sequence[int]]

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: Ints,
        stride: Ints = 1,
        padding: Ints | Sequence[int | tuple[int, int]] = 0,
        output_padding: Ints = 0,
        groups: int = 1,
        bias: bool = True,
        dilation: Ints = 1,
        padding_mode: str = "zeros",
        device: Any = None,
        dtype: torch.dtype | None = None,
        *,
        precision: str | None = None,
        activation: str | None = None,
        negative_slope: float = 0.01,
        residual_after_activation: bool = False,
        scale: bool = False,
    ) -> None:
        self._check_mode(padding_mode)
        self._construct(
            padding,
            precision,
            (activation, negative_slope, residual_after_activation, scale),
            in_channels=in_channels,
            out_channels=out_channels,
            kernel_size=kernel_size,
            stride=stride,
            output_padding=output_padding,
            groups=groups,
            bias=bias,
            dilation=dilation,
            padding_mode=padding_mode,
            device=device,
            dtype=dtype,
        )

    def _check_mode(self, padding_mode: Any) -> None:
        if padding_mode != "zeros":
            raise ValueError(
                f'Only "zeros" padding mode is supported for {type(self).__name__}; '
                f"triton_conv.{self._function.__name__} has them all"
            )

    def forward(
        self, input: Tensor, output_size: Sequence[int] | None = None, residual: Tensor | None = None
    ) -> Tensor:
        """The transposed convolution of `input`, with spatial extents `output_size` where it is given.

        A stride above 1 leaves several output extents possible; `output_size` (spatial extents alone, or a full
        shape) picks one, and overrides `output_padding`. Raises ValueError for an extent that is not possible.
        """
        self._check_mode(self.padding_mode)
        return transposed(self, self._function, input, output_size, self.precision, **self._fusion(residual))


class Conv1d(_Conv, torch.nn.Conv1d):  # type: ignore[misc]
    """`torch.nn.Conv1d`, with `padding` pairs, per-axis `padding_mode` and `precision`.

        >>> triton_conv.nn.Conv1d(4, 8, 3, padding=((2, 0),))(torch.randn(2, 4, 100)).shape
        torch.Size([2, 8, 100])

    Shapes: (N, C, W) or (C, W) to (N, K, Q) or (K, Q). See `Conv2d` for dtypes and errors.
    """

    _function = staticmethod(functional.conv1d)


class Conv2d(_Conv, torch.nn.Conv2d):  # type: ignore[misc]
    """`torch.nn.Conv2d`, with `padding` pairs, per-axis `padding_mode` and `precision`.

        >>> panorama = triton_conv.nn.Conv2d(3, 8, 3, padding=1, padding_mode=("replicate", "circular"))
        >>> panorama(torch.randn(1, 3, 16, 64)).shape
        torch.Size([1, 8, 16, 64])

    Shapes: (N, C, H, W) or (C, H, W) to (N, K, P, Q) or (K, P, Q). Dtypes: those of `triton_conv.conv2d`.

    What follows may be computed in the same kernel, as in `triton_conv.conv2d`: `activation`, a residual that `forward`
    is given, and with `scale` a learned factor of each output channel, which starts as one.

        >>> layer = triton_conv.nn.Conv2d(8, 8, 3, padding=1, activation="silu", scale=True)
        >>> layer
        Conv2d(8, 8, kernel_size=(3, 3), stride=(1, 1), padding=(1, 1), activation=silu, scale=True)
        >>> x = torch.randn(1, 8, 16, 16)
        >>> layer(x, residual=x).shape
        torch.Size([1, 8, 16, 16])

    Raises ValueError, in the constructor, for groups that do not divide the channels, an unknown padding string,
    mode, precision or activation, "same" with a stride, and padding pairs or modes whose number is not that of the
    axes. A call raises what `triton_conv.conv2d` raises; RuntimeError for negative padding in every mode, although
    torch's crops with a `padding_mode` other than "zeros".
    """

    _function = staticmethod(functional.conv2d)


class Conv3d(_Conv, torch.nn.Conv3d):  # type: ignore[misc]
    """`torch.nn.Conv3d`, with `padding` pairs, per-axis `padding_mode` and `precision`.

        >>> modes = ("replicate", "zeros", "zeros")
        >>> causal = triton_conv.nn.Conv3d(3, 8, 3, padding=((2, 0), 1, 1), padding_mode=modes)
        >>> causal(torch.randn(1, 3, 9, 16, 16)).shape
        torch.Size([1, 8, 9, 16, 16])

    Shapes: (N, C, D, H, W) or (C, D, H, W) to (N, K, Z, P, Q) or (K, Z, P, Q). See `Conv2d` for dtypes and errors.
    """

    _function = staticmethod(functional.conv3d)


class ConvTranspose1d(_ConvTranspose, torch.nn.ConvTranspose1d):  # type: ignore[misc]
    """`torch.nn.ConvTranspose1d`, with `padding` pairs and `precision`.

        >>> triton_conv.nn.ConvTranspose1d(4, 8, 4, stride=2, padding=1)(torch.randn(2, 4, 50)).shape
        torch.Size([2, 8, 100])

    Shapes: (N, K, Q) or (K, Q) to (N, C, W) or (C, W). See `ConvTranspose2d` for the rest.
    """

    _function = staticmethod(functional.conv_transpose1d)


class ConvTranspose2d(_ConvTranspose, torch.nn.ConvTranspose2d):  # type: ignore[misc]
    """`torch.nn.ConvTranspose2d`, with `padding` pairs and `precision`.

        >>> up = triton_conv.nn.ConvTranspose2d(8, 4, 3, stride=2, padding=1)
        >>> up(torch.randn(1, 8, 14, 14), output_size=(28, 28)).shape
        torch.Size([1, 4, 28, 28])

    Shapes: (N, K, P, Q) or (K, P, Q) to (N, C, H, W) or (C, H, W). Dtypes: those of `triton_conv.conv2d`.

    Raises ValueError, in the constructor, for groups that do not divide the channels, for padding pairs whose number
    is not that of the axes, and for any `padding_mode` but "zeros", as torch does
    (`triton_conv.conv_transpose2d` has them all).
    """

    _function = staticmethod(functional.conv_transpose2d)


class ConvTranspose3d(_ConvTranspose, torch.nn.ConvTranspose3d):  # type: ignore[misc]
    """`torch.nn.ConvTranspose3d`, with `padding` pairs and `precision`.

        >>> triton_conv.nn.ConvTranspose3d(4, 2, 2, stride=2)(torch.randn(1, 4, 4, 8, 8)).shape
        torch.Size([1, 2, 8, 16, 16])

    Shapes: (N, K, Z, P, Q) or (K, Z, P, Q) to (N, C, D, H, W) or (C, D, H, W). See `ConvTranspose2d` for the rest.
    """

    _function = staticmethod(functional.conv_transpose3d)


class _Offsets(Conv2d):
    """What a `ModulatedDeformConv2d` makes its offsets and mask with: zeros at first, and ones in its last biases."""

    ones = 0

    def reset_parameters(self) -> None:
        torch.nn.init.zeros_(self.weight)
        if self.bias is not None:
            torch.nn.init.zeros_(self.bias)
            torch.nn.init.ones_(self.bias[self.bias.numel() - self.ones :])


ModulatedDeformConv2d.convolution = _Offsets


class _LazyConv(Fusing):
    """The constructor of torch's lazy classes, with what ours add to it."""

    def __init__(
        self,
        out_channels: int,
        kernel_size: Ints,
        stride: Ints = 1,
        padding: Padding = 0,
        dilation: Ints = 1,
        groups: int = 1,
        bias: bool = True,
        padding_mode: Modes = "zeros",
        device: Any = None,
        dtype: torch.dtype | None = None,
        *,
        precision: str | None = None,
        activation: str | None = None,
        negative_slope: float = 0.01,
        residual_after_activation: bool = False,
        scale: bool = False,
    ) -> None:
        conv_calls.check_precision(precision)
        arguments = (out_channels, kernel_size, stride, padding, dilation, groups, bias, padding_mode, device, dtype)
        self._check_fusion(activation, negative_slope, residual_after_activation, scale)
        super().__init__(*arguments)  # type: ignore[call-arg]
        if precision is not None:
            self.precision = precision
        self._set_fusion(activation, negative_slope, residual_after_activation, scale, out_channels, device, dtype)


class _LazyConvTranspose(Fusing):
    def __init__(
        self,
        out_channels: int,
        kernel_size: Ints,
        stride: Ints = 1,
        padding: Ints | Sequence[int | tuple[int, int]] = 0,
        output_padding: Ints = 0,
        groups: int = 1,
        bias: bool = True,
        dilation: Ints = 1,
        padding_mode: str = "zeros",
        device: Any = None,
        dtype: torch.dtype | None = None,
        *,
        precision: str | None = None,
        activation: str | None = None,
        negative_slope: float = 0.01,
        residual_after_activation: bool = False,
        scale: bool = False,
    ) -> None:
        conv_calls.check_precision(precision)
        self._check_fusion(activation, negative_slope, residual_after_activation, scale)
        rest = (output_padding, groups, bias, dilation, padding_mode, device, dtype)
        super().__init__(out_channels, kernel_size, stride, padding, *rest)  # type: ignore[call-arg]
        if precision is not None:
            self.precision = precision
        self._set_fusion(activation, negative_slope, residual_after_activation, scale, out_channels, device, dtype)


class LazyConv1d(_LazyConv, torch.nn.LazyConv1d, Conv1d):  # type: ignore[misc]
    """A `Conv1d` that takes `in_channels` from its first input, and is a plain one from then on.

        >>> layer = triton_conv.nn.LazyConv1d(8, 3)
        >>> layer(torch.randn(2, 3, 100)).shape, type(layer).__name__
        (torch.Size([2, 8, 98]), 'Conv1d')

    Shapes: (N, C, W) or (C, W) to (N, K, Q) or (K, Q). See `LazyConv2d` for the rest.
    """

    cls_to_become = Conv1d


class LazyConv2d(_LazyConv, torch.nn.LazyConv2d, Conv2d):  # type: ignore[misc]
    """A `Conv2d` that takes `in_channels` from its first input, and is a plain one from then on.

        >>> layer = triton_conv.nn.LazyConv2d(8, 3, padding=1)
        >>> layer(torch.randn(1, 3, 16, 16)).shape, type(layer).__name__
        (torch.Size([1, 8, 16, 16]), 'Conv2d')

    Shapes: (N, C, H, W) or (C, H, W) to (N, K, P, Q) or (K, P, Q). Parameters have no shape before the first input: run
    one batch before they are counted, copied or compiled. Raises ValueError for groups that do not divide the channels
    found. See `Conv2d` for dtypes and other errors.
    """

    cls_to_become = Conv2d


class LazyConv3d(_LazyConv, torch.nn.LazyConv3d, Conv3d):  # type: ignore[misc]
    """A `Conv3d` that takes `in_channels` from its first input, and is a plain one from then on.

        >>> layer = triton_conv.nn.LazyConv3d(8, 3, padding=((2, 0), 1, 1))
        >>> layer(torch.randn(1, 3, 9, 8, 8)).shape, type(layer).__name__
        (torch.Size([1, 8, 9, 8, 8]), 'Conv3d')

    Shapes: (N, C, D, H, W) or (C, D, H, W) to (N, K, Z, P, Q) or (K, Z, P, Q). See `LazyConv2d` for the rest.
    """

    cls_to_become = Conv3d


class LazyConvTranspose1d(_LazyConvTranspose, torch.nn.LazyConvTranspose1d, ConvTranspose1d):  # type: ignore[misc]
    """A `ConvTranspose1d` that takes `in_channels` from its first input, and is a plain one from then on.

        >>> layer = triton_conv.nn.LazyConvTranspose1d(8, 4, stride=2, padding=1)
        >>> layer(torch.randn(2, 3, 50)).shape, type(layer).__name__
        (torch.Size([2, 8, 100]), 'ConvTranspose1d')

    Shapes: (N, K, Q) or (K, Q) to (N, C, W) or (C, W). See `LazyConv2d` for the rest.
    """

    cls_to_become = ConvTranspose1d


class LazyConvTranspose2d(_LazyConvTranspose, torch.nn.LazyConvTranspose2d, ConvTranspose2d):  # type: ignore[misc]
    """A `ConvTranspose2d` that takes `in_channels` from its first input, and is a plain one from then on.

        >>> layer = triton_conv.nn.LazyConvTranspose2d(8, 2, stride=2)
        >>> layer(torch.randn(1, 3, 14, 14)).shape, type(layer).__name__
        (torch.Size([1, 8, 28, 28]), 'ConvTranspose2d')

    Shapes: (N, K, P, Q) or (K, P, Q) to (N, C, H, W) or (C, H, W). See `LazyConv2d` for the rest.
    """

    cls_to_become = ConvTranspose2d


class LazyConvTranspose3d(_LazyConvTranspose, torch.nn.LazyConvTranspose3d, ConvTranspose3d):  # type: ignore[misc]
    """A `ConvTranspose3d` that takes `in_channels` from its first input, and is a plain one from then on.

        >>> layer = triton_conv.nn.LazyConvTranspose3d(8, 2, stride=2)
        >>> layer(torch.randn(1, 3, 4, 8, 8)).shape, type(layer).__name__
        (torch.Size([1, 8, 8, 16, 16]), 'ConvTranspose3d')

    Shapes: (N, K, Z, P, Q) or (K, Z, P, Q) to (N, C, D, H, W) or (C, D, H, W). See `LazyConv2d` for the rest.
    """

    cls_to_become = ConvTranspose3d


OURS: dict[type, type] = {
    getattr(torch.nn, _cls.__name__): _cls
    for _cls in (
        *(Conv1d, Conv2d, Conv3d, ConvTranspose1d, ConvTranspose2d, ConvTranspose3d),
        *(LazyConv1d, LazyConv2d, LazyConv3d, LazyConvTranspose1d, LazyConvTranspose2d, LazyConvTranspose3d),
    )
}


def _own_constructor(cls: Any) -> None:
    """Copies the inherited constructor into `cls`: Python's errors about arguments name the class it belongs to."""
    shared: Any = cls.__init__
    copy = FunctionType(shared.__code__, shared.__globals__, shared.__name__, shared.__defaults__, shared.__closure__)
    copy.__kwdefaults__, copy.__annotations__ = shared.__kwdefaults__, shared.__annotations__
    copy.__module__, copy.__qualname__ = cls.__module__, f"{cls.__qualname__}.__init__"
    cls.__init__ = copy


for _cls in OURS.values():
    _own_constructor(_cls)


DepthwiseSeparableConv1d.convolution = Conv1d
DepthwiseSeparableConv2d.convolution = SpatiallySeparableConv2d.convolution = Conv2d
DepthwiseSeparableConv3d.convolution = Conv3d


def _pair(entry: Any) -> tuple[Any, ...]:
    return tuple(entry) if is_sequence(entry) else (entry, entry)


def _padding_entries(padding: Iterable[Any], rank: int) -> tuple[Any, ...]:
    """One entry per axis, an int or a (lower, upper) tuple."""
    entries = tuple(tuple(p) if is_sequence(p) else p for p in padding)
    entries = entries * rank if len(entries) == 1 else entries
    if len(entries) != rank or any(len(_pair(p)) != 2 for p in entries):
        raise ValueError(f"padding must have one int or (lower, upper) pair for each of {rank} axes, but got {padding}")
    return entries


def _mode_entries(modes: Iterable[Any], rank: int) -> tuple[str, ...]:
    entries = tuple(modes)
    entries = entries * rank if len(entries) == 1 else entries
    if len(entries) != rank or any(m not in PADDING_MODES for m in entries):
        raise ValueError(
            f"padding_mode must be one of {set(PADDING_MODES)} or one of them for each of {rank} axes, "
            f"but got padding_mode={modes}"
        )
    return entries
