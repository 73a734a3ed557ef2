"""Two runs beside each other: what became slower or quicker by more than noise.

    >>> slower(Measurement(1.1e-4, 0.01, 50), Measurement(1.0e-4, 0.01, 50))
    True

Two medians differ where their ratio is beyond a tie and their notches do not overlap (`rounds.notch`). Of many rows
some differ so by chance: the more rows, the wider the notches. Two runs have clocks of their own: by as much as others
became slower, or quicker, we may, too. Predictions have no noise: there the tie decides alone.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from statistics import NormalDist, median
from typing import NamedTuple

from triton_conv import stored
from triton_conv.tuning import rounds

from .records import OURS, Measurement, Row, Run

# Medians of normal samples whose notches just touch are so many standard deviations of their difference apart.
_TOUCHING = 2 * rounds.notch(NormalDist().inv_cdf(0.75), 1) / math.sqrt(math.pi)
_CHANCE = 0.05  # that anything at all is called slower where nothing is


class Change(NamedTuple):
    """A row of ours that both runs have, with its two times in seconds."""

    row: Row
    old: float
    new: float

    @property
    def ratio(self) -> float:
        """The new time over the old one."""
        return self.new / self.old


@dataclass(frozen=True)
class Comparison:
    """What changed from one run to another; regressions and improvements begin with the largest.

    `same` counts rows that do not differ, `only_old` and `only_new` are rows of one run alone, `lost` those that had a
    time and have none any more. `warnings` say what else differs.
    """

    regressions: tuple[Change, ...]
    improvements: tuple[Change, ...]
    same: int
    only_old: tuple[Row, ...]
    only_new: tuple[Row, ...]
    lost: tuple[Row, ...]
    warnings: tuple[str, ...]

    @property
    def compared(self) -> int:
        """How many rows had a time to compare with."""
        return len(self.regressions) + len(self.improvements) + self.same + len(self.lost)

    @property
    def regressed(self) -> bool:
        """Whether something takes longer, or runs no more."""
        return bool(self.regressions or self.lost)


def compare(old: Run, new: Run) -> Comparison:
    """Our times in two runs, row by row. Raises ValueError where they are of different sources."""
    if old.source != new.source:
        raise ValueError(f"times that are {old.source} and times that are {new.source} cannot be compared")
    before, after = ({row.name: row for row in run.rows} for run in (old, new))
    both, drift = before.keys() & after.keys(), _drift(before, after)
    wider, regressions, improvements, lost, same = _wider(len(both)), [], [], [], 0
    for name in both:
        one, other = (_ours(run, rows[name]) for run, rows in ((old, before), (new, after)))
        if one is None or one.seconds is None:
            continue
        if other is None or other.seconds is None:
            lost.append(after[name])
            continue
        change = Change(after[name], one.seconds, other.seconds)
        if slower(other, _times(one, max(drift, 1.0)), wider):
            regressions.append(change)
        elif slower(_times(one, min(drift, 1.0)), other, wider):
            improvements.append(change)
        else:
            same += 1
    return Comparison(
        tuple(sorted(regressions, key=lambda c: (-c.ratio, c.row.name))),
        tuple(sorted(improvements, key=lambda c: (c.ratio, c.row.name))),
        same,
        tuple(row for name, row in before.items() if name not in after),
        tuple(row for name, row in after.items() if name not in before),
        tuple(sorted(lost, key=lambda row: row.name)),
        tuple(_warnings(old, new, drift)),
    )


def slower(a: Measurement, b: Measurement, wider: float = 1.0) -> bool:
    """Whether `a` takes longer than `b`, beyond a tie and beyond noise. Of a time without a spread nobody can say.

    Notches are so many times `wider` than those of a single pair. Both have the larger spread: those of few rounds are
    noisy themselves.
    """
    if a.seconds is None or b.seconds is None or a.seconds <= b.seconds * (1 + stored.TIE):
        return False
    if a.spread is None or b.spread is None or min(a.rounds, b.rounds) < 1:
        return False
    spread = max(a.spread, b.spread)
    least = a.seconds * (1 - wider * rounds.notch(spread, a.rounds))
    return least > b.seconds * (1 + wider * rounds.notch(spread, b.rounds))


def _wider(rows: int) -> float:
    """So many times as wide as one pair's are notches where that many rows are compared (Bonferroni)."""
    return max(1.0, NormalDist().inv_cdf(1 - _CHANCE / max(rows, 1)) / _TOUCHING)


def _times(measured: Measurement, factor: float) -> Measurement:
    return replace(measured, seconds=None if measured.seconds is None else measured.seconds * factor)


def _ours(run: Run, row: Row) -> Measurement | None:
    if run.source == "predicted":
        return Measurement(row.predicted_seconds, spread=0.0, rounds=1)
    return row.measured.get(OURS)


def _drift(before: Mapping[tuple[str, ...], Row], after: Mapping[tuple[str, ...], Row]) -> float:
    """How many times as long what is not ours takes as it did, in the median."""
    ratios = [
        seconds / was
        for name, row in after.items()
        if name in before
        for who in row.measured
        if who != OURS and (seconds := row.seconds(who)) and (was := before[name].seconds(who))
    ]
    return median(ratios) if ratios else 1.0


def _warnings(old: Run, new: Run, drift: float) -> Iterator[str]:
    if old.device != new.device:
        yield f"the devices differ: {old.device} and {new.device}"
    for name in sorted(old.versions.keys() & new.versions.keys()):
        if old.versions[name] != new.versions[name]:
            yield f"{name} was {old.versions[name]} and is {new.versions[name]}"
    if abs(drift - 1) > stored.TIE:
        yield f"what is not ours takes {drift:.2f} times as long as it did, in the median: we may, too"
