"""A part of stage b: random calls of every family, by the public functions, against float64."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch

from triton_conv import fuzz

from . import checking
from .record import Facts
from .units import Context, Unit

SEED = 20
CASES, CHUNK = 48, 8  # of each family, and how many of them make a unit


def units(context: Context) -> Iterator[Unit]:
    """In turns, so that every family has had some when the time is up."""
    cases, families = (CASES, list(fuzz.FAMILIES)) if not context.simulate else (1, ["fused", "causal"])
    for first in range(0, cases, CHUNK):
        for family in families:
            count = min(CHUNK, cases - first)
            name = f"random {family} {first} to {first + count - 1}"
            yield Unit(name, partial(_compared, family, first, count, context), kernel=f"random {family}")


def _compared(family: str, first: int, count: int, context: Context) -> Facts:
    most, wrong = 0.0, list[str]()
    for done, (_, number, case) in enumerate(fuzz.numbered([family], SEED, first, count)):
        if context.left() < 0:
            return {"ok": not wrong, "words": f"the time was up after {done} cases", "unfinished": True}
        try:
            with checking.watched(context):
                outcome = fuzz.checked((family, number, case), str(context.device))
        except torch.AcceleratorError as error:  # the process ends with it
            raise RuntimeError(f"{family} {number}, {case}: {error}") from error
        most = max([most, *(result.share for result in outcome.results)])
        if not outcome.ok:
            bad = [f"{r.name} {r.share:.3g} times too far off: {r.note}" for r in outcome.results if not r.ok]
            wrong.append(f"{family} {number}, {case}: {outcome.error[:300] or '; '.join(bad)}")
    facts: Facts = {"cases": count, "share": most}
    if wrong:
        return {"ok": False, "words": "; ".join(wrong[:3]), "wrong": wrong, **facts}
    return {"ok": True, "words": f"right; worst error {most:.0%} of what rounding allows", **facts}
