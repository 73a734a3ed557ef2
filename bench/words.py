"""Numbers and changes as people read them, the same in tables, pages and the README."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import zip_longest

from .compare import Comparison
from .records import Row
from .summary import Pair, Total


def us(seconds: float | None) -> str:
    """Microseconds with four digits that count, "" for none.

    >>> us(1.23456e-3), us(4.5e-6)
    ('1235', '4.5')
    """
    if seconds is None:
        return ""
    return f"{1e6 * seconds:.0f}" if seconds >= 1e-3 else f"{1e6 * seconds:.4g}"


def ms(seconds: float | None) -> str:
    """Milliseconds with at least three digits.

    >>> ms(0.002), ms(1.5)
    ('2.00', '1500')
    """
    if seconds is None:
        return ""
    return f"{1e3 * seconds:.0f}" if seconds >= 0.1 else f"{1e3 * seconds:#.3g}"


def ms_of(pair: Pair | None, total: Total) -> str:
    """Another's milliseconds of a total, and of how many of its layers they are if not of all."""
    if pair is None:
        return ""
    return f"{ms(pair.theirs)}{f' ({pair.rows} of {total.rows})' if pair.rows < total.rows else ''}"


def ratio(value: float | None) -> str:
    """A ratio with two digits behind the point, or two that count where it is small.

    >>> ratio(1.239), ratio(0.0123)
    ('1.24', '0.012')
    """
    if value is None:
        return ""
    return f"{value:.2f}" if value >= 0.1 else f"{value:.2g}"


def percent(share: float | None, digits: int = 0) -> str:
    """A share in percent, "" for none."""
    return "" if share is None else f"{share:.{digits}%}"


def grouped(kernel: str, config: str) -> str:
    """Kernels with their configs, which are both separated by commas in a step.

    >>> grouped("box, box_wgrad", "64x64x32 warps 4, 16x64x64 warps 4")
    'box 64x64x32 warps 4, box_wgrad 16x64x64 warps 4'
    """
    pairs = zip_longest(kernel.split(", "), config.split(", "), fillvalue="")
    return ", ".join(c if c.startswith(f"{k} ") else f"{k} {c}".strip() for k, c in pairs)


def named(row: Row) -> str:
    """A row in a line of text."""
    return f"{row.suite}: {row.layer}, {row.op}"


def change_words(comparison: Comparison) -> Iterator[tuple[str, bool]]:
    """What a comparison says besides its list of changes, and whether it is bad."""
    yield from ((warning, False) for warning in comparison.warnings)
    worse, better, lost = len(comparison.regressions), len(comparison.improvements), len(comparison.lost)
    yield f"{worse} slower, {better} quicker, {comparison.same} the same but for noise", worse > 0
    if not comparison.compared:
        yield "no row with a time is in both: nothing was compared", True
    if lost:
        yield f"{lost} that ran and run no more: {'; '.join(map(named, comparison.lost))}", True
    for where, rows in (("before", comparison.only_old), ("now", comparison.only_new)):
        if rows:
            yield f"{len(rows)} rows are there {where} only", False
