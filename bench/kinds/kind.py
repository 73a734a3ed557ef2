"""What there is to know of layers that are more than one convolution: their operands, and who computes them how."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from math import gcd
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from triton_conv.devices import Device
from triton_conv.tuning.layers import Layer

Tensors = Mapping[str, Tensor]  # operands by name, "x" and "w" first
Forward = Callable[[Tensors], Tensor]

_COLUMNS = 2**28  # numbers that PyTorch's own convolution lays out at a time: 2 GiB of float64


class Rival(NamedTuple):
    """Another way to compute a layer, on operands of one memory format.

    `between` says that it rounds to its dtype before it is done.
    """

    who: str
    channels_last: bool
    forward: Forward
    between: bool = True


class Kind:
    """A kind of layers; `plans` are the titles of `explain.plans` that each operation runs.

    The gradients of a step are those of all operands. `convolution` says that it is one with something after it: it is
    made small as a plain one.
    """

    plans: ClassVar[Mapping[str, tuple[str, ...]]]
    convolution = False

    def titles(self, layer: Layer) -> Mapping[str, tuple[str, ...]]:
        """`plans` of a layer."""
        return self.plans

    def call(self, layer: Layer) -> str:
        """The function that users call."""
        raise NotImplementedError

    def said(self, layer: Layer) -> dict[str, Any]:
        """The options that make the call what it is, as words."""
        hidden = ("dtype", "channels_last")
        return {name: value for name, value in layer.options.items() if name not in hidden}

    def small(self, layer: Layer) -> Layer:
        """The same kind of layer with few channels and positions, which a CPU runs in well under a second."""
        raise NotImplementedError

    def shapes(self, layer: Layer) -> dict[str, tuple[int, ...]]:
        """Of every operand by name: "x", "w", then others."""
        return {"x": layer.input, "w": layer.weight}

    def output(self, layer: Layer) -> tuple[int, ...]:
        """Of the output."""
        empty = {name: torch.empty(shape, device="meta") for name, shape in self.shapes(layer).items()}
        return tuple(self.plain(layer, empty).shape)

    def drawn(self, layer: Layer, op: str, name: str, normal: Tensor) -> Tensor:
        """The values of an operand, made of standard normal ones."""
        return normal

    def plain(self, layer: Layer, t: Tensors) -> Tensor:
        """As people write it in plain PyTorch: what others run, and in float64 what is right."""
        raise NotImplementedError

    def ours(self, layer: Layer, t: Tensors) -> Tensor:
        """By this package."""
        raise NotImplementedError

    def between(self, layer: Layer, op: str) -> bool:
        """Whether ours rounds to its dtype before it is done."""
        return False

    def rivals(self, layer: Layer, op: str) -> Sequence[Rival]:
        """Others that can compute it."""
        raise NotImplementedError

    def depth(self, layer: Layer, name: str) -> int:
        """Of how many products of standard normal numbers the largest sum behind a result is: `check.tolerance`."""
        raise NotImplementedError

    def separate_seconds(self, layer: Layer, op: str, device: Device) -> float | None:
        """What separate kernels would take by the models that predict ours, None where no model tells."""
        return None


def convolve(x: Tensor, w: Tensor, bias: Tensor | None = None, **how: Any) -> Tensor:
    """`torch.nn.functional`'s convolution; in float64 a few channels at a time where it would lay out too much."""
    run: Any = getattr(functional, f"conv{w.dim() - 2}d")
    columns = x[0, 0].numel() * w[0, 0].numel()  # of a channel
    if x.dtype is not torch.float64 or columns * x.shape[1] <= _COLUMNS or how.get("groups", 1) > 1:
        return run(x, w, bias, **how)
    most = max(_COLUMNS // columns, 1)
    parts = zip(x.split(most, 1), w.split(most, 1), strict=True)
    y = sum(run(a, b, None, **how) for a, b in parts)
    return y if bias is None else y + bias.view(-1, *(1,) * (x.dim() - 2))


def pair(value: int | Sequence[int], rank: int = 2) -> tuple[int, ...]:
    """A number for each axis.

    >>> pair(3)
    (3, 3)
    """
    return (value,) * rank if isinstance(value, int) else tuple(value)


def fewer(channels: int, groups: int = 1) -> int:
    """Sixteen channels or a few more: of groups, two of as many as make them so, with what was left over of eights."""
    of_group = channels // groups
    few = of_group if of_group <= 16 else 16 + of_group % 8
    return few * min(groups, 2)


def nearer(dilations: Sequence[int]) -> int:
    """By what wide dilations can be divided and stay as many different ones.

    >>> nearer([1, 6, 12, 18]), nearer([1, 2])
    (6, 1)
    """
    common = gcd(*(dilation for dilation in dilations if dilation > 1))
    return common if common > 3 else 1
