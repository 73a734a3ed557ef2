"""Stage c: the heaviest layers of every suite, against everyone else; the rows are in `bench.json`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from statistics import geometric_mean
from typing import Any

from .. import records, summary
from ..jobs import Job, jobs, plans
from ..records import OURS, Row
from ..runner import Meter, run
from . import checking, meters, record
from .record import Facts
from .units import Context, Unit, shunned

NAME = "c"
ABOUT = "the heaviest layers of every suite, against cuDNN"
LIMIT = 470.0

FILE = "bench.json"
_HANG = 100.0  # seconds that a row is far from taking, its part of compiling included
# Of each, one layer.
_SIMULATED = ("resnet50", "mobilenetv3", "upsampling", "mamba")
_SIMULATED_COMPOUND = ("resnet50_fused", "aspp_branches", "dcnv2_resnet50", "wan_streaming")


def units(context: Context) -> Iterator[Unit]:
    groups = turned(grouped(wanted(context)))
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
    return found + [jobs([suite], ("fprop",))[0] for suite in _SIMULATED_COMPOUND]


def grouped(found: Sequence[Job]) -> list[list[Job]]:
    """The operations of a layer, which have references in common."""
    groups: dict[tuple[str, str], list[Job]] = {}
    for job in found:
        groups.setdefault((job.suite, job.name), []).append(job)
    return list(groups.values())


def turned(groups: Sequence[list[Job]]) -> list[list[Job]]:
    """The heaviest layer of every suite, then the second ones: whenever time is up, all suites have as many.

    The first suite comes first as a whole.
    """
    seen: Counter[str] = Counter()
    keys = list[tuple[int, int]]()
    for group in groups:
        suite = group[0].suite
        keys.append((seen[suite] if suite != groups[0][0].suite else 0, len(keys)))
        seen[suite] += 1
    return [groups[place] for _, place in sorted(keys)]


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
        return _Prepared(self._meter, self._context)


class _Prepared:
    """A meter that expects already what will be asked of it."""

    def __init__(self, meter: Meter, context: Context):
        self._meter, self._context, self.name, self.source = meter, context, meter.name, meter.source

    def ceilings(self) -> dict[str, float]:
        return self._meter.ceilings()

    def expect(self, jobs: Sequence[Job]) -> None:
        pass

    def row(self, job: Job) -> Row:
        with checking.watched(self._context, _HANG):
            return self._meter.row(job)


def _measure(group: Sequence[Job], meter: _Expecting, context: Context) -> Facts:
    command = "python -m bench.evidence --stages c"
    evidence = record.read(context.out)
    kernels = {plan.kernel for job in group for plan in plans(job, checking.device_of(context))}
    for kernel in kernels.intersection(evidence.deadly() if evidence else ()):
        return shunned(kernel)
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
    who = summary.rival(row) or ""
    name = "cuDNN" if "cudnn" in who else who
    return f"{ours * 1e6:.3g} us" if speedup is None else f"{ours * 1e6:.3g} us, {speedup:.2f}x {name}"


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
    places = {job.row_name: place for place, job in enumerate(wanted(context))}
    found = records.read(path)
    rows = sorted(found.rows, key=lambda row: places.get(row.name, len(places)))
    records.write(replace(found, rows=tuple(rows)), path)
    suites = {
        suite: counts([row for row in rows if row.suite == suite]) for suite in dict.fromkeys(r.suite for r in rows)
    }
    total = counts(rows)
    mean = f", {total['mean_speedup']:.2f}x on the mean" if total["mean_speedup"] else ""
    words = f"{total['rows']} rows: {total['wins']} quicker than cuDNN or torchvision, {total['losses']} slower{mean}"
    goals = summary.goal_words(found)
    words = "; ".join([words, *goals])
    facts: Facts = {"ok": True, "words": words, "suites": suites, "goals": goals, **total}
    missing = set(places) - {row.name for row in rows}
    return {**facts, "unfinished": True} if missing else facts
