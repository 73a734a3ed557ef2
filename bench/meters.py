"""What makes rows of jobs, and how where there is no GPU: by a clock that is simulated, or without times."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import replace
from typing import Protocol

import torch

from triton_conv import check
from triton_conv.devices import H200, Device

from . import values
from .device_meter import ROUNDS, multiplying
from .jobs import Job, predicted_row, small
from .records import OURS, Measurement, Row
from .subjects import results, subjects


class Meter(Protocol):
    """What makes rows of jobs; `name` is the device's, `source` one of `records.SOURCES`."""

    name: str
    source: str

    def ceilings(self) -> dict[str, float]:
        """`records.Run.ceilings`; none where nothing is measured."""

    def expect(self, jobs: Sequence[Job]) -> None:
        """Begins to compile what these jobs need, in this order."""

    def row(self, job: Job) -> Row:
        """The row of a job. Raises torch.AcceleratorError where the device answers nothing any more."""


def checked_small(job: Job) -> Measurement:
    """Ours of `small(job)` on the CPU, by whatever runs there, compared with float64; no times."""
    job, where = small(job), torch.device("cpu")
    with multiplying(job):
        subject = subjects(job, ())[0]
        t = values.operands(job, subject.channels_last, where, seed=0)
        work = subject.prepared(t)
        with check.poisoned():
            found = work()
        error, wrong = values.checked(job, subject, found, values.wanted(job, t, results(job)))
    return Measurement(error=error if math.isfinite(error) else None, note=wrong)


class SimulatedMeter:
    """A device on which ours takes its predicted time and others some multiple of the roofline, by made-up factors.

    Values are checked: ours, of a smaller layer. The same seed gives the same rows.
    """

    source = "simulated"

    def __init__(self, device: Device = H200, seed: int = 0):
        self.device, self.seed, self.name = device, seed, device.name

    def ceilings(self) -> dict[str, float]:
        d = self.device
        share = 0.8  # made up, as everything here
        rates = {"bfloat16": d.matrix_16, "float16": d.matrix_16, "tf32": d.matrix_tf32, "float32": d.vector_32}
        return {"copy": share * d.bandwidth, **{f"matmul {name}": share * rate for name, rate in rates.items()}}

    def expect(self, jobs: Sequence[Job]) -> None:
        pass

    def row(self, job: Job) -> Row:
        row, ours = predicted_row(job, self.device), checked_small(job)
        if ours.note:
            return replace(row, measured={OURS: ours})
        measured = {}
        for subject in subjects(job):
            draw = random.Random(f"{self.seed} {row.name} {subject.who}")
            if subject.who == OURS:
                seconds, error = (
                    (row.predicted_seconds or 2 * row.roofline_seconds) * draw.uniform(0.9, 1.4),
                    ours.error,
                )
            else:
                seconds, error = row.roofline_seconds * draw.uniform(1.1, 2.5) + 5e-6, None
            measured[subject.who] = Measurement(
                seconds=seconds,
                spread=draw.uniform(0.001, 0.02),
                rounds=ROUNDS,
                host_seconds=draw.uniform(1e-5, 8e-5),
                peak_bytes=row.workspace_bytes if subject.who == OURS else 2**20,
                error=error,
                note="simulated",
            )
        return replace(row, measured=measured)


class PredictedMeter:
    """Measures nothing: predictions, and values of a smaller layer by whatever runs on the CPU."""

    source = "predicted"

    def __init__(self, device: Device = H200):
        self.device, self.name = device, device.name

    def ceilings(self) -> dict[str, float]:
        return {}

    def expect(self, jobs: Sequence[Job]) -> None:
        pass

    def row(self, job: Job) -> Row:
        ours = checked_small(job)
        note = ours.note or "not measured: there is no GPU; of a smaller layer, values are right"
        return replace(predicted_row(job, self.device), measured={OURS: replace(ours, note=note)})
