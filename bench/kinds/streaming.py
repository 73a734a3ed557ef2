"""Convolutions causal in time behind frames of the chunk before: decoders of video, a chunk at a time."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional

import triton_conv
from triton_conv import cost, explain
from triton_conv.devices import Device
from triton_conv.tuning.layers import Layer

from ..records import CAT_CHANNELS_LAST, CAT_CONTIGUOUS
from .kind import Kind, Rival, Tensors, convolve, fewer, pair


class Streaming(Kind):
    """`causal_conv3d` with a context, for inference."""

    plans: ClassVar = {"fprop": ("forward",)}

    def call(self, layer: Layer) -> str:
        return "causal_conv3d"

    def small(self, layer: Layer) -> Layer:
        (N, C, *extents), (K, _, *taps) = layer.input, layer.weight
        image = [min(extent, n + 3 + extent % 2) for extent, n in zip(extents[1:], taps[1:], strict=True)]
        sizes = [min(extents[0], 3), *image]
        return Layer((min(N, 2), fewer(C), *sizes), (fewer(K), fewer(C), *taps), dict(layer.options))

    def shapes(self, layer: Layer) -> dict[str, tuple[int, ...]]:
        N, C, _, *image = layer.input
        return {**super().shapes(layer), "context": (N, C, layer.options["context"], *image)}

    def plain(self, layer: Layer, t: Tensors) -> Tensor:
        """As those who serve such decoders write it: frames put together, borders other than zeros around them."""
        x, pads = torch.cat((t["context"], t["x"]), dim=2), pair(layer.options.get("padding", 0))
        mode = layer.options.get("padding_mode", "zeros")
        if mode != "zeros" and any(pads):
            down, across = pads
            x, pads = functional.pad(x, (across, across, down, down, 0, 0), mode=mode), (0, 0)
        return convolve(x, t["w"], padding=(0, *pads))

    def ours(self, layer: Layer, t: Tensors) -> Tensor:
        """With the context of the next chunk, which others are not asked for: they have it as a view."""
        known = {n: v for n, v in layer.options.items() if n not in ("dtype", "channels_last", "context")}
        y, _ = triton_conv.causal_conv3d(t["x"], t["w"], context=t["context"], return_context=True, **known)
        return y

    def rivals(self, layer: Layer, op: str) -> Sequence[Rival]:
        names = {CAT_CONTIGUOUS: False, CAT_CHANNELS_LAST: True}
        return [Rival(who, last, lambda t: self.plain(layer, t), between=False) for who, last in names.items()]

    def depth(self, layer: Layer, name: str) -> int:
        return prod(layer.weight[1:])

    def separate_seconds(self, layer: Layer, op: str, device: Device) -> float | None:
        """Our own convolution of all frames, and a copy that puts them together."""
        N, C, frames, *image = layer.input
        options = {n: v for n, v in layer.options.items() if n != "context"}
        options["padding"] = (0, *pair(options.get("padding", 0)))
        if "padding_mode" in options:
            options["padding_mode"] = ("zeros", *[options["padding_mode"]] * 2)
        joined = (N, C, frames + layer.options["context"], *image)
        found: Any = explain.plans(joined, layer.weight, device=device, **options)
        return found["forward"].seconds + cost.copy_seconds(prod(joined) * options["dtype"].itemsize, device)
