"""What follows from rows: rates, shares, speed-ups, totals of suites. Times are in seconds."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from math import fsum
from statistics import geometric_mean
from typing import NamedTuple

from triton_conv import devices

from .compare import slower
from .records import (
    CAT_CHANNELS_LAST,
    CAT_CONTIGUOUS,
    CHANNELS_LAST,
    COMPOSED,
    CONTIGUOUS,
    OPS,
    OTHERS,
    OURS,
    PADDED_CHANNELS_LAST,
    PADDED_CONTIGUOUS,
    POINTWISE_CHANNELS_LAST,
    POINTWISE_CONTIGUOUS,
    SEPARATE_CHANNELS_LAST,
    SEPARATE_CONTIGUOUS,
    TORCHVISION,
    Measurement,
    Row,
    Run,
)

# Where a border is not cuDNN's, what pads first stands in its place, and so do several kernels where one is ours.
LAYOUTS = {
    CHANNELS_LAST: (
        CHANNELS_LAST,
        PADDED_CHANNELS_LAST,
        POINTWISE_CHANNELS_LAST,
        SEPARATE_CHANNELS_LAST,
        CAT_CHANNELS_LAST,
    ),
    CONTIGUOUS: (CONTIGUOUS, PADDED_CONTIGUOUS, POINTWISE_CONTIGUOUS, SEPARATE_CONTIGUOUS, CAT_CONTIGUOUS),
}


def seconds(row: Row) -> float | None:
    """Our time, or the predicted one where nobody took it."""
    return row.predicted_seconds if row.seconds(OURS) is None else row.seconds(OURS)


def cudnn(row: Row, layout: str = CHANNELS_LAST) -> str | None:
    """Under which name cuDNN's time in a memory format is found, None where it has none."""
    return next((who for who in LAYOUTS[layout] if row.seconds(who) is not None), None)


def rival(row: Row) -> str | None:
    """Whom we are compared with: cuDNN channels-last, or contiguous where there is no other.

    Where cuDNN has nothing at all it is torchvision, or else plain PyTorch.
    """
    others = (who for who in (TORCHVISION, COMPOSED) if row.seconds(who) is not None)
    return cudnn(row) or cudnn(row, CONTIGUOUS) or next(others, None)


def best_rival(row: Row) -> str | None:
    """Who else is quickest."""
    timed = [who for who in (*OTHERS, *sorted(row.measured)) if who != OURS and row.seconds(who) is not None]
    return min(timed, key=lambda who: row.seconds(who) or 0.0, default=None)


def speedup(row: Row, over: str | None = None) -> float | None:
    """How many times as quick as `rival` we are, or as another one."""
    who = over or rival(row)
    ours, theirs = row.seconds(OURS), row.seconds(who) if who else None
    return theirs / ours if ours and theirs else None


def verdict(row: Row) -> int:
    """1 where we are quicker than `rival` by more than noise, -1 where we are slower, else 0."""
    who, ours = rival(row), row.measured.get(OURS)
    if who is None or ours is None:
        return 0
    theirs: Measurement = row.measured[who]
    return 1 if slower(theirs, ours) else -1 if slower(ours, theirs) else 0


def faults(run: Run) -> list[tuple[Row, str]]:
    """Rows with values of ours that are wrong, and rows that we could not run, with what is the matter."""
    found = []
    for row in run.rows:
        ours = row.measured.get(OURS)
        if ours is not None and ours.error is not None and not ours.error <= 1:
            found.append((row, f"wrong: the worst error is {ours.error:.3g} times its tolerance. {ours.note}".strip()))
        elif ours is not None and ours.error is None and ours.seconds is None and ours.note:
            found.append((row, ours.note))
    return found


# ---------------------------------------------------------------------------------------------------------------------
# Rates and ceilings


@dataclass(frozen=True)
class Ceilings:
    """Bytes a second of a copy and flops a second of matrix products of a dtype; 0 where unknown.

    `measured` says whether they are the run's own, which loops on the device reached; else they are its data sheet's.
    """

    copy: float
    matmul: float
    measured: bool


def ceilings(run: Run, row: Row) -> Ceilings:
    """The ceilings of a row, of what its run measured or else of the data sheet of its device."""
    name = products(row)
    copy, matmul = run.ceilings.get("copy", 0.0), run.ceilings.get(f"matmul {name}", 0.0)
    if copy or matmul:
        return Ceilings(copy, matmul, True)
    known = device(run)
    if known is None:
        return Ceilings(0.0, 0.0, False)
    rates = {"tf32": known.matrix_tf32, "float32": known.vector_32, "float64": known.matrix_64}
    rates |= {"float8_e4m3fn": known.matrix_fp8, "int8": known.matrix_int8}
    return Ceilings(known.bandwidth, rates.get(name, known.matrix_16), False)


def products(row: Row) -> str:
    """What is multiplied: the dtype, or "tf32" where float32 is multiplied so."""
    return "tf32" if row.dtype == "float32" and "precision tf32" in row.call else row.dtype


def device(run: Run) -> devices.Device | None:
    """The known GPU of a run, None for others."""
    return next((d for d in devices.DEVICES.values() if devices.known(run.device, d.multiprocessors) == d), None)


def of_ceilings(run: Run, row: Row) -> float | None:
    """The share of the ceiling that is nearer: of the copy's bytes or of the matrix product's flops a second."""
    time, top = seconds(row), ceilings(run, row)
    if not time:
        return None
    shares = [done / time / most for done, most in ((row.bytes, top.copy), (row.flops, top.matmul)) if most]
    return max(shares, default=None)


# ---------------------------------------------------------------------------------------------------------------------
# Totals


@dataclass(frozen=True)
class Pair:
    """Our time and another's of the `rows` that both have, each as often as it stands in its network."""

    ours: float
    theirs: float
    rows: int

    @property
    def speedup(self) -> float:
        return self.theirs / self.ours


@dataclass(frozen=True)
class Total:
    """An operation of all layers of a suite that a run has, each as often as it stands in its network.

    `predicted` and `roofline` are of the rows that have a prediction. `over` has the pairs with cuDNN by memory
    format, `worst` is the row with the least speed-up. Wins and losses are beyond noise.
    """

    suite: str
    op: str
    rows: int
    ours: float | None
    predicted: float
    roofline: float
    over: dict[str, Pair]
    wins: int
    losses: int
    worst: Row | None


def totals(run: Run, ops: Sequence[str] = OPS) -> list[Total]:
    """By suite and operation, in the order of the run."""
    groups: dict[tuple[str, str], list[Row]] = {}
    for row in run.rows:
        if row.op in ops:
            groups.setdefault((row.suite, row.op), []).append(row)
    return [_total(suite, op, rows) for (suite, op), rows in groups.items()]


def _total(suite: str, op: str, rows: Sequence[Row]) -> Total:
    ours = [row for row in rows if row.seconds(OURS) is not None]
    predicted = [row for row in rows if row.predicted_seconds is not None]
    compared = [row for row in rows if speedup(row) is not None]
    over = {layout: pair for layout in LAYOUTS if (pair := _pair(rows, layout)) is not None}
    return Total(
        suite,
        op,
        len(rows),
        fsum(row.times * (row.seconds(OURS) or 0.0) for row in ours) if ours else None,
        fsum(row.times * (row.predicted_seconds or 0.0) for row in predicted),
        fsum(row.times * row.roofline_seconds for row in predicted),
        over,
        sum(verdict(row) > 0 for row in rows),
        sum(verdict(row) < 0 for row in rows),
        min(compared, key=lambda row: speedup(row) or 0.0, default=None),
    )


def _pair(rows: Iterable[Row], layout: str) -> Pair | None:
    times = [
        (row.times * ours, row.times * theirs)
        for row in rows
        if (who := cudnn(row, layout)) and (ours := row.seconds(OURS)) and (theirs := row.seconds(who))
    ]
    return Pair(fsum(a for a, _ in times), fsum(b for _, b in times), len(times)) if times else None


def whole(run: Run) -> dict[str, tuple[str, ...]]:
    """By suite the operations that make up a training step, or inference, without counting any twice."""
    there: dict[str, set[str]] = {}
    for row in run.rows:
        there.setdefault(row.suite, set()).add(row.op)
    return {suite: ("step",) if "step" in ops else tuple(op for op in OPS if op in ops) for suite, ops in there.items()}


# ---------------------------------------------------------------------------------------------------------------------
# Goals: what one kernel is to win over several


class Goal(NamedTuple):
    """`words`, and by how much rows of a suite's forward are to be quicker than the best of `rivals`.

    `calls` is what the call of a row must say, "" for all.
    """

    words: str
    suite: str
    calls: str
    rivals: tuple[str, ...]
    factor: float


GOALS = (
    Goal("deformable convolution, over torchvision", "dcnv2_resnet50", "", (TORCHVISION,), 3.0),
    Goal(
        "four filters in one launch, over four calls of cuDNN",
        "aspp_branches",
        "",
        (SEPARATE_CHANNELS_LAST, SEPARATE_CONTIGUOUS),
        1.5,
    ),
    Goal(
        "bias, shortcut and relu in the kernel, over cuDNN and pointwise kernels",
        "resnet50_fused",
        "residual",
        (POINTWISE_CHANNELS_LAST, POINTWISE_CONTIGUOUS),
        1.2,
    ),
)


class Reached(NamedTuple):
    """A row that a goal is about; `rival` is the best of the goal's that has a time, and `ratio` its time over ours.

    `predicted` is the ratio of our models' times for separate kernels and for ours.
    """

    goal: Goal
    row: Row
    rival: str | None
    ratio: float | None
    predicted: float | None


def goals(run: Run) -> list[Reached]:
    """The rows of every goal, as far as the run has them."""
    found = []
    for goal in GOALS:
        for row in run.rows:
            if row.suite == goal.suite and row.op == "fprop" and goal.calls in row.call:
                timed = [who for who in goal.rivals if row.seconds(who) is not None]
                best = min(timed, key=partial(_seconds, row), default=None)
                apart, ours = row.separate_predicted_seconds, row.predicted_seconds
                predicted = apart / ours if apart and ours else None
                found.append(Reached(goal, row, best, speedup(row, best) if best else None, predicted))
    return found


def _seconds(row: Row, who: str) -> float:
    return row.seconds(who) or 0.0


def goal_words(run: Run) -> list[str]:
    """A line for each goal of which something was measured, or made up to try it."""
    lines = []
    for goal in GOALS:
        ratios = [r.ratio for r in goals(run) if r.goal == goal and r.ratio]
        if ratios:
            met = sum(ratio >= goal.factor for ratio in ratios)
            mean = f"{geometric_mean(ratios):.2f} times as quick (geometric mean of {len(ratios)})"
            lines.append(f"{goal.words}: {mean}, {met} of {len(ratios)} reach {goal.factor:g}")
    return lines
