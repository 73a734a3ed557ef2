"""Measures jobs one after the other into a run, which is written as it grows and taken up where it ended."""

from __future__ import annotations

import platform
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from datetime import datetime, timezone
from pathlib import Path

import torch
import triton

from triton_conv.tuning import on_device
from triton_conv.version import VERSION

from . import records
from .device_meter import CudaMeter as CudaMeter
from .jobs import Job
from .meters import Meter as Meter
from .meters import PredictedMeter as PredictedMeter
from .meters import SimulatedMeter as SimulatedMeter
from .records import Row, Run

_BETWEEN_WRITES = 2.0  # seconds: hundreds of rows take some milliseconds to write


def run(
    jobs: Sequence[Job],
    meter: Meter,
    command: str = "",
    out: Path | None = None,
    seconds: float | None = None,
    progress: Callable[[Row], None] | None = None,
) -> Run:
    """The rows of jobs, in their order, and those that `out` has besides.

        >>> from bench.jobs import jobs
        >>> found = run(jobs(["resnet50_batch1"], ["fprop"], quick=True), PredictedMeter())
        >>> found.source, len(found.rows)
        ('predicted', 3)

    `out` is written as rows come, every few seconds, and at the end, also if that is an exception. Rows and ceilings
    that it already has from this commit, device and source are kept and not measured again. No row is begun after
    `seconds`. `progress` is told each new row. Raises ValueError where `out` is no run, torch.AcceleratorError where
    the device has failed.
    """
    start = time.monotonic()
    fresh = Run(
        device=meter.name,
        source=meter.source,
        time=datetime.now(timezone.utc).isoformat(timespec="seconds"),
        commit=on_device.commit(),
        command=command,
        versions=versions(),
    )
    before = records.read(out) if out is not None and out.exists() else fresh
    same = [(r.device, r.source, r.commit) for r in (before, fresh)]
    kept = before if same[0] == same[1] else fresh
    rows = {row.name: row for row in kept.rows}
    waiting = [job for job in jobs if job.row_name not in rows]
    places = {job.row_name: place for place, job in enumerate(jobs)}
    ceilings, written = dict(kept.ceilings), time.monotonic()

    def found() -> Run:
        ordered = sorted(rows.values(), key=lambda row: places.get(row.name, len(places)))
        return replace(fresh, ceilings=ceilings, rows=tuple(ordered))

    try:
        if waiting:
            meter.expect(waiting)
            ceilings = ceilings or meter.ceilings()
        for job in waiting:
            if seconds is not None and time.monotonic() - start > seconds:
                break
            row = meter.row(job)
            rows[row.name] = row
            if progress is not None:
                progress(row)
            if out is not None and time.monotonic() - written > _BETWEEN_WRITES:
                records.write(found(), out)
                written = time.monotonic()
    finally:
        if out is not None:
            records.write(found(), out)
    return found()


def versions() -> dict[str, str]:
    """What a run is made with, by name; "none" for what is not there."""
    gpu = torch.cuda.is_available()
    return {
        "triton_conv": VERSION,
        "torch": torch.__version__,
        "triton": triton.__version__,
        "python": platform.python_version(),
        "cuda": torch.version.cuda or "none",
        "cudnn": str(torch.backends.cudnn.version() or "none") if gpu else "none",
        "driver": on_device.driver() if gpu else "none",
    }
