"""Two runs beside each other: what became slower or quicker by more than noise.

    >>> slower(Measurement(1.1e-4, 0.01, 50), Measurement(1.0e-4, 0.01, 50))
    True

Two medians differ where their ratio is beyond a tie and their notches do not overlap (`rounds.notch`). Predictions have
no noise: there the tie decides alone.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from statistics import median
from typing import NamedTuple

from triton_conv import stored
from triton_conv.tuning import rounds

from .records import OURS, Measurement, Row, Run


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
    def regressed(self) -> bool:
        """Whether something takes longer, or runs no more."""
        return bool(self.regressions or self.lost)


def compare(old: Run, new: Run) -> Comparison:
    """Our times in two runs, row by row. Raises ValueError where they are of different sources."""
    if old.source != new.source:
        raise ValueError(f"times that are {old.source} and times that are {new.source} cannot be compared")
    before, after = ({row.name: row for row in run.rows} for run in (old, new))
    regressions, improvements, lost, same = [], [], [], 0
    for name in before.keys() & after.keys():
        one, other = (_ours(run, rows[name]) for run, rows in ((old, before), (new, after)))
        if one is None or one.seconds is None:
            continue
        if other is None or other.seconds is None:
            lost.append(after[name])
            continue
        change = Change(after[name], one.seconds, other.seconds)
        if slower(other, one):
            regressions.append(change)
        elif slower(one, other):
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
        tuple(_warnings(old, new)),
    )


def slower(a: Measurement, b: Measurement) -> bool:
    """Whether `a` takes longer than `b`, beyond a tie and beyond noise. Of a time without a spread nobody can say."""
    if a.seconds is None or b.seconds is None or a.seconds <= b.seconds * (1 + stored.TIE):
        return False
    if a.spread is None or b.spread is None or min(a.rounds, b.rounds) < 1:
        return False
    least = a.seconds * (1 - rounds.notch(a.spread, a.rounds))
    return least > b.seconds * (1 + rounds.notch(b.spread, b.rounds))


def _ours(run: Run, row: Row) -> Measurement | None:
    if run.source == "predicted":
        return Measurement(row.predicted_seconds, spread=0.0, rounds=1)
    return row.measured.get(OURS)


def _warnings(old: Run, new: Run) -> Iterator[str]:
    if old.device != new.device:
        yield f"the devices differ: {old.device} and {new.device}"
    for name in sorted(old.versions.keys() & new.versions.keys()):
        if old.versions[name] != new.versions[name]:
            yield f"{name} was {old.versions[name]} and is {new.versions[name]}"
    if new.source == "measured":
        before = {row.name: row for row in old.rows}
        drifts = [
            seconds / was
            for row in new.rows
            for who in row.measured
            if who != OURS
            and row.name in before
            and (seconds := row.seconds(who)) is not None
            and (was := before[row.name].seconds(who)) is not None
        ]
        if drifts and abs(median(drifts) - 1) > stored.TIE:
            yield f"what is not ours takes {median(drifts):.2f} times as long as it did, in the median of {len(drifts)}"
