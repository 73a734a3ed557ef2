"""Operators without a problem of their own, compared with PyTorch in float64: causal and separable convolutions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

import triton_conv
from triton_conv import backends, check
from triton_conv.tuning.layers import Layer

from .checking import worst
from .record import Facts

CAUSAL = ("forward", "all gradients", "update by one step")  # as `explain.plans` has them


def smaller(layer: Layer, images: int, channels: int, extent: int) -> Layer:
    """A causal or separable layer with fewer images, channels and positions."""
    N, C, *spatial = layer.input
    fewer, rest = min(C, channels), list(layer.weight[1:])
    reach = max(layer.weight[2:], default=0)
    sizes = [min(size, max(extent, reach + 1)) for size in spatial]
    options = dict(layer.options)
    if "pointwise" in options:
        options["pointwise"] = min(options["pointwise"], channels)
    first = layer.weight[0] // C * fewer if layer.weight[0] % C == 0 else layer.weight[0]
    return layer._replace(input=(min(N, images), fewer, *sizes), weight=(first, *rest), options=options)


def causal(layer: Layer, title: str, device: torch.device) -> Facts:
    """Facts of one of `CAUSAL`: `causal_conv1d`, its gradients, or steps after a state."""
    options = layer.options
    N, C, L = layer.input
    taps, dtype, activation = layer.weight[1], options["dtype"], options.get("activation")
    draw = _drawer(device, dtype)
    steps = 1 if title == CAUSAL[2] else L
    x, dy = draw(N, C, steps), draw(N, C, steps)
    if options.get("channels_last") and steps > 1:
        x, dy = (t.mT.contiguous().mT for t in (x, dy))
    w, bias = draw(C, taps), draw(C)
    given = options.get("initial_state") or title == CAUSAL[2]
    state = draw(N, C, taps - 1) if given else None
    leaves: list[Any] = [None if t is None else t.detach().requires_grad_() for t in (x, w, bias, state)]
    wide: list[Any] = [None if t is None else t.detach().double().requires_grad_() for t in (x, w, bias, state)]
    want_y, want_state = _causal_in_double(wide, activation)
    if title == CAUSAL[2]:
        assert state is not None
        with torch.no_grad(), check.poisoned():
            y = triton_conv.causal_conv1d_update(x, state, w, bias, activation)
        pairs = [("y", y, want_y, taps), ("state", state, want_state, 1)]
    elif title == CAUSAL[0]:
        with torch.no_grad(), check.poisoned():
            y, final = triton_conv.causal_conv1d(x, w, bias, activation, state, return_final_state=True)
        pairs = [("y", y, want_y, taps), ("state", final, want_state, 1)]
    else:
        # of y alone: where a gradient of the final state adds up with its own, both were rounded before
        with check.poisoned():
            out: Any = triton_conv.causal_conv1d(leaves[0], leaves[1], leaves[2], activation, leaves[3])
            found = torch.autograd.grad(out, [t for t in leaves if t is not None], dy)
        wanted = torch.autograd.grad(want_y, [t for t in wide if t is not None], dy.double())
        names, depths = ("dx", "dw", "db", "dstate"), (taps, N * steps * taps, N * steps * taps, taps)
        pairs = list(zip(names, found, wanted, depths, strict=False))
    return _facts(
        {n: worst(got, want, check.tolerance(want, depth, got.dtype, "ieee", device)) for n, got, want, depth in pairs}
    )


def _causal_in_double(operands: Sequence[Any], activation: str | None) -> tuple[Tensor, Tensor]:
    """y and the final state."""
    x, w, bias, state = operands
    before = x.new_zeros(*x.shape[:2], w.shape[1] - 1) if state is None else state
    padded = torch.cat((before, x), dim=2)
    with backends.cudnn(enabled=False):
        y = functional.conv1d(padded, w.unsqueeze(1), bias, groups=x.shape[1])
    final = padded[:, :, padded.shape[2] - (w.shape[1] - 1) :]
    return functional.silu(y) if activation else y, final


def separable(layer: Layer, device: torch.device) -> Facts:
    """Facts of the fused kernel of a separable convolution.

    What lies between both convolutions is rounded to the input's dtype: to either side, so that results may differ by
    one such unit times a filter.
    """
    options = dict(layer.options)
    rank, dtype, channels_last = len(layer.weight) - 2, options.pop("dtype"), options.pop("channels_last")
    K, padding, mode = options.pop("pointwise"), options.pop("padding", 0), options.pop("padding_mode", "zeros")
    precision = options.pop("precision", "ieee" if dtype is torch.float32 else None)
    draw = _drawer(device, dtype)
    x, depthwise = draw(*layer.input), draw(*layer.weight)
    if channels_last:
        x = x.movedim(1, -1).contiguous().movedim(-1, 1)
    pointwise = draw(K, layer.weight[0], *(1,) * rank)
    biases = [draw(layer.weight[0]), draw(K)]
    how = {"padding": padding, "padding_mode": mode, "precision": precision, **options}
    convolve = getattr(triton_conv, f"separable_conv{rank}d")
    with torch.no_grad(), check.poisoned():
        y = convolve(x, depthwise, pointwise, *biases, fused=True, **how)
    want = _separable_in_double(x, depthwise, pointwise, biases, padding, mode, options)
    eps = torch.finfo(dtype).eps
    if precision == "tf32" and device.type == "cuda":
        eps = 2.0**-11
    bound = 4 * eps * want.abs() + 100 * max(eps, 2.0**-45 if dtype is torch.float64 else 2.0**-23)
    return _facts({"y": worst(y, want, bound)})


def _separable_in_double(
    x: Tensor, depthwise: Tensor, pointwise: Tensor, biases: Sequence[Tensor], padding: Any, mode: str, options: dict
) -> Tensor:
    rank = x.dim() - 2
    pads = padding if isinstance(padding, tuple) else (padding,) * rank
    pairs = [(p, p) if isinstance(p, int) else p for p in pads]
    flat = [p for pair in reversed(pairs) for p in pair]
    padded = functional.pad(x.double(), flat, mode="constant" if mode == "zeros" else mode)
    convolve = getattr(functional, f"conv{rank}d")
    with backends.cudnn(enabled=False):
        between = convolve(padded, depthwise.double(), biases[0].double(), groups=x.shape[1], **options)
        return convolve(between.to(x.dtype).double(), pointwise.double(), biases[1].double())


def _drawer(device: torch.device, dtype: torch.dtype) -> Any:
    generator = torch.Generator().manual_seed(0)
    return lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64).to(device, dtype)


def _facts(shares: dict[str, float]) -> Facts:
    ok = all(value <= 1 for value in shares.values())
    words = ", ".join(f"{name} {value:.0%}" for name, value in shares.items())
    return {"ok": ok, "words": f"worst errors as shares of what rounding allows: {words}", "shares": shares}
