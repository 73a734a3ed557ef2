"""Stage d: what we lose most at is tuned and measured anew; `bench.json` keeps the rows of configs as they ship."""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import asdict
from functools import partial
from pathlib import Path

from triton_conv import explain, stored
from triton_conv.devices import H200
from triton_conv.tuning.compound import bare
from triton_conv.tuning.layers import Layer
from triton_conv.tuning.measure import Bench, CudaBench, SimulatedBench
from triton_conv.tuning.store import Store
from triton_conv.tuning.suites import fixed
from triton_conv.tuning.tune import Budget, Task, tune_one

from .. import records, summary
from ..jobs import Job
from ..records import OPS, OURS, Row
from ..runner import CudaMeter, Meter
from . import meters, quick_bench
from .packed import pack, unpack
from .record import Facts
from .units import Context, Unit

NAME = "d"
ABOUT = "the worst losses tuned"
LIMIT = 470.0

PACKED = "store.tgz"
_CUDNN = tuple(who for names in summary.LAYOUTS.values() for who in names)
_MOST, _SECONDS = 16, 60.0  # problems, and what one may take
_FEW, _CANDIDATES = 2, 6  # in a simulation


def units(context: Context) -> Iterator[Unit]:
    worst = worst_of(context)
    if not worst:
        yield Unit("no rows", lambda: {"ok": True, "words": "stage c has measured nothing yet", "unfinished": True})
        return
    tuner = _Tuner(context)
    for job, row in worst:
        yield Unit(f"{job.suite}: {job.name} {job.op}", partial(tuner.tuned, job, row), 4 * _SECONDS)


def _one_problem(layer: Layer) -> bool:
    """Whether an operation of it is a problem that is tuned here: not branches, deformable ones and chunks."""
    return not fixed(layer) and not {"branches", "deform", "context"} & layer.options.keys()


def worst_of(context: Context) -> list[tuple[Job, Row]]:
    """Jobs of one kernel and their rows: those lost by most to cuDNN, then those furthest from the roofline."""
    path = context.out / quick_bench.FILE
    rows = {row.name: row for row in records.read(path).rows} if path.exists() else {}
    found = [(job, rows[job.row_name]) for job in quick_bench.wanted(context) if job.row_name in rows]
    found = [(job, row) for job, row in found if _one_problem(job.layer) and job.op != "step" and row.seconds(OURS)]
    found.sort(key=lambda one: _badness(one[1]), reverse=True)
    return found[: _FEW if context.simulate else _MOST]


def _badness(row: Row) -> tuple[bool, float]:
    ours, theirs = row.seconds(OURS) or 0.0, cudnn(row)
    lost = theirs is not None and ours > theirs
    return lost, ours / theirs if lost and theirs else ours / row.roofline_seconds


def cudnn(row: Row) -> float | None:
    """Seconds of the quickest way to use cuDNN."""
    found = [row.seconds(who) for who in _CUDNN]
    return min((seconds for seconds in found if seconds is not None), default=None)


class _Tuner:
    """Tunes into a store of its own, in which look-ups of this process look."""

    def __init__(self, context: Context):
        self.context = context
        self._place: Path | None = None
        self._bench: Bench | None = None
        self._meter: Meter | None = None

    def tuned(self, job: Job, before: Row) -> Facts:
        """Facts of a job: its row as it was, and as it is with the config that was found."""
        directory = self._begun()
        assert self._bench is not None
        assert self._meter is not None
        layer, device = bare(job.layer), self._bench.device
        problems = list(explain.problems(layer.input, layer.weight, device=device, **layer.options).values())
        task = Task(f"{job.suite} {job.name}", problems[OPS.index(job.op)])
        seconds = max(min(_SECONDS, self.context.left() / 2), 1.0)
        budget = Budget(candidates=_CANDIDATES) if self.context.simulate else Budget(seconds)
        try:
            result = tune_one(task, self._bench, Store(directory), budget)
        finally:
            pack(directory, self.context.out / PACKED)
        facts: Facts = {"before": before.seconds(OURS), "cudnn": cudnn(before), "before_config": before.config}
        facts |= {"kernel": result.kernel, "config": str(result.config), "tried": result.tried, "wrong": result.wrong}
        facts |= {"tuned": result.seconds, "untuned": result.default_seconds, "faults": list(result.faults)}
        if result.skipped:
            return {"ok": False, "words": result.skipped, **facts}
        stored.forget()
        self._meter.expect([job])
        after = self._meter.row(job)
        facts |= {"after": after.seconds(OURS), "row": asdict(after)}
        if not after.seconds(OURS):
            return {"ok": False, "words": after.measured[OURS].note or "it was not measured anew", **facts}
        rival = cudnn(after)
        words = f"{1e6 * facts['before']:.3g} us became {1e6 * facts['after']:.3g} us after {result.tried} candidates"
        words += f" ({result.wrong} wrong)" if result.wrong else ""
        return {"ok": True, "words": words if rival is None else f"{words}, cuDNN {1e6 * rival:.3g} us", **facts}

    def _begun(self) -> Path:
        """The directory of the store, with what an earlier process had found; bench and meter are there too."""
        if self._place is None:
            self._place = Path(tempfile.mkdtemp(prefix="store-"))
            packed = self.context.out / PACKED
            if packed.exists():
                try:
                    unpack(packed, self._place)
                except (OSError, ValueError) as error:
                    print(f"{error}; a new one begins", file=sys.stderr)
            os.environ["TRITON_CONV_CACHE"] = str(self._place)
            stored.forget()
            if self.context.simulate:
                self._bench = SimulatedBench(H200, noise=0.01)
                self._meter = meters.of(self.context)
            else:
                index = self.context.device.index or 0
                self._bench, self._meter = CudaBench(index), CudaMeter(index, _CUDNN)
        return self._place
