"""One convolution in PyTorch's words, and random operands for it.

>>> case = Case.of((8, 9), 3, C=4, K=6, stride=2, padding=((1, 0), 1), modes="circular")
>>> case.operands(seed=7).x.shape, case.output_spatial
(torch.Size([2, 4, 8, 9]), (4, 5))
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import functional
from .geometry import ConvGeometry, Role

QUANTITIES = ("y", "dx", "dw", "db")
MEMORY_FORMATS = ("contiguous", "channels_last", "strided", "expanded")
INTEGERS = (torch.int8, torch.uint8, torch.int16, torch.int32, torch.int64)
COMPLEX = (torch.complex64, torch.complex128)
FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
DTYPES = FLOATS + COMPLEX + INTEGERS

Ints = int | Sequence[int]


class Operands(NamedTuple):
    """What a convolution and its backward pass read: input, weight, bias or None, gradient of the output."""

    x: Tensor
    w: Tensor
    bias: Tensor | None
    dy: Tensor


@dataclass(frozen=True)
class Case:
    """One convolution and its gradients in PyTorch's terms; `Case.of` fills in the usual values.

        >>> str(Case.of((8, 9), 3, padding=(1, (0, 2)), dilation=(1, 2), modes=("zeros", "reflect")))
        'conv2d N2 C3 K4 8x9 k3x3 p1x0+2 d1x2 zeros,reflect bias float32'

    C and K are the caller's input and output channels and `spatial` the caller's input, transposed or not. `padding`
    holds (lower, upper) per axis, `modes` one padding mode per axis. `memory_format` is that of all operands:
    "contiguous", "channels_last" (in 1-D too), "strided" (a window of a larger tensor filled with NaN) or "expanded"
    (input and output gradient are one sample, repeated with stride 0). `precision` is the keyword of `conv2d`.
    """

    transposed: bool
    N: int
    C: int
    K: int
    spatial: tuple[int, ...]
    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[tuple[int, int], ...]
    output_padding: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int
    modes: tuple[str, ...]
    bias: bool
    dtype: torch.dtype
    memory_format: str
    precision: str | None

    @classmethod
    def of(
        cls,
        spatial: Ints,
        kernel: Ints,
        *,
        transposed: bool = False,
        N: int = 2,
        C: int = 3,
        K: int = 4,
        stride: Ints = 1,
        padding: int | Sequence[int | tuple[int, int]] = 0,
        output_padding: Ints = 0,
        dilation: Ints = 1,
        groups: int = 1,
        modes: str | Sequence[str] = "zeros",
        bias: bool = True,
        dtype: torch.dtype = torch.float32,
        memory_format: str = "contiguous",
        precision: str | None = None,
    ) -> Case:
        """A case from the arguments a person would write: one value stands for all axes.

            >>> Case.of(10, 3, stride=2).stride
            (2,)

        `spatial` alone sets the rank. A padding entry is an int or a (lower, upper) pair.
        """
        extents = (spatial,) if isinstance(spatial, int) else tuple(spatial)

        def per_axis(value: Any) -> tuple:
            return (value,) * len(extents) if isinstance(value, (int, str)) else tuple(value)

        return cls(
            transposed=transposed,
            N=N,
            C=C,
            K=K,
            spatial=extents,
            kernel=per_axis(kernel),
            stride=per_axis(stride),
            padding=tuple((p, p) if isinstance(p, int) else (p[0], p[1]) for p in per_axis(padding)),
            output_padding=per_axis(output_padding),
            dilation=per_axis(dilation),
            groups=groups,
            modes=per_axis(modes),
            bias=bias,
            dtype=dtype,
            memory_format=memory_format,
            precision=precision,
        )

    @property
    def rank(self) -> int:
        """Spatial axes: 1, 2 or 3."""
        return len(self.spatial)

    @property
    def name(self) -> str:
        """The function of `triton_conv` that computes it."""
        return f"conv_transpose{self.rank}d" if self.transposed else f"conv{self.rank}d"

    @property
    def id(self) -> str:
        """The case as one word, for the name of a test."""
        return str(self).replace(" ", "-")

    @property
    def weight_shape(self) -> tuple[int, ...]:
        """(K, C / groups, *kernel), or (C, K / groups, *kernel) if transposed."""
        first, second = (self.C, self.K) if self.transposed else (self.K, self.C)
        return (first, second // self.groups, *self.kernel)

    @property
    def geometry(self) -> ConvGeometry:
        """The validated geometry; raises what the convolution itself would raise."""
        x = (self.N, self.C, *self.spatial)
        if not self.transposed:
            return ConvGeometry.forward(
                x, self.weight_shape, self.stride, self.padding, self.dilation, self.groups, self.modes
            )
        return ConvGeometry.transposed(
            x,
            self.weight_shape,
            self.stride,
            self.padding,
            self.output_padding,
            self.groups,
            self.dilation,
            self.modes,
        )

    @property
    def output_spatial(self) -> tuple[int, ...]:
        """Extents of the output."""
        g = self.geometry
        return (g.input if self.transposed else g.output)[3 - self.rank :]

    @property
    def macs(self) -> int:
        """Multiplications of the forward pass: what limits how long a case takes."""
        return self.geometry.flops // 2

    def quantities(self, role: Role | None = None) -> tuple[str, ...]:
        """Which of y, dx, dw, db exist (integers have no gradients in PyTorch), and are computed by `role`.

        >>> Case.of(8, 3, transposed=True).quantities(Role.FPROP)
        ('dx',)
        """
        if self.dtype in INTEGERS:
            present: tuple[str, ...] = ("y",)
        else:
            present = QUANTITIES if self.bias else QUANTITIES[:3]
        if role is None:
            return present
        computes = {Role.FPROP: "y", Role.DGRAD: "dx", Role.WGRAD: "dw"}
        if self.transposed:
            computes |= {Role.FPROP: "dx", Role.DGRAD: "y"}
        return tuple(name for name in present if name == computes[role])

    def depth(self, name: str) -> int:
        """GEMM_K: how many products (of db: terms) the largest sum behind an element of y, dx, dw or db has.

        >>> case = Case.of((8, 8), 3, N=2, C=16, K=32, padding=1)
        >>> [case.depth(name) for name in ("y", "dx", "dw", "db")]
        [144, 288, 128, 128]
        """
        if name == "db":
            return max(self.N * prod(self.output_spatial), 1)
        roles = {"y": Role.FPROP, "dx": Role.DGRAD, "dw": Role.WGRAD}
        if self.transposed:
            roles |= {"y": Role.DGRAD, "dx": Role.FPROP}
        return depth(self.geometry, roles[name])

    def operands(self, seed: int, device: torch.device | str = "cpu") -> Operands:
        """Random operands on `device`, the same for the same seed whatever the device and memory format.

        Floating-point values are standard normal in the case's dtype, integers lie in -4..4 (0..8 if unsigned).
        """
        generator = torch.Generator().manual_seed(seed)

        def draw(*shape: int) -> Tensor:
            if self.dtype in INTEGERS:
                low = 0 if self.dtype is torch.uint8 else -4
                return torch.randint(low, low + 9, shape, generator=generator).to(self.dtype)
            wide = torch.complex128 if self.dtype.is_complex else torch.float64
            return torch.randn(shape, generator=generator, dtype=wide).to(self.dtype)

        def place(t: Tensor, samples: bool) -> Tensor:
            t = t.to(device)
            return arrange(t, self.memory_format if samples or self.memory_format != "expanded" else "contiguous")

        x = draw(self.N, self.C, *self.spatial)
        w = draw(*self.weight_shape)
        dy = draw(self.N, self.K, *self.output_spatial)
        bias = arrange(draw(self.K).to(device), "strided") if self.bias else None
        return Operands(place(x, True), place(w, False), bias, place(dy, True))

    def run(self, operands: Operands, quantities: Sequence[str] = QUANTITIES) -> dict[str, Tensor]:
        """The output and the gradients asked for, by the public function of this package and autograd."""
        function = getattr(functional, self.name)
        arguments = {
            "stride": self.stride,
            "padding": self.padding,
            "dilation": self.dilation,
            "groups": self.groups,
            "padding_mode": self.modes,
            "precision": self.precision,
        }
        if self.transposed:
            arguments["output_padding"] = self.output_padding
        wanted = [name for name in self.quantities() if name in quantities]
        return differentiate(lambda x, w, bias: function(x, w, bias, **arguments), operands, wanted)

    def __str__(self) -> str:
        parts = [self.name, f"N{self.N}", f"C{self.C}", f"K{self.K}", _by(self.spatial), f"k{_by(self.kernel)}"]
        pads = [str(lower) if lower == upper else f"{lower}+{upper}" for lower, upper in self.padding]
        for letter, value, usual in (
            ("s", _by(self.stride), self.stride == (1,) * self.rank),
            ("p", _by(pads), self.padding == ((0, 0),) * self.rank),
            ("o", _by(self.output_padding), self.output_padding == (0,) * self.rank),
            ("d", _by(self.dilation), self.dilation == (1,) * self.rank),
            ("g", str(self.groups), self.groups == 1),
        ):
            if not usual:
                parts.append(letter + value)
        if set(self.modes) != {"zeros"}:
            parts.append(self.modes[0] if len(set(self.modes)) == 1 else ",".join(self.modes))
        if self.bias:
            parts.append("bias")
        parts.append(str(self.dtype).removeprefix("torch."))
        if self.memory_format != "contiguous":
            parts.append(self.memory_format)
        if self.precision is not None:
            parts.append(self.precision)
        return " ".join(parts)


def differentiate(compute: Callable[..., Tensor], operands: Operands, wanted: Sequence[str]) -> dict[str, Tensor]:
    gradients = [name for name in wanted if name != "y"]
    x, w, bias = (
        None if t is None else t.detach().requires_grad_(name in gradients)
        for name, t in zip(("dx", "dw", "db"), operands[:3], strict=True)
    )
    y = compute(x, w, bias)
    results = {"y": y.detach()} if "y" in wanted else {}
    if gradients:
        leaves = [t for t in (x, w, bias) if t is not None and t.requires_grad]
        results.update(zip(gradients, torch.autograd.grad(y, leaves, operands.dy), strict=True))
    return results


def arrange(t: Tensor, memory_format: str) -> Tensor:
    """The values of t (for "expanded", of its first sample) in memory of another layout."""
    if memory_format == "channels_last":
        return t.movedim(1, -1).contiguous().movedim(-1, 1)
    if memory_format == "expanded":
        return t[:1].expand_as(t)
    if memory_format == "strided":
        poison = torch.iinfo(t.dtype).max if t.dtype in INTEGERS else float("nan")
        window = t.new_full([extent + 2 for extent in t.shape], poison)[(slice(1, -1),) * t.dim()]
        return window.copy_(t)
    return t


def depth(geometry: ConvGeometry, role: Role) -> int:
    """GEMM_K of a role: how many products the largest sum behind an element has."""
    g = geometry
    if role is Role.WGRAD:
        return max(g.N * prod(g.output), 1)
    products = max((g.C if role is Role.FPROP else g.K) // g.groups * g.taps, 1)
    if role is Role.DGRAD:  # it also sums what the border repeats
        for (lower, upper), mode in zip(g.padding, g.modes, strict=True):
            products *= {"zeros": 1, "replicate": 1 + max(lower, upper)}.get(mode, 3)
    return products


def _by(values: Sequence[Any]) -> str:
    return "x".join(map(str, values))
