"""Stage c: the heaviest layers of every suite, against everyone else; the rows are in `bench.json`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from statistics import geometric_mean
from typing import Any

from .. import records, summary
from ..jobs import Job, jobs
from ..records import OURS, Row
from ..runner import Meter, run
from . import meters, record
from .record import Facts
from .units import Context, Unit

NAME = "c"
ABOUT = "the heaviest layers of every suite, against cuDNN"
LIMIT = 470.0

FILE = "bench.json"
_SIMULATED = ("resnet50", "mobilenetv3", "upsampling", "mamba")  # of each, one layer


def units(context: Context) -> Iterator[Unit]:
    groups = grouped(wanted(context))
    meter = _Expecting(context, [job for group in groups for job in group])
    for group in groups:
        yield Unit(f"{group[0].suite}: {group[0].name}", partial(_measure, group, meter, context), 180.0)
    yield Unit("wins and losses", partial(_summary, context))


def wanted(context: Context) -> list[Job]:
    """What there is to measure."""
    if not context.simulate:
        return jobs(quick=True)
    found = []
    for suite in _SIMULATED:
        found += grouped(jobs([suite], ("fprop", "wgrad"), quick=True))[0]
    return found


def grouped(found: Sequence[Job]) -> list[list[Job]]:
    """The operations of a layer, which have references in common."""
    groups: dict[tuple[str, str], list[Job]] = {}
    for job in found:
        groups.setdefault((job.suite, job.name), []).append(job)
    return list(groups.values())


class _Expecting:
    """A meter that compiles all jobs from the first that is asked for ahead, not only those of one run."""

    def __init__(self, context: Context, all_jobs: Sequence[Job]):
        self._context, self._jobs = context, all_jobs
        self._meter: Meter | None = None

    def of(self, first: Job) -> Meter:
        """The meter; the first time it begins to compile."""
        if self._meter is None:
            self._meter = meters.of(self._context)
            self._meter.expect(self._jobs[self._jobs.index(first) :])
        return _Prepared(self._meter)


class _Prepared:
    """A meter that expects already what will be asked of it."""

    def __init__(self, meter: Meter):
        self._meter, self.name, self.source = meter, meter.name, meter.source

    def ceilings(self) -> dict[str, float]:
        return self._meter.ceilings()

    def expect(self, jobs: Sequence[Job]) -> None:
        pass

    def row(self, job: Job) -> Row:
        return self._meter.row(job)


def _measure(group: Sequence[Job], meter: _Expecting, context: Context) -> Facts:
    command = "python -m bench.evidence --stages c"
    evidence = record.read(context.out)
    found = run(
        group,
        meter.of(group[0]),
        command,
        context.out / FILE,
        max(context.left(), 0.0),
        commit=evidence.commit if evidence else None,
    )
    names = {job.row_name for job in group}
    rows = [row for row in found.rows if row.name in names]
    if not rows:
        return {"ok": True, "words": "the time was up", "unfinished": True}
    broken = [
        f"{row.op}: {row.measured[OURS].note}" for row in rows if row.seconds(OURS) is None and OURS in row.measured
    ]
    words = ", ".join(f"{row.op} {_said(row)}" for row in rows)
    facts: Facts = {"ok": not broken, "words": f"{words}; {'; '.join(broken)}" if broken else words, **counts(rows)}
    return facts if len(rows) == len(names) else {**facts, "unfinished": True}


def _said(row: Row) -> str:
    ours, speedup = row.seconds(OURS), summary.speedup(row)
    if ours is None:
        return "-"
    return f"{ours * 1e6:.3g} us" if speedup is None else f"{ours * 1e6:.3g} us, {speedup:.2f}x cuDNN"


def counts(rows: Sequence[Row]) -> dict[str, Any]:
    """How many rows there are, and how many are beyond noise quicker or slower than cuDNN; the mean is geometric."""
    ratios = [ratio for row in rows if (ratio := summary.speedup(row))]
    mean = geometric_mean(ratios) if ratios else None
    verdicts = [summary.verdict(row) for row in rows]
    return {"rows": len(rows), "wins": verdicts.count(1), "losses": verdicts.count(-1), "mean_speedup": mean}


def _summary(context: Context) -> Facts:
    path = context.out / FILE
    if not path.exists():
        return {"ok": True, "words": "nothing was measured", "unfinished": True}
    rows = records.read(path).rows
    suites = {
        suite: counts([row for row in rows if row.suite == suite]) for suite in dict.fromkeys(r.suite for r in rows)
    }
    total = counts(rows)
    mean = f", {total['mean_speedup']:.2f}x on the mean" if total["mean_speedup"] else ""
    words = f"{total['rows']} rows: {total['wins']} quicker than cuDNN, {total['losses']} slower{mean}"
    facts: Facts = {"ok": True, "words": words, "suites": suites, **total}
    missing = {job.row_name for job in wanted(context)} - {row.name for row in rows}
    return {**facts, "unfinished": True} if missing else facts
