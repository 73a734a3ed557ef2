"""Deformable convolutions: every tap of a filter sampled where an offset says."""

from __future__ import annotations

import importlib
import importlib.util
import warnings
from collections.abc import Callable, Sequence
from functools import cache
from math import prod
from typing import Any, ClassVar

import torch
from torch import Tensor

import triton_conv
from triton_conv.tuning.layers import Layer

from ..records import COMPOSED, TORCHVISION
from .kind import Kind, Rival, Tensors, fewer, pair

_FARTHEST = 2  # whole positions that an offset may lead away, beside three quarters of one


class Deformable(Kind):
    """`deform_conv2d` with torchvision's semantics."""

    plans: ClassVar = {
        "fprop": ("forward",),
        "step": ("forward", "input gradient", "offset and mask gradient", "weight gradient"),
    }

    def call(self, layer: Layer) -> str:
        return "deform_conv2d"

    def said(self, layer: Layer) -> dict[str, Any]:
        return {name: value for name, value in super().said(layer).items() if name != "deform"}

    def small(self, layer: Layer) -> Layer:
        (K, of_group, *taps), options = layer.weight, layer.options
        groups, parts = layer.input[1] // of_group, options.get("offset_groups", 1)
        few, C = min(groups, 2), max(fewer(layer.input[1], groups), 8 * parts)
        strides, dilations = pair(options.get("stride", 1)), pair(options.get("dilation", 1))
        walks = zip(layer.input[2:], taps, strides, dilations, strict=True)
        sizes = [min(i, d * (n - 1) + 2 * s + i % 2) for i, n, s, d in walks]
        return Layer((1, C, *sizes), (fewer(K, groups), C // few, *taps), dict(options))

    def shapes(self, layer: Layer) -> dict[str, tuple[int, ...]]:
        N, _, P, Q = self.output(layer)
        sampled = layer.options.get("offset_groups", 1) * prod(layer.weight[2:])
        found = {**super().shapes(layer), "offset": (N, 2 * sampled, P, Q)}
        return found | ({"mask": (N, sampled, P, Q)} if layer.options.get("mask", True) else {})

    def output(self, layer: Layer) -> tuple[int, ...]:
        K, _, *taps = layer.weight
        walks = zip(layer.input[2:], taps, *_walk(layer), strict=True)
        extents = [(i + 2 * p - d * (n - 1) - 1) // s + 1 for i, n, s, p, d in walks]
        return (layer.input[0], K, *extents)

    def drawn(self, layer: Layer, op: str, name: str, normal: Tensor) -> Tensor:
        """Offsets of quarters, never whole ones: there the derivative jumps, and float16 knows them all up to 512."""
        if name == "mask":
            return normal.sigmoid()
        if name == "offset":
            whole = normal.round().clamp(-_FARTHEST, _FARTHEST)
            return whole + (4 * normal).sigmoid().mul(2.98).floor().add(1) / 4
        return normal

    def plain(self, layer: Layer, t: Tensors) -> Tensor:
        """Four rows of channels gathered for every tap and weighed, then a product of matrices."""
        x, w, offset = t["x"], t["w"], t["offset"]
        (N, C, H, W), (K, of_group, R, S) = x.shape, w.shape
        P, Q = offset.shape[2:]
        parts, groups = layer.options.get("offset_groups", 1), C // of_group
        wide = torch.float64 if x.dtype is torch.float64 else torch.float32
        moved = offset.reshape(N, parts, R * S, 2, P, Q).to(wide)
        at = []  # down and across, [N, parts, taps, P, Q]
        for axis, (count, taps, s, p, d) in enumerate(zip((P, Q), (R, S), *_walk(layer), strict=True)):
            steps = torch.arange(count, device=x.device, dtype=wide) * s - p
            tap = torch.arange(taps, device=x.device, dtype=wide) * d
            start = tap.view(-1, 1, 1, 1) if axis == 0 else tap.view(1, -1, 1, 1)
            start = start + (steps.view(-1, 1) if axis == 0 else steps.view(1, -1))  # [R or 1, S or 1, P or 1, Q or 1]
            at.append(start.expand(R, S, P, Q).reshape(R * S, P, Q) + moved[:, :, :, axis])
        factor = t["mask"].reshape(N, parts, R * S, P, Q) if "mask" in t else None
        image = x.reshape(N * parts, C // parts, H * W)
        columns: Any = 0
        for down in (0, 1):
            for across in (0, 1):
                index, weight = _corner(at, (down, across), (H, W))
                weight = weight.to(x.dtype) if factor is None else weight.to(x.dtype) * factor
                shape = (N * parts, 1, R * S * P * Q)
                taken = image.gather(2, index.view(shape).expand(-1, C // parts, -1))
                columns = columns + taken * weight.reshape(shape)
        columns = columns.view(N, groups, of_group * R * S, P * Q)
        return (w.reshape(groups, K // groups, -1) @ columns).view(N, K, P, Q)

    def ours(self, layer: Layer, t: Tensors) -> Tensor:
        names = ("stride", "padding", "dilation", "precision")
        how = {name: layer.options[name] for name in names if name in layer.options}
        return triton_conv.deform_conv2d(t["x"], t["offset"], t["w"], None, mask=t.get("mask"), **how)

    def between(self, layer: Layer, op: str) -> bool:
        """Samples are rounded before they are multiplied, and gradients of columns before they are spread."""
        return True

    def rivals(self, layer: Layer, op: str) -> Sequence[Rival]:
        found = [Rival(COMPOSED, False, lambda t: self.plain(layer, t))]
        known = layer.options["dtype"] is not torch.bfloat16  # which torchvision's kernel has not
        run, how = _torchvision() if known else None, _walk(layer)
        if run is not None:

            def theirs(t: Tensors) -> Tensor:
                return run(t["x"], t["offset"], t["w"], None, *how, t.get("mask"))

            found.insert(0, Rival(TORCHVISION, False, theirs))
        return found

    def depth(self, layer: Layer, name: str) -> int:
        N, K, P, Q = self.output(layer)
        C, taps = layer.input[1], prod(layer.weight[2:])
        groups = C // layer.weight[1]
        if name in ("doffset", "dmask"):  # sums over channels of sums over filters
            return 2 * K // groups * C // layer.options.get("offset_groups", 1)
        return {"y": C // groups * taps, "dx": 4 * K // groups * taps}.get(name, N * P * Q)


@cache
def _torchvision() -> Callable[..., Tensor] | None:
    """Its function, None where it cannot be had."""
    if importlib.util.find_spec("torchvision") is None:
        return None
    try:
        return importlib.import_module("torchvision.ops").deform_conv2d
    except Exception as error:  # of a build for another PyTorch: of any kind
        warnings.warn(f"torchvision cannot be imported: {error}", stacklevel=2)
        return None


def _walk(layer: Layer) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
    """Strides, padding and dilations."""
    options = layer.options
    return pair(options.get("stride", 1)), pair(options.get("padding", 0)), pair(options.get("dilation", 1))


def _corner(at: Sequence[Tensor], which: tuple[int, int], extents: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """(index in the image, weight) of a corner around each position; outside the image it weighs nothing."""
    index, weight = None, None
    for position, upper, extent in zip(at, which, extents, strict=True):
        low = position.detach().floor()
        place, share = low + upper, (position - low if upper else 1 - (position - low))
        share = share * ((place >= 0) & (place < extent))
        place = place.clamp(0, extent - 1).long()
        index = place if index is None else index * extent + place
        weight = share if weight is None else weight * share
    assert index is not None
    assert weight is not None
    return index, weight
