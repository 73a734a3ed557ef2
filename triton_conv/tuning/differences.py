"""Where a tensor differs from what it should be: by how much, at which elements, in which pattern."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .. import check

_SHOWN = 5  # wrong elements
_RANGES = 6  # of indices along an axis


def bound(want: Tensor, depth: int, dtype: torch.dtype, how: tuple[str | None, torch.device], slack: float) -> Tensor:
    """By how much each element may differ: the formula of `check`, for values of any size.

    Its sqrt(depth), the size of a sum of products of standard normal numbers, is here the size that `want` has. `slack`
    counts further roundings to the dtype, on the way. Integers are exact.
    """
    if not (dtype.is_floating_point or dtype.is_complex):
        return torch.zeros(want.shape)
    output, total, operand = check._epsilons(dtype, *how)
    size = want.abs().square().mean().sqrt() if want.numel() else want.new_zeros(()).abs()
    return output * want.abs() + size * (10 * total * depth**0.5 + 10 * operand + slack * output)


def share(got: Tensor, want: Tensor, allowed: Tensor) -> Tensor:
    """The error of each element as a share of what is allowed; infinite for NaN, and for any error where none is."""
    if not (want.is_floating_point() or want.is_complex()):
        return torch.where(got.cpu() == want, 0.0, torch.inf)
    error = (got.to("cpu", want.dtype) - want).abs()
    same = (got.to("cpu", want.dtype) == want) | (got.cpu().isnan() & want.isnan())
    return torch.where(same, 0.0, torch.nan_to_num(error / allowed, nan=torch.inf, posinf=torch.inf))


def lines(wrong: Tensor, axes: str, got: Tensor, want: Tensor, rival: Tensor | None) -> list[str]:
    """The wrong elements in words: how many, along which axes, and the first of them."""
    count = int(wrong.sum())
    along = []
    for axis, letter in enumerate(axes):
        others = [i for i in range(wrong.dim()) if i != axis]
        hit = wrong.any(dim=others) if others else wrong
        along.append(f"{letter} {_ranges(hit)}")
    flat = wrong.movedim(1, -1).reshape(-1, wrong.shape[1]).any(dim=1) if wrong.dim() > 2 else wrong.flatten()
    said = [
        f"{count} of {wrong.numel()} elements are wrong, at " + "; ".join(along),
        f"positions, all axes but the second flattened: {_ranges(flat)}",
    ]
    for index in wrong.nonzero()[:_SHOWN].tolist():
        at = tuple(index)
        other = "" if rival is None else f"  torch {_number(rival[at])}"
        said.append(f"{index}  ours {_number(got[at])}{other}  float64 {_number(want[at])}")
    return said


def _number(t: Tensor) -> str:
    value = t.item()
    return str(value) if isinstance(value, (int, complex)) else f"{value:.7g}"


def _ranges(hit: Tensor) -> str:
    """Which of the indices are meant.

    >>> _ranges(torch.tensor([1, 1, 0, 1, 1, 1]).bool()), _ranges(torch.tensor([0, 1, 0, 1, 0, 1]).bool())
    ('0-1, 3-5 of 6', '1, 3, 5 of 6')
    """
    indices = hit.nonzero().flatten().tolist()
    if len(indices) == len(hit):
        return f"all {len(hit)}"
    runs = list[list[int]]()
    for i in indices:
        if runs and runs[-1][-1] == i - 1:
            runs[-1][1:] = [i]
        else:
            runs.append([i])
    words = ["-".join(map(str, run)) for run in runs[:_RANGES]]
    if len(runs) > _RANGES:
        words.append(f"... {len(indices)} in {len(runs)} runs")
    return f"{', '.join(words)} of {len(hit)}"


def letters(name: str, rank: int) -> str:
    """The axes of a tensor of a convolution, as the field calls them.

    >>> letters("output", 5), letters("weight", 4), letters("input", 3)
    ('NKZPQ', 'KCRS', 'NCW')
    """
    whole = "NKZPQ" if name == "output" else "KCTRS" if "weight" in name or "wise" in name else "NCDHW"
    return whole[:2] + whole[7 - rank :] if rank > 1 else whole[:rank]


def depth_of(name: str, weights: Sequence[Tensor], output: Tensor) -> int:
    """About how many products add up to an element of the tensor called `name`."""
    if "weight" in name or "bias" in name or "wise" in name or name == "scale":
        return max(output.numel() // max(output.shape[1], 1), 1)
    return max(1, *(w.numel() // max(min(w.shape[:2]), 1) for w in weights))
