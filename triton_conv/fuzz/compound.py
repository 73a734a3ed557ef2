"""Families of several convolutions: separable ones, and branches over one input."""

from __future__ import annotations

import random
from dataclasses import dataclass, replace
from functools import reduce
from math import prod
from typing import Any

import torch
from torch import Tensor

from .. import branches, config, separable
from ..cases import Case, depth
from ..geometry import Role
from ..oracle import convolved
from .drawn import Drawn, Tensors, frozen, steering
from .placing import random_places

_FLOATS = ("float32", "float32", "float64", "float16", "bfloat16", "bfloat16")
_MODES = ("zeros", "reflect", "replicate", "circular")


@dataclass(frozen=True, kw_only=True, repr=False)
class Separable(Drawn):
    """`separable_conv`: E filters of their own for C channels, then K of 1x1. `fused` is its argument."""

    N: int = 1
    C: int = 1
    E: int = 1
    K: int = 1
    spatial: tuple[int, ...] = (1,)
    kernel: tuple[int, ...] = (1,)
    stride: tuple[int, ...] = (1,)
    padding: tuple[tuple[int, int], ...] = ((0, 0),)
    dilation: tuple[int, ...] = (1,)
    modes: tuple[str, ...] = ("zeros",)
    biases: tuple[bool, bool] = (False, False)
    dtype: str = "float32"
    fused: bool | None = None

    @property
    def parts(self) -> tuple[Case, Case]:
        how: dict[str, Any] = {"N": self.N, "bias": False, "dtype": getattr(torch, self.dtype)}
        first = Case.of(
            self.spatial,
            self.kernel,
            C=self.C,
            K=self.E,
            groups=self.C,
            stride=self.stride,
            padding=self.padding,
            dilation=self.dilation,
            modes=self.modes,
            **how,
        )
        return first, Case.of(first.output_spatial, 1, C=self.E, K=self.K, **how)

    def cost(self) -> tuple[int, int]:
        first, second = self.parts
        return first.macs + second.macs, self.N * max(self.K, self.E) * prod(second.spatial)

    def shapes(self) -> dict[str, tuple[tuple[int, ...], str]]:
        rank, dtype = len(self.spatial), self.dtype
        found = {
            "x": ((self.N, self.C, *self.spatial), dtype),
            "depthwise": ((self.E, 1, *self.kernel), dtype),
            "pointwise": ((self.K, self.E, *(1,) * rank), dtype),
        }
        for name, size, there in zip(("between", "bias"), (self.E, self.K), self.biases, strict=True):
            if there:
                found[name] = ((size,), dtype)
        return found

    def compute(self, t: Tensors) -> Tensor:
        operands = (t[name] for name in ("x", "depthwise", "pointwise"))
        how = {"stride": self.stride, "padding": self.padding, "dilation": self.dilation, "fused": self.fused}
        function = getattr(separable, f"separable_conv{len(self.spatial)}d")
        return function(*operands, t.get("between"), t.get("bias"), padding_mode=self.modes, **how)

    def plain(self, t: Tensors) -> Tensor:
        first, second = self.parts
        x, depthwise, pointwise = (t[name] for name in ("x", "depthwise", "pointwise"))
        assert x is not None
        assert depthwise is not None
        assert pointwise is not None
        return convolved(second, convolved(first, x, depthwise, t.get("between")), pointwise, t.get("bias"))

    def depth(self, name: str) -> tuple[int, float]:
        first, second = self.parts
        taps, outputs = 1 + prod(self.kernel), max(self.N * prod(second.spatial), 1)
        found = {
            "y": taps * self.E,
            "dx": depth(first.geometry, Role.DGRAD) * self.K,
            "ddepthwise": outputs * self.K,
            "dpointwise": outputs * taps,
            "dbetween": outputs * self.K,
            "dbias": outputs,
        }[name]
        return max(found, 1), torch.finfo(getattr(torch, self.dtype)).eps


def separable_of(rng: random.Random) -> Separable:
    while True:
        rank = rng.choice((1, 2, 2, 2, 3))

        def axes(*values: Any, rank: int = rank) -> tuple:
            return tuple(rng.choice(values) for _ in range(rank))

        kernel = axes(1, 2, 3, 3, 5, 7) if rank < 3 else axes(1, 2, 3)
        C = rng.choice((1, 2, 3, 5, 8, 16, 17, 24, 32))
        pads = [(n, n if rng.random() < 0.6 else rng.randrange(k + 1)) for k in kernel for n in [rng.randrange(k)]]
        s = Separable(
            **steering(rng),
            N=rng.choice((0, 1, 1, 1, 2, 2, 3)),
            C=C,
            E=C * rng.choice((1, 1, 1, 2, 3)),
            K=rng.choice((1, 2, 5, 8, 16, 24, 33)),
            spatial=axes(*range(1, {1: 40, 2: 11, 3: 6}[rank])),
            kernel=kernel,
            stride=axes(1) if rng.random() < 0.6 else axes(1, 2, 3),
            padding=tuple(pads),
            dilation=axes(1) if rng.random() < 0.7 else axes(1, 2, 3),
            modes=axes("zeros") if rng.random() < 0.6 else axes(*_MODES),
            biases=(rng.random() < 0.5, rng.random() < 0.5),
            dtype=rng.choice(_FLOATS),
            fused=rng.choice((None, False, True, True)),
        )
        if s.valid() and s.cost()[0] <= 40_000:
            names = tuple(s.shapes())
            fixed = names if s.fused and rng.random() < 0.8 else frozen(rng, names)
            return replace(s, frozen=fixed, places=random_places(rng, (*names, "dy")))


@dataclass(frozen=True, kw_only=True, repr=False)
class Branches(Drawn):
    """`multi_conv2d`. Each branch is (K, kernel, padding, dilation, groups, bias, (first channel, channels))."""

    N: int = 1
    C: int = 1
    spatial: tuple[int, ...] = (1, 1)
    stride: tuple[int, ...] = (1, 1)
    parts: tuple[tuple[Any, ...], ...] = ()
    combine: str = "concatenate"
    one_launch: bool | None = None
    dtype: str = "float32"
    precision_: str | None = None

    @property
    def precision(self) -> str | None:
        return self.precision_

    @property
    def cases(self) -> list[Case]:
        made = []
        for K, kernel, padding, dilation, groups, _bias, (first, count) in self.parts:
            if not 0 <= first < first + count <= self.C or not K:
                raise ValueError("no such channels")
            how = {"N": self.N, "C": count, "K": K, "groups": groups, "dtype": getattr(torch, self.dtype)}
            made.append(
                Case.of(self.spatial, kernel, stride=self.stride, padding=padding, dilation=dilation, bias=False, **how)
            )
        if len({case.output_spatial for case in made}) != 1:
            raise ValueError("outputs differ")
        if self.combine == "sum" and len({case.K for case in made}) != 1:
            raise ValueError("widths differ")
        return made

    def valid(self) -> bool:
        if not super().valid():
            return False
        return not self.one_launch or bool(self._one_launch())

    def _one_launch(self) -> bool:
        cases = self.cases
        if all(case.C // case.groups * (case.K // case.groups) <= config.WITHOUT_DOT for case in cases):
            return False
        return self.combine != "sum" or (len({case.groups for case in cases}) == 1 and len(cases) <= 8)

    def cost(self) -> tuple[int, int]:
        cases = self.cases
        pixels = self.N * prod(cases[0].output_spatial)
        return sum(case.macs for case in cases), pixels * sum(case.K for case in cases)

    def shapes(self) -> dict[str, tuple[tuple[int, ...], str]]:
        found = {"x": ((self.N, self.C, *self.spatial), self.dtype)}
        for i, (case, part) in enumerate(zip(self.cases, self.parts, strict=True)):
            found[f"w{i}"] = (case.weight_shape, self.dtype)
            if part[5]:
                found[f"b{i}"] = ((case.K,), self.dtype)
        return found

    def compute(self, t: Tensors) -> Tensor:
        given = []
        for i, (_, _, padding, dilation, groups, _, channels) in enumerate(self.parts):
            w = t[f"w{i}"]
            assert w is not None
            given.append(branches.Branch(w, t.get(f"b{i}"), self.stride, padding, dilation, groups, channels))
        x = t["x"]
        assert x is not None
        return branches.multi_conv2d(
            x, given, combine=self.combine, precision=self.precision_, one_launch=self.one_launch
        )

    def plain(self, t: Tensors) -> Tensor:
        x, made = t["x"], []
        assert x is not None
        for i, (case, part) in enumerate(zip(self.cases, self.parts, strict=True)):
            first, count = part[6]
            w = t[f"w{i}"]
            assert w is not None
            made.append(convolved(case, x[:, first : first + count], w, t.get(f"b{i}")))
        return torch.cat(made, 1) if self.combine == "concatenate" else reduce(torch.add, made)

    def depth(self, name: str) -> tuple[int, float]:
        cases, eps = self.cases, torch.finfo(getattr(torch, self.dtype)).eps
        if name == "y":
            sums = [case.depth("y") for case in cases]
            rounded = eps if self.combine == "sum" and self.one_launch is not True else 0.0
            return (sum(sums) if self.combine == "sum" else max(sums)), rounded
        if name == "dx":  # what each branch adds may be rounded by itself
            return sum(case.depth("dx") for case in cases), eps
        return max(self.N * prod(cases[0].output_spatial), 1), 0.0


def branches_of(rng: random.Random) -> Branches:
    while True:
        whole = rng.random() < 0.6
        unit = rng.choice((8, 16, 16)) if whole else 1
        C = unit * rng.choice((1, 2, 3)) if whole else rng.choice((1, 3, 5, 12, 17))
        spatial = (rng.randint(1, 9), rng.randint(1, 10))
        stride = rng.choice(((1, 1), (1, 1), (2, 2), (1, 2)))
        K = unit * rng.choice((1, 2)) if whole else rng.choice((1, 3, 6, 20))
        combine = rng.choice(("concatenate", "concatenate", "sum"))
        all_groups = rng.choice((1, 1, 1, 2, C if C < 8 else 2))
        parts = []
        for _ in range(rng.choice((1, 2, 2, 3, 3, 4, 9 if rng.random() < 0.2 else 2))):
            kernel = (rng.choice((1, 1, 3, 3, 5, 2)), rng.choice((1, 1, 3, 3, 5, 2)))
            dilation = (rng.choice((1, 1, 2, 3)), rng.choice((1, 1, 2, 6)))
            padding = []
            for k, d in zip(kernel, dilation, strict=True):
                total = d * (k - 1)  # as long as x, over the stride
                lower = total // 2 if rng.random() < 0.8 else rng.randint(0, total)
                padding.append((lower, total - lower))
            first = rng.choice((0, unit * rng.randrange(max(C // unit, 1)))) if rng.random() < 0.4 else 0
            count = C if rng.random() < 0.6 and not first else unit * rng.randint(1, max((C - first) // unit, 1))
            groups = all_groups if combine == "sum" else rng.choice((1, 1, 1, 2, count if count < 8 else 2))
            out = K if combine == "sum" else groups * max(K // groups + rng.choice((0, 0, unit)), 1)
            parts.append((out, kernel, tuple(padding), dilation, groups, rng.random() < 0.5, (first, count)))
        dtype = rng.choice((*_FLOATS, "bfloat16", "float16"))
        b = Branches(
            **steering(rng),
            N=rng.choice((0, 1, 1, 1, 1, 2, 3)),
            C=C,
            spatial=spatial,
            stride=stride,
            parts=tuple(parts),
            combine=combine,
            one_launch=rng.choice((None, True, True, True, False)),
            dtype=dtype,
            precision_=rng.choice((None, "ieee", "tf32", "tf32x3")) if dtype == "float32" else None,
        )
        if b.valid() and b.cost()[0] <= 120_000 and b.cost()[1] <= 1200:
            names = tuple(b.shapes())
            return replace(b, frozen=frozen(rng, names), places=random_places(rng, (*names, "dy")))
