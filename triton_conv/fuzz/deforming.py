"""Deformable convolutions; their definition is one sum over taps and corners, in float64."""

from __future__ import annotations

import random
from dataclasses import dataclass, replace
from math import prod

import torch
from torch import Tensor

from .. import deform
from ..cases import Case
from ..geometry import ConvGeometry
from .drawn import Drawn, Tensors, frozen, steering
from .placing import random_places


@dataclass(frozen=True, kw_only=True, repr=False)
class Deformable(Drawn):
    """`deform_conv2d`. Offsets are `spread` times standard normal, those at `whole` rounded to whole pixels."""

    N: int = 1
    C: int = 1
    K: int = 1
    spatial: tuple[int, ...] = (1, 1)
    kernel: tuple[int, ...] = (1, 1)
    stride: tuple[int, ...] = (1, 1)
    padding: tuple[tuple[int, int], ...] = ((0, 0), (0, 0))
    dilation: tuple[int, ...] = (1, 1)
    groups: int = 1
    offset_groups: int = 1
    mask: bool = False
    bias: bool = False
    spread: float = 1.0
    whole: bool = False
    dtype: str = "float32"
    offset_dtype: str = "float32"
    precision_: str | None = None

    @property
    def precision(self) -> str | None:
        return self.precision_

    @property
    def case(self) -> Case:
        return Case.of(
            self.spatial,
            self.kernel,
            N=self.N,
            C=self.C,
            K=self.K,
            stride=self.stride,
            padding=self.padding,
            dilation=self.dilation,
            groups=self.groups,
            bias=False,
            dtype=getattr(torch, self.dtype),
        )

    def cost(self) -> tuple[int, int]:
        if self.C % self.offset_groups or self.offset_dtype not in (self.dtype, "float32"):
            raise ValueError("no deformable convolution has such numbers")
        return 4 * self.case.macs, self.N * self.K * prod(self.case.output_spatial)

    def shapes(self) -> dict[str, tuple[tuple[int, ...], str]]:
        case, pairs = self.case, self.offset_groups * prod(self.kernel)
        P, Q = case.output_spatial
        found = {
            "x": ((self.N, self.C, *self.spatial), self.dtype),
            "offset": ((self.N, 2 * pairs, P, Q), self.offset_dtype),
            "w": (case.weight_shape, self.dtype),
        }
        if self.mask:
            found["mask"] = ((self.N, pairs, P, Q), self.offset_dtype)
        if self.bias:
            found["bias"] = ((self.K,), self.dtype)
        return found

    def values(self, name: str, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
        found = super().values(name, shape, generator)
        if name != "offset":
            return found
        return (self.spread * found).round() if self.whole else self.spread * found

    def compute(self, t: Tensors) -> Tensor:
        x, offset, w = (t[name] for name in ("x", "offset", "w"))
        assert x is not None
        assert offset is not None
        assert w is not None
        how = (self.stride, self.padding, self.dilation)
        return deform.deform_conv2d(x, offset, w, t.get("bias"), *how, t.get("mask"), precision=self.precision_)

    def plain(self, t: Tensors) -> Tensor:
        return definition(t["x"], t["offset"], t["w"], t.get("mask"), t.get("bias"), self.case.geometry)  # type: ignore[arg-type]

    def depth(self, name: str) -> tuple[int, float]:
        taps, outputs = prod(self.kernel), max(self.N * prod(self.case.output_spatial), 1)
        K, C = self.K // self.groups, self.C // self.groups
        over = self.C // self.offset_groups * K * 4
        products = {"y": C * taps * 4, "dx": K * taps * 64, "doffset": 4 * over, "dmask": over, "dw": outputs * 4}
        rounded = max(torch.finfo(getattr(torch, self.dtype)).eps, 0.0)
        # positions are float32: up to a few tens of pixels, so that fractions are off by that many of its last places
        return products.get(name, outputs), rounded if self.dtype in ("float64", "float16", "bfloat16") else 8 * rounded


def definition(
    x: Tensor, offset: Tensor, w: Tensor, mask: Tensor | None, bias: Tensor | None, g: ConvGeometry
) -> Tensor:
    """y by a sum over taps of samples, each of which is a sum over four corners; zeros lie outside."""
    (_, H, W), (_, R, S), (_, P, Q) = g.input, g.filter, g.output
    N, C, K, OG = g.N, g.C, g.K, offset.shape[1] // (2 * R * S)
    x = torch.nn.functional.pad(x, (1, 1, 1, 1)).view(N, OG, C // OG, H + 2, W + 2)
    image, group = torch.arange(N).view(N, 1, 1, 1), torch.arange(OG).view(1, OG, 1, 1)
    y = torch.zeros(N, K, P, Q, dtype=x.dtype)
    for r in range(R):
        for s in range(S):
            d = offset.view(N, OG, R, S, 2, P, Q)[:, :, r, s]
            rows = torch.arange(P) * g.stride[1] - g.padding[1][0] + r * g.dilation[1]
            columns = torch.arange(Q) * g.stride[2] - g.padding[2][0] + s * g.dilation[2]
            h, v = d[:, :, 0] + rows.view(P, 1), d[:, :, 1] + columns
            samples = torch.zeros(())
            for up in (0, 1):
                for right in (0, 1):
                    row, column = h.detach().floor(), v.detach().floor()
                    weight = (h - row if up else 1 - h + row) * (v - column if right else 1 - v + column)  # N OG P Q
                    row, column = row + up, column + right
                    row, column = ((t + 1).clamp(0, n + 1).long() for t, n in ((row, H), (column, W)))
                    samples = samples + weight.unsqueeze(-1) * x[image, group, :, row, column]  # N OG P Q C/OG
            if mask is not None:
                samples = samples * mask.view(N, OG, R, S, P, Q)[:, :, r, s].unsqueeze(-1)
            samples = samples.permute(0, 1, 4, 2, 3).reshape(N, g.groups, C // g.groups, P, Q)
            tap = w[:, :, r, s].view(g.groups, K // g.groups, C // g.groups)
            y = y + torch.einsum("ngcpq,gkc->ngkpq", samples, tap).reshape(N, K, P, Q)
    return y if bias is None else y + bias[:, None, None]


def deformable(rng: random.Random) -> Deformable:
    while True:
        groups, offset_groups = rng.choice((1, 1, 1, 2, 3)), rng.choice((1, 1, 2, 4))
        wide = rng.random() < 0.5
        dtype = rng.choice(("float32", "float32", "float64", "float16", "bfloat16"))
        kernel = (rng.choice((1, 2, 3, 3)), rng.choice((1, 2, 3, 3)))
        pads = [(n, n if rng.random() < 0.7 else rng.randrange(k + 1)) for k in kernel for n in [rng.randrange(k + 1)]]
        d = Deformable(
            **steering(rng),
            N=rng.choice((0, 1, 1, 1, 2, 2, 3)),
            C=groups * offset_groups * (rng.choice((8, 16)) if wide else rng.choice((1, 2, 3, 5))),
            K=groups * (rng.choice((8, 16, 24)) if wide else rng.choice((1, 2, 3, 7))),
            spatial=(rng.randint(1, 8), rng.randint(1, 9)),
            kernel=kernel,
            stride=(rng.choice((1, 1, 2, 3)), rng.choice((1, 1, 2))),
            padding=tuple(pads),
            dilation=(rng.choice((1, 1, 2)), rng.choice((1, 1, 3))),
            groups=groups,
            offset_groups=offset_groups,
            mask=rng.random() < 0.5,
            bias=rng.random() < 0.5,
            spread=rng.choice((0.0, 0.1, 1.0, 1.0, 4.0, 50.0)),
            whole=rng.random() < 0.15,
            dtype=dtype,
            offset_dtype=rng.choice((dtype, "float32")) if dtype in ("float16", "bfloat16") else dtype,
            precision_=rng.choice((None, "ieee", "tf32", "tf32x3")) if dtype == "float32" else None,
        )
        if d.valid() and d.cost()[0] <= 60_000 and prod(d.kernel) * d.offset_groups <= 18:
            names = tuple(d.shapes())
            return replace(d, frozen=frozen(rng, names), places=random_places(rng, (*names, "dy")))
