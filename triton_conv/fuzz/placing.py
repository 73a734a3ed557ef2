"""How an operand may lie in memory. What is around its elements is NaN, the largest value of integers."""

from __future__ import annotations

import random

import torch
from torch import Tensor

PLACES = (
    "",  # contiguous
    "channels_last",
    "window",  # of a larger tensor
    "slice_of_channels",  # of a channels-last tensor, at multiples of 16 bytes
    "odd_slice_of_channels",  # elsewhere
    "misaligned",  # contiguous, at an odd element
    "every_other",  # column
    "turned",  # the spatial axes the other way around
    "expanded",  # the first sample, repeated
)


def placed(t: Tensor, how: str) -> Tensor:
    """The values of t (for "expanded", of its first sample) elsewhere in memory.

    >>> placed(torch.zeros(2, 4, 3, 3), "channels_last").stride()
    (36, 1, 12, 4)
    """
    if how == "" or t.dim() == 0:
        return t
    if how == "channels_last":
        return t.movedim(1, -1).contiguous().movedim(-1, 1) if t.dim() > 1 else t
    if how == "expanded":
        return t[:1].expand_as(t)
    if how == "window":
        return _around(t, [n + 2 for n in t.shape])[(slice(1, -1),) * t.dim()].copy_(t)
    if how == "misaligned":
        return _around(t, [t.numel() + 2])[1:-1].view(t.shape).copy_(t)
    if how == "every_other":
        return _around(t, [*t.shape[:-1], 2 * t.shape[-1]])[..., ::2].copy_(t)
    if t.dim() < 3:
        return t
    if how == "turned":
        return (
            t.permute(*range(2), *reversed(range(2, t.dim())))
            .contiguous()
            .permute(*range(2), *reversed(range(2, t.dim())))
        )
    C, before = t.shape[1], 16 if how == "slice_of_channels" else 3
    rows = _around(t, [t.shape[0], *t.shape[2:], before + C + before % 2 + 16 - C % 16])
    return rows[..., before : before + C].movedim(-1, 1).copy_(t)


def _around(t: Tensor, shape: list[int]) -> Tensor:
    real = t.dtype.is_floating_point or t.dtype.is_complex
    return t.new_full(shape, float("nan") if real else torch.iinfo(t.dtype).max)


def random_places(rng: random.Random, names: tuple[str, ...], usual: str = "") -> tuple[tuple[str, str], ...]:
    """Where operands lie: all contiguous, all channels-last, or each by itself; `usual` is likelier."""
    kind = rng.random()
    if kind < 0.25:
        return ()
    everywhere = kind < 0.7
    one = rng.choice((usual or "channels_last", "channels_last", rng.choice(PLACES)))
    found = [(name, one if everywhere else rng.choice(("channels_last", *PLACES))) for name in names]
    return tuple((name, how) for name, how in found if how)
