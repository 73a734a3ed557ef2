"""Causal convolutions in plain torch: what runs on a CPU, and what gradients of gradients are taken of."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from . import invariance
from .reference import wide_of


def _with_state(x: Tensor, state: Tensor | None, taps: int) -> Tensor:
    """x with the taps - 1 positions before it."""
    return functional.pad(x, (taps - 1, 0)) if state is None else torch.cat((state, x), dim=2)


def _sums(padded: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    wide = padded.dtype
    bias = None if bias is None else bias.to(wide)
    return functional.conv1d(padded, weight.to(wide).unsqueeze(1), bias, groups=padded.shape[1])


def samples(*tensors: Tensor | None) -> list[tuple[Tensor | None, ...]]:
    """The same samples of each; all of them at once unless sums must not depend on the batch."""
    parts = 1 if invariance.batch() is None else max(t.shape[0] for t in tensors if t is not None)
    columns = ([None] * parts if t is None else t.chunk(parts) if parts > 1 else [t] for t in tensors)
    return list(zip(*columns, strict=True))


def forward(x: Tensor, weight: Tensor, bias: Tensor | None, state: Tensor | None, silu: bool) -> Tensor:
    return torch.cat([_of_samples(a, weight, bias, s, silu) for a, s in samples(x, state)])


def _of_samples(x: Any, weight: Tensor, bias: Tensor | None, state: Tensor | None, silu: bool) -> Tensor:
    y = _sums(_with_state(x, state, weight.shape[1]).to(wide_of(x.dtype)), weight, bias)
    return functional.silu(y) if silu else y


def gradients(
    dy: Any,
    dfinal_state: Tensor | None,
    x: Any,
    weight: Tensor,
    bias: Tensor | None,
    state: Tensor | None,
    silu: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """dx, dweight, dbias and the gradient of the state, as wide as sums are; the last two empty where there is none."""
    (_, C, L), W, wide = x.shape, weight.shape[1], wide_of(x.dtype)
    padded, g = _with_state(x, state, W).to(wide), dy.to(wide)
    if silu:
        a = _sums(padded, weight, bias)
        s = torch.sigmoid(a)
        g = g * (s * (1 + a * (1 - s)))  # not aten's silu_backward, which has no derivative
    dpadded, dweight, dbias = torch.ops.aten.convolution_backward(
        g, padded, weight.to(wide).unsqueeze(1), [C], [1], [0], [1], False, [0], C, [True, True, bias is not None]
    )
    if dfinal_state is not None:
        dpadded = dpadded + functional.pad(dfinal_state.to(wide), (L, 0))
    dstate, dx = dpadded.split((W - 1, L), dim=2)
    return (
        dx,
        dweight.squeeze(1),
        x.new_empty(0, dtype=wide) if dbias is None else dbias,
        dstate[:, :, :0] if state is None else dstate,
    )
