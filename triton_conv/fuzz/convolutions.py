"""Families that are one convolution: forward, transposed, with an epilogue, depthwise, and of 8 bits."""

from __future__ import annotations

import random
from dataclasses import dataclass, replace
from math import prod
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as plain_torch

from .. import functional
from ..case_table import random_case
from ..cases import INTEGERS, Case
from ..epilogue import ACTIVATIONS
from ..oracle import convolved
from .drawn import Drawn, Tensors, frozen, steering
from .placing import random_places

HALF = ("float16", "bfloat16")
FLOAT8 = "float8_e4m3fn"


@dataclass(frozen=True, kw_only=True, repr=False)
class Convolution(Drawn):
    """`Case`, with what may follow it. `scale` is the dtype of the epilogue's scale, "" for none.

    With an `out_dtype` it is `scaled_conv` of 8-bit floats, or `int_conv`.
    """

    transposed: bool = False
    N: int = 1
    C: int = 1
    K: int = 1
    spatial: tuple[int, ...] = (1,)
    kernel: tuple[int, ...] = (1,)
    stride: tuple[int, ...] = (1,)
    padding: tuple[tuple[int, int], ...] = ((0, 0),)
    output_padding: tuple[int, ...] = (0,)
    dilation: tuple[int, ...] = (1,)
    groups: int = 1
    modes: tuple[str, ...] = ("zeros",)
    bias: bool = False
    dtype: str = "float32"
    precision_: str | None = None
    activation: str = ""
    slope: float = 0.01
    residual: str = ""
    scale: str = ""
    out_dtype: str = ""

    @property
    def case(self) -> Case:
        """The convolution alone."""
        return Case(
            self.transposed,
            self.N,
            self.C,
            self.K,
            self.spatial,
            self.kernel,
            self.stride,
            self.padding,
            self.output_padding,
            self.dilation,
            self.groups,
            self.modes,
            self.bias,
            getattr(torch, self.dtype),
            "contiguous",
            self.precision_,
        )

    @property
    def fused(self) -> bool:
        return bool(self.activation or self.residual or self.scale)

    @property
    def precision(self) -> str | None:
        return self.precision_

    @property
    def coarse(self) -> float:
        return 2.0**-13 if self.dtype == FLOAT8 else 0.0

    def cost(self) -> tuple[int, int]:
        if self.activation not in ("", *ACTIVATIONS) or self.residual not in ("", "before", "after"):
            raise ValueError("no such epilogue")
        axes = (self.kernel, self.stride, self.padding, self.output_padding, self.dilation, self.modes)
        if {len(self.spatial)} != set(map(len, axes)):
            raise ValueError("not as many axes everywhere")
        return self.case.macs, self.N * self.K * prod(self.case.output_spatial)

    def shapes(self) -> dict[str, tuple[tuple[int, ...], str]]:
        case, out = self.case, self.out_dtype or self.dtype
        found = {"x": ((self.N, self.C, *self.spatial), self.dtype), "w": (case.weight_shape, self.dtype)}
        if self.bias:
            found["bias"] = ((self.K,), out)
        if self.scale:
            found["scale"] = ((self.K,), self.scale)
        if self.residual:
            found["residual"] = ((self.N, self.K, *case.output_spatial), out)
        return found

    def dtype_of(self, name: str) -> torch.dtype:
        return getattr(torch, self.out_dtype) if name == "y" and self.out_dtype else super().dtype_of(name)

    def _how(self) -> dict[str, Any]:
        return {"stride": self.stride, "padding": self.padding, "dilation": self.dilation, "groups": self.groups}

    def compute(self, t: Tensors) -> Tensor:
        how: dict[str, Any] = {**self._how(), "padding_mode": self.modes}
        if self.out_dtype:
            x, w, bias = t["x"], t["w"], t.get("bias")
            assert x is not None
            if self.dtype == "int8":
                return getattr(functional, f"int_conv{len(self.spatial)}d")(x, w, bias, **how)
            scales = [torch.tensor(value, device=x.device) for value in _SCALES]
            function = getattr(functional, f"scaled_conv{len(self.spatial)}d")
            return function(x, w, *scales, bias, **how, out_dtype=getattr(torch, self.out_dtype))
        if self.transposed:
            how["output_padding"] = self.output_padding
        if self.fused:
            how |= {
                "activation": self.activation or None,
                "negative_slope": self.slope,
                "residual": t.get("residual"),
                "residual_after_activation": self.residual == "after",
                "scale": t.get("scale"),
            }
        function = getattr(functional, self.case.name)
        return function(t["x"], t["w"], t.get("bias"), precision=self.precision_, **how)

    def plain(self, t: Tensors) -> Tensor:
        x, w, bias = t["x"], t["w"], t.get("bias")
        assert x is not None
        assert w is not None
        if not self.fused and not self.out_dtype:
            return convolved(self.case, x, w, bias)
        channels = (-1, *(1,) * len(self.spatial))
        z = convolved(self.case, x, w, None)
        if self.dtype == FLOAT8:
            z = z * (torch.tensor(_SCALES[0]).double() * torch.tensor(_SCALES[1]).double())
        if (scale := t.get("scale")) is not None:
            z = z * scale.view(channels)
        if bias is not None:
            z = z + bias.view(channels)
        residual = t.get("residual")
        if residual is not None and self.residual == "before":
            z = z + residual
        y = activated(self.activation, self.slope, z, getattr(torch, self.out_dtype or self.dtype))
        return y + residual if residual is not None and self.residual == "after" else y

    def depth(self, name: str) -> tuple[int, float]:
        case, eps = self.case, 0.0
        if self.out_dtype:
            return 3 * case.depth("y"), 0.0
        if not self.fused:
            return case.depth({"dbias": "db"}.get(name, name)), eps
        if name == "y":
            return 4 * case.depth("y"), eps
        eps = torch.finfo(case.dtype).eps  # of the gradient of the sums, which is a tensor
        outputs = max(self.N * prod(case.output_spatial), 1)
        found = {"dbias": outputs, "dscale": outputs * case.depth("y"), "dresidual": 1}
        return 16 * found.get(name, 0) or 16 * case.depth(name), eps


_SCALES = (0.37, 1.9)
_OF_TORCH = {
    "": lambda z, slope: z,
    "relu": lambda z, slope: plain_torch.relu(z),
    "relu6": lambda z, slope: plain_torch.relu6(z),
    "leaky_relu": plain_torch.leaky_relu,
    "silu": lambda z, slope: plain_torch.silu(z),
    "gelu": lambda z, slope: plain_torch.gelu(z),
    "gelu_tanh": lambda z, slope: plain_torch.gelu(z, approximate="tanh"),
    "sigmoid": lambda z, slope: z.sigmoid(),
    "hardswish": lambda z, slope: plain_torch.hardswish(z),
}


def activated(activation: str, slope: float, z: Tensor, dtype: torch.dtype) -> Tensor:
    """An activation whose slope is that at z rounded to a dtype, which is what is kept for it: kinks are sharp."""
    y = _OF_TORCH[activation](z, slope)
    if not z.requires_grad or not activation:
        return y
    sloped = _OF_TORCH[activation](z.detach().to(dtype).to(z.dtype) + (z - z.detach()), slope)
    return sloped + (y - sloped).detach()


# ---------------------------------------------------------------------------------------------------------------------
# Drawing


def conv(rng: random.Random) -> Convolution:
    return _drawn(rng, transposed=False)


def conv_transpose(rng: random.Random) -> Convolution:
    return _drawn(rng, transposed=True)


def fused(rng: random.Random) -> Convolution:
    """Forward or transposed, with an epilogue."""
    while True:
        c = _drawn(rng, transposed=rng.random() < 0.4)
        if c.dtype in ("float32", "float64", *HALF):
            break
    c = replace(
        c,
        activation=rng.choice(("", *ACTIVATIONS)),
        slope=rng.choice((0.01, 0.3, 0.0, -0.2)),
        residual=rng.choice(("", "", "before", "after")),
        scale=rng.choice(("", "", "float32", c.dtype)),
    )
    if not c.fused:
        c = replace(c, activation="silu")
    if c.activation != "leaky_relu":
        c = replace(c, slope=0.01)
    names = tuple(c.shapes())
    return replace(c, frozen=frozen(rng, names), places=random_places(rng, (*names, "dy")))


def depthwise(rng: random.Random) -> Convolution:
    """Groups of one channel, with long filters too: two axes and 13 taps or more become banded matrices."""
    while True:
        rank, long = rng.choice((1, 2, 2, 2, 3)), rng.random() < 0.45
        C = rng.choice((1, 2, 3, 5, 8, 16, 17, 24))
        kernel = [rng.choice((1, 2, 3, 3, 4, 5, 7)) for _ in range(rank)]
        if long:
            kernel[rng.randrange(rank)] = rng.choice((13, 14, 15, 17, 19, 21, 31))
        simple = long and rng.random() < 0.7
        dtype = rng.choice(("float32", "float32", "float64", *HALF, *HALF))
        pads = [(n, n if rng.random() < 0.6 else rng.randrange(k + 1)) for k in kernel for n in [rng.randrange(k)]]
        transposed = rng.random() < 0.2
        ones = (1,) * rank
        c = Convolution(
            **steering(rng),
            transposed=transposed,
            N=rng.choice((1, 1, 1, 2, 2, 3, 17)),
            C=C,
            K=C * (1 if simple else rng.choice((1, 1, 1, 2, 3, 9))),
            groups=C,
            spatial=tuple(rng.randint(1, {1: 70, 2: 24, 3: 7}[rank]) for _ in range(rank)),
            kernel=tuple(kernel),
            stride=ones if simple or rng.random() < 0.5 else tuple(rng.choice((1, 2, 3)) for _ in ones),
            dilation=ones if simple or rng.random() < 0.6 else tuple(rng.choice((1, 2, 3)) for _ in ones),
            padding=tuple(pads),
            output_padding=(0,) * rank,
            modes=("zeros",) * rank if rng.random() < 0.6 else tuple(rng.choice(_MODES) for _ in ones),
            bias=rng.random() < 0.5,
            dtype=dtype,
            precision_=rng.choice((None, "ieee", "tf32", "tf32", "tf32x3")) if dtype == "float32" else None,
        )
        if c.valid() and c.cost()[0] <= 60_000:
            names = tuple(c.shapes())
            return replace(c, frozen=frozen(rng, names), places=random_places(rng, (*names, "dy")))


def scaled(rng: random.Random) -> Convolution:
    """`scaled_conv` of float8_e4m3fn."""
    out = rng.choice(("bfloat16", "float16", "float32"))
    c = replace(_vectors(rng, transposed=False) if rng.random() < 0.6 else _any(rng, False), dtype=FLOAT8)
    device = rng.choice(("interpreter", "H200", "H100", "B200", "RTX4090", "RTX5090"))
    return replace(c, out_dtype=out, precision_=None, device=device, frozen=tuple(c.shapes()))


def integer(rng: random.Random) -> Convolution:
    """`int_conv` of int8 to int32."""
    c = replace(_vectors(rng, transposed=False) if rng.random() < 0.6 else _any(rng, False), dtype="int8")
    return replace(c, out_dtype="int32", precision_=None, frozen=())


_MODES = ("zeros", "reflect", "replicate", "circular")


def _drawn(rng: random.Random, transposed: bool) -> Convolution:
    c = _vectors(rng, transposed) if rng.random() < 0.45 else _any(rng, transposed)
    return c if getattr(torch, c.dtype) in INTEGERS else replace(c, frozen=frozen(rng, tuple(c.shapes())))


def _any(rng: random.Random, transposed: bool) -> Convolution:
    """What `random_case` draws."""
    while True:
        case = random_case(rng)
        if case.transposed is not transposed:
            continue
        c = Convolution(
            **steering(rng),
            **{
                name: getattr(case, name)
                for name in (
                    *("transposed", "N", "C", "K", "spatial", "kernel", "stride", "padding", "output_padding"),
                    *("dilation", "groups", "modes", "bias"),
                )
            },
            dtype=str(case.dtype).removeprefix("torch."),
            precision_=case.precision,
            places=random_places(rng, ("x", "w", "dy", "bias")),
        )
        if c.valid() and c.cost()[0] <= 80_000:
            return c


def _vectors(rng: random.Random, transposed: bool) -> Convolution:
    """Channels-last, whole vectors of channels, types of matrix units: where box kernels may run."""
    while True:
        rank = rng.choice((1, 2, 2, 2, 3))
        dtype = rng.choice((*HALF, *HALF, *HALF, "float32"))

        def axes(*values: int, rank: int = rank) -> tuple[int, ...]:
            return tuple(rng.choice(values) for _ in range(rank))

        groups = rng.choice((1, 1, 1, 1, 2, 3))
        stride = axes(1) if rng.random() < 0.5 else axes(1, 2, 2, 3)
        spatial = axes(*range(1, {1: 50, 2: 18, 3: 7}[rank]))
        if rng.random() < 0.6:  # whole strides
            spatial = tuple(-(-n // s) * s for n, s in zip(spatial, stride, strict=True))
        kernel = stride if rng.random() < 0.1 else axes(1, 2, 3, 3, 4, 5)
        pads = [(n, n if rng.random() < 0.6 else rng.randrange(k + 1)) for k in kernel for n in [rng.randrange(k)]]
        c = Convolution(
            **steering(rng),
            transposed=transposed,
            N=rng.choice((1, 1, 1, 2, 2, 3, 17)),
            C=groups * rng.choice((8, 16, 16, 24, 32, 40, 64)),
            K=groups * rng.choice((8, 16, 16, 24, 32, 40, 64, 72)),
            groups=groups,
            spatial=spatial,
            kernel=kernel,
            stride=stride,
            padding=tuple(pads),
            output_padding=axes(0) if not transposed or rng.random() < 0.5 else axes(0, 1),
            dilation=axes(1) if rng.random() < 0.7 else axes(1, 2, 3),
            modes=("zeros",) * rank if rng.random() < 0.85 else tuple(rng.choice(_MODES) for _ in range(rank)),
            bias=rng.random() < 0.5,
            dtype=dtype,
            precision_=rng.choice(("tf32", "tf32", "tf32x3", "ieee")) if dtype == "float32" else None,
            places=tuple((name, rng.choice(_VECTOR_PLACES)) for name in ("x", "w", "dy")),
        )
        if c.valid() and c.cost()[0] <= 800_000:
            return c


_VECTOR_PLACES = (*("channels_last",) * 8, "slice_of_channels", "odd_slice_of_channels", "", "misaligned")
