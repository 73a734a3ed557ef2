"""Short causal convolutions of state-space models."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from torch import Tensor
from torch.nn import functional

import triton_conv
from triton_conv.tuning.layers import Layer

from ..records import CHANNELS_LAST, CONTIGUOUS
from .kind import Kind, Rival, Tensors


class Causal(Kind):
    """`causal_conv1d`, which has all gradients in one plan."""

    plans: ClassVar = {"fprop": ("forward",), "step": ("forward", "all gradients")}

    def call(self, layer: Layer) -> str:
        return "causal_conv1d"

    def small(self, layer: Layer) -> Layer:
        N, _, L = layer.input
        return Layer((min(N, 2), 16, min(L, 20)), (16, layer.weight[1]), dict(layer.options))

    def output(self, layer: Layer) -> tuple[int, ...]:
        return layer.input

    def plain(self, layer: Layer, t: Tensors) -> Tensor:
        """As state-space models without kernels of their own do it: padded on both sides, then cut."""
        x, w = t["x"], t["w"]
        (C, W), L = w.shape, x.shape[2]
        y = functional.conv2d(x.unsqueeze(2), w[:, None, None], None, 1, (0, W - 1), 1, C).squeeze(2)[:, :, :L]
        return functional.silu(y) if layer.options.get("activation") else y

    def ours(self, layer: Layer, t: Tensors) -> Tensor:
        y = triton_conv.causal_conv1d(t["x"], t["w"], None, layer.options.get("activation"))
        assert isinstance(y, Tensor)
        return y

    def rivals(self, layer: Layer, op: str) -> Sequence[Rival]:
        names = {CONTIGUOUS: False, CHANNELS_LAST: True}
        return [Rival(who, last, lambda t: self.plain(layer, t)) for who, last in names.items()]

    def depth(self, layer: Layer, name: str) -> int:
        return layer.input[0] * layer.input[2] if name == "dw" else layer.weight[1]
