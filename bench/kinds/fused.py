"""Convolutions with an epilogue: bias, scale, residual and activation in one kernel with them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from math import prod
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional

import triton_conv
from triton_conv import cost, explain
from triton_conv.devices import Device
from triton_conv.geometry import Role
from triton_conv.tuning.compound import bare
from triton_conv.tuning.layers import Layer

from ..records import CUDNN_FUSED, POINTWISE_CHANNELS_LAST, POINTWISE_CONTIGUOUS
from .kind import Kind, Rival, Tensors, convolve, pair

_APART = 6.0  # standard deviations between sums and the kink of an activation
_KINKED = ("relu", "relu6", "leaky_relu", "hardswish")
_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": torch.relu_,
    "relu6": functional.relu6,
    "silu": functional.silu,
    "gelu": functional.gelu,
    "gelu_tanh": lambda y: functional.gelu(y, approximate="tanh"),
    "sigmoid": torch.sigmoid,
    "hardswish": functional.hardswish,
}


class Fused(Kind):
    """A convolution, then scale, bias, residual and activation: `triton_conv.epilogue`."""

    plans: ClassVar = {"fprop": ("forward",), "step": ("forward", "input gradient", "weight gradient")}
    convolution = True

    def titles(self, layer: Layer) -> Mapping[str, tuple[str, ...]]:
        if not layer.options.get("activation"):
            return self.plans
        forward, *gradients = self.plans["step"]
        return {**self.plans, "step": (forward, "activation gradient", *gradients)}

    def call(self, layer: Layer) -> str:
        return f"conv{len(layer.weight) - 2}d"

    def shapes(self, layer: Layer) -> dict[str, tuple[int, ...]]:
        found, filters = super().shapes(layer), (layer.weight[0],)
        found |= {name: filters for name in ("bias", "scale") if layer.options.get(name)}
        return found | ({"residual": self.output(layer)} if layer.options.get("residual") else {})

    def output(self, layer: Layer) -> tuple[int, ...]:
        g = _geometry(layer)
        return (*g.shape("y")[:2], *g.output[3 - (len(layer.weight) - 2) :])

    def drawn(self, layer: Layer, op: str, name: str, normal: Tensor) -> Tensor:
        """Of a step, biases keep sums away from an activation's kink: rounding would turn the gradient there."""
        if name == "scale":
            return 1 + normal.tanh() / 2
        if name == "bias" and op == "step" and layer.options.get("activation") in _KINKED:
            return _APART * self.depth(layer, "y") ** 0.5 * normal.sign() + normal
        return normal

    def plain(self, layer: Layer, t: Tensors) -> Tensor:
        options = layer.options
        how = {name: options[name] for name in ("stride", "padding", "dilation", "groups") if name in options}
        scale = t.get("scale")
        y = convolve(t["x"], t["w"], t.get("bias") if scale is None else None, **how)
        if scale is not None:
            y = y * _each(scale, y) + (_each(t["bias"], y) if "bias" in t else 0)
        if options.get("residual") == "before":
            y = y.add_(t["residual"])
        if options.get("activation"):
            y = _activated(options, y)
        return y + t["residual"] if options.get("residual") == "after" else y

    def ours(self, layer: Layer, t: Tensors) -> Tensor:
        options = layer.options
        known = {n: v for n, v in options.items() if n not in ("dtype", "channels_last", "bias", "residual", "scale")}
        known["residual_after_activation"] = options.get("residual") == "after"
        others = {name: t.get(name) for name in ("residual", "scale")}
        return getattr(triton_conv, self.call(layer))(t["x"], t["w"], t.get("bias"), **known, **others)

    def between(self, layer: Layer, op: str) -> bool:
        """What the activation is applied to is kept rounded, and its gradient is rounded, but for those of 0 and 1."""
        exact = layer.options.get("activation") in (None, "relu", "relu6") and not layer.options.get("scale")
        return op == "step" and not exact

    def rivals(self, layer: Layer, op: str) -> Sequence[Rival]:
        names = {POINTWISE_CONTIGUOUS: False, POINTWISE_CHANNELS_LAST: True}
        found = [Rival(who, last, lambda t: self.plain(layer, t)) for who, last in names.items()]
        options = layer.options
        bare = options.get("activation") == "relu" and not options.get("scale") and options.get("residual") != "after"
        if op == "fprop" and bare and len(layer.weight) == 4 and torch.cuda.is_available():
            found.append(Rival(CUDNN_FUSED, True, lambda t: _by_cudnn(layer, t)))
        return found

    def depth(self, layer: Layer, name: str) -> int:
        g = _geometry(layer)
        sums = {"y": g.C // g.groups * g.taps, "dx": g.K // g.groups * g.taps, "dresidual": 1}
        of_all = g.N * prod(g.output)
        # a scale's gradient sums products of sums
        return sums.get(name, of_all * sums["y"] if name == "dscale" else of_all)

    def separate_seconds(self, layer: Layer, op: str, device: Device) -> float | None:
        """Our own convolution, then a pass over memory for what cuDNN leaves out: one reads and writes the output."""
        if op != "fprop":
            return None
        alone = bare(layer)
        found: Any = explain.plans(alone.input, alone.weight, device=device, **alone.options)
        size = prod(self.output(layer)) * layer.options["dtype"].itemsize
        parts = ("bias", "activation", "residual", "scale")
        passes = {name: cost.copy_seconds(size, device) for name in parts if layer.options.get(name)}
        if "residual" in passes:
            passes["residual"] = cost.copy_seconds(3 * size // 2, device)  # which it reads besides
        return found["forward"].seconds + sum(passes.values())


def _geometry(layer: Layer) -> Any:
    problem = explain.problems(layer.input, layer.weight, **layer.options)["forward"]
    assert problem.role is Role.FPROP
    return problem.geometry


def _each(values: Tensor, y: Tensor) -> Tensor:
    """One for every channel."""
    return values.view(-1, *(1,) * (y.dim() - 2))


def _activated(options: dict[str, Any], y: Tensor) -> Tensor:
    if options["activation"] == "leaky_relu":
        return functional.leaky_relu(y, options.get("negative_slope", 0.01))
    return _ACTIVATIONS[options["activation"]](y)


def _by_cudnn(layer: Layer, t: Tensors) -> Tensor:
    """By the two fused calls that PyTorch has of cuDNN, for inference alone and with a relu."""
    options = layer.options
    how = [list(pair(options.get(name, usual))) for name, usual in (("stride", 1), ("padding", 0), ("dilation", 1))]
    groups = options.get("groups", 1)
    if "residual" in t:
        more: Any = torch.cudnn_convolution_add_relu
        return more(t["x"], t["w"], t["residual"], 1.0, t.get("bias"), *how, groups)
    fused: Any = torch.cudnn_convolution_relu
    return fused(t["x"], t["w"], t.get("bias"), *how, groups)
