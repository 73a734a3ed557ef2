"""Filters of different size, dilation and padding over the same input, in one launch."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Any, ClassVar

import torch
from torch import Tensor

import triton_conv
from triton_conv import cost, explain
from triton_conv.devices import Device
from triton_conv.tuning.layers import Layer

from ..records import SEPARATE_CHANNELS_LAST, SEPARATE_CONTIGUOUS
from .kind import Kind, Rival, Tensors, convolve, fewer, nearer, pair


class Branches(Kind):
    """`multi_conv2d`."""

    plans: ClassVar = {"fprop": ("forward",), "step": ("forward", "input gradient", "weight gradient")}

    def call(self, layer: Layer) -> str:
        return "multi_conv2d"

    def said(self, layer: Layer) -> dict[str, Any]:
        def words(weight: Sequence[int], how: dict[str, Any]) -> str:
            sizes = "x".join(map(str, weight))
            return " ".join([sizes, *(f"{name} {explain.written(value)}" for name, value in how.items())])

        said = {name: value for name, value in super().said(layer).items() if name not in ("branches", "combine")}
        first, *rest = (words(*branch) for branch in layer.options["branches"])
        return {**said, "branches": f"{first} + {' + '.join(rest)}", "combine": self._combine(layer)}

    def small(self, layer: Layer) -> Layer:
        options, branches = dict(layer.options), layer.options["branches"]
        by = nearer([max(pair(how.get("dilation", 1))) for _, how in branches])
        few = min(2, *(how.get("groups", 1) for _, how in branches))
        C = max(fewer(layer.input[1], how.get("groups", 1)) for _, how in branches)
        less = []
        for (K, _, *taps), how in branches:
            wide = ("padding", "dilation") if max(pair(how.get("dilation", 1))) > 1 else ()
            closer = {name: tuple(n // by for n in pair(how.get(name, 0))) for name in wide}
            groups = {"groups": few} if few > 1 else {}
            less.append(((fewer(K, how.get("groups", 1)), C // few, *taps), {**how, **closer, **groups}))
        sizes = [
            min(extent, max(_least(branch, axis) for branch in less) + extent % 2)
            for axis, extent in enumerate(layer.input[2:])
        ]
        return Layer((1, C, *sizes), less[0][0], options | {"branches": tuple(less)})

    def shapes(self, layer: Layer) -> dict[str, tuple[int, ...]]:
        weights = [weight for weight, _ in layer.options["branches"]]
        return {"x": layer.input} | {f"w{number or ''}": weight for number, weight in enumerate(weights)}

    def plain(self, layer: Layer, t: Tensors) -> Tensor:
        found = [convolve(t["x"], w, **how) for w, how in self._each(layer, t)]
        return torch.cat(found, 1) if self._combine(layer) == "concatenate" else sum(found[1:], found[0])

    def ours(self, layer: Layer, t: Tensors) -> Tensor:
        branches = [triton_conv.Branch(w, **how) for w, how in self._each(layer, t)]
        precision = layer.options.get("precision")
        return triton_conv.multi_conv2d(t["x"], branches, combine=self._combine(layer), precision=precision)

    def rivals(self, layer: Layer, op: str) -> Sequence[Rival]:
        names = {SEPARATE_CONTIGUOUS: False, SEPARATE_CHANNELS_LAST: True}
        return [Rival(who, last, lambda t: self.plain(layer, t)) for who, last in names.items()]

    def depth(self, layer: Layer, name: str) -> int:
        weights = [weight for weight, _ in layer.options["branches"]]
        if name == "y":
            of_each = [prod(weight[1:]) for weight in weights]
            return sum(of_each) if self._combine(layer) == "sum" else max(of_each)
        if name == "dx":
            return sum(weight[0] * weight[1] * prod(weight[2:]) for weight in weights) // layer.input[1]
        N, _, *extents = self.output(layer)
        return N * prod(extents)

    def separate_seconds(self, layer: Layer, op: str, device: Device) -> float | None:
        """Our own convolutions one after the other, and the output put together from theirs."""
        if op != "fprop":
            return None
        whole = {n: v for n, v in layer.options.items() if n in ("dtype", "channels_last", "precision")}
        total = 0.0
        for weight, how in layer.options["branches"]:
            found: Any = explain.plans(layer.input, weight, device=device, **whole, **how)
            total += found["forward"].seconds
        return total + cost.copy_seconds(prod(self.output(layer)) * whole["dtype"].itemsize, device)

    def _each(self, layer: Layer, t: Tensors) -> list[tuple[Tensor, dict[str, Any]]]:
        """Filters with what is theirs to know."""
        return [(t[f"w{number or ''}"], how) for number, (_, how) in enumerate(layer.options["branches"])]

    def _combine(self, layer: Layer) -> str:
        return layer.options.get("combine", "concatenate")


def _least(branch: tuple[Sequence[int], dict[str, Any]], axis: int) -> int:
    """Of an axis, positions with which there are two outputs at least, and taps beyond a border."""
    weight, how = branch
    stride, pad, dilation = (
        pair(how.get(name, n))[axis] for name, n in (("stride", 1), ("padding", 0), ("dilation", 1))
    )
    return max(dilation * (weight[2 + axis] - 1) + 1 - 2 * pad + stride, dilation + 1, 3)
