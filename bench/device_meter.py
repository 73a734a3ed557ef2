"""Jobs become rows on a device: everybody checked, then timed in turns.

What a row is expected to cost on a GPU, where nobody has timed it yet: nothing for our kernels, which other processes
compile ahead; the first call of each subject, in which cuDNN tries its algorithms (0.05 to 0.5 s); a float64 reference
and comparisons with it (0.01 to 0.5 s); captures, and 15 rounds of samples of 1 ms or of one pass over the sets,
whichever is longer, for four subjects (0.1 to 2 s). A quick run has some 270 rows of about a second: five to seven
minutes.
"""

from __future__ import annotations

import math
import os
import warnings
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from statistics import median
from typing import NamedTuple, Protocol, TypeVar

import torch
from torch import Tensor

from triton_conv import backends, check, execute
from triton_conv.devices import Device
from triton_conv.explain import AnyPlan
from triton_conv.tuning import audit, on_device
from triton_conv.tuning.ahead import Ahead
from triton_conv.tuning.code import TARGETS
from triton_conv.tuning.rounds import Timing, all_rounds

from . import ceilings as ideal
from . import values
from .jobs import Job, plans, predicted_row
from .records import OURS, Measurement, Row
from .subjects import DEFAULT, Operands, Subject, Work, results, subjects

T = TypeVar("T")

ROUNDS, LEAST = 15, 5  # samples of every subject; fewer where they take longer than `SECONDS` together
SECONDS = 2.0
IMPRECISE = 8.0  # tolerances by which others may be off and still are timed: some algorithms of theirs round more
LONG = 20e-3  # seconds of a work beside which its launches are nothing: it is timed as it is
VERY_LONG = 0.1  # seconds of a work that is not repeated over several sets

HOST_CALLS, HOST_ROUNDS = 20, 5  # a device's queue has room for more
HOST_SECONDS = 20e-3  # of the device, which then waits in it


class Probe(on_device.Clock, Protocol):
    """A clock that knows memory too."""

    def peak_bytes(self, work: Work) -> int:
        """The most memory that work has taken at a time, beside what was there before and its results."""


class CudaProbe(on_device.CudaClock):
    """Asks PyTorch's allocator."""

    def peak_bytes(self, work: Work) -> int:
        torch.cuda.synchronize(self.device)
        torch.cuda.reset_peak_memory_stats(self.device)
        before = torch.cuda.memory_allocated(self.device)
        results = work()
        torch.cuda.synchronize(self.device)
        kept = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in results}
        return max(torch.cuda.max_memory_allocated(self.device) - before - sum(kept.values()), 0)


class _Checked(NamedTuple):
    """A subject whose values are right, or nearly so, and what is known of it before it is timed."""

    subject: Subject
    error: float
    peak_bytes: int
    host_seconds: float
    note: str = ""


class DeviceMeter:
    """Measures on the device that holds the tensors, by this probe.

    `who` names those that we are compared with, of `records.OTHERS`; None: all but torch.compile.
    """

    source = "measured"

    def __init__(self, where: torch.device, device: Device, probe: Probe, who: Collection[str] | None = None):
        self.where, self.device, self.probe = where, device, probe
        self.who = DEFAULT if who is None else tuple(who)
        self.name = device.name
        self.ahead: Ahead | None = None
        self._errors: dict[AnyPlan, str] = {}
        self._known: tuple[object, dict[str, Tensor]] = (None, {})

    def ceilings(self) -> dict[str, float]:
        return ideal.ceilings(self.where, self.probe)

    def expect(self, jobs: Sequence[Job]) -> None:
        if self.ahead is not None:
            self.ahead.expect(dict.fromkeys(p for job in jobs for p in plans(job, self.device)))

    def row(self, job: Job) -> Row:
        with multiplying(job):
            row = predicted_row(job, self.device)
            try:
                return replace(row, measured=self._measured(job))
            finally:
                self.probe.emptied()

    def _measured(self, job: Job) -> dict[str, Measurement]:
        found: dict[str, Measurement] = {}
        right: list[_Checked] = []
        operands: dict[bool, Operands] = {}
        everyone = subjects(job, self.who)
        for subject in everyone:
            outcome = self._attempt(partial(self._checked, job, subject, operands))
            if isinstance(outcome, _Checked):
                right.append(outcome)
            else:
                found[subject.who] = outcome
        operands.clear()
        self._make_room()
        for c, timed in zip(right, self._timed(job, right), strict=True):
            note = "; ".join(filter(None, (timed.note, c.note)))
            found[c.subject.who] = replace(
                timed, error=c.error, peak_bytes=c.peak_bytes, host_seconds=c.host_seconds, note=note
            )
        return {s.who: found[s.who] for s in everyone}

    def _attempt(self, work: Callable[[], T]) -> T | Measurement:
        """What work returns, or a measurement that says why there is none."""
        try:
            return work()
        except torch.OutOfMemoryError as error:
            note = f"out of memory: {audit.words(error)}"
        except Exception as error:  # whatever compilers, launches and libraries raise is a finding
            note = f"failed: {audit.words(error)}"
        self.probe.emptied()
        self._check_device()
        return Measurement(note=note)

    def _check_device(self) -> None:
        """Raises torch.AcceleratorError where the device answers nothing any more."""
        self.probe.seconds(lambda: None)

    # -----------------------------------------------------------------------------------------------------------------
    # Values

    def _checked(self, job: Job, subject: Subject, operands: dict[bool, Operands]) -> _Checked | Measurement:
        if subject.who == OURS:
            why = "; ".join(filter(None, map(self._uncompiled, plans(job, self.device))))
            if audit.DIED in why:  # and would take this process with it; of other errors the launch tells
                return Measurement(note=f"failed: {why}")
        last = subject.channels_last
        if last not in operands:
            operands[last] = values.operands(job, last, self.where, seed=0)
        work = subject.prepared(operands[last])
        # others run the algorithms that they will be timed with, which poisoned memory would forbid
        with check.poisoned() if subject.who == OURS else nullcontext():
            found = work()
        error, wrong = values.checked(job, subject, found, self._wants(job, operands[last]))
        del found
        if wrong and (subject.who == OURS or not error <= IMPRECISE):
            return Measurement(error=error if math.isfinite(error) else None, note=wrong)
        return _Checked(subject, error, self.probe.peak_bytes(work), host_seconds(self.probe, work), wrong)

    def _wants(self, job: Job, t: Operands) -> dict[str, Tensor]:
        """References of the job, of those kept from the job before it of the same layer where these are there."""
        # operands of kinds may differ from one operation to the next
        key = str((job.layer.input, job.layer.weight, job.layer.options, job.kind and job.op))
        wants = self._known[1] if self._known[0] == key else {}
        self._known = key, wants
        missing = [name for name in results(job) if name not in wants]
        if missing:
            wants |= values.wanted(job, t, missing)
        return wants

    def _make_room(self) -> None:
        """Keeps references if they are little: they may take seconds."""
        self.probe.emptied()
        held = sum(t.numel() * t.element_size() for t in self._known[1].values())
        if held > self.probe.free_bytes() // 4:
            self._known = None, {}
            self.probe.emptied()

    def _uncompiled(self, p: AnyPlan) -> str:
        """Why a plan does not compile, once other processes have tried."""
        if self.ahead is None:
            return ""
        if p not in self._errors:
            try:
                self._errors[p] = "; ".join(row.error for row in self.ahead.rows(p) if row.error)
            except RuntimeError as error:  # processes that cannot start: kernels are compiled in this one
                warnings.warn(f"nothing is compiled ahead: {error}", stacklevel=2)
                self.ahead = None
                return ""
        return self._errors[p]

    # -----------------------------------------------------------------------------------------------------------------
    # Time

    def _timed(self, job: Job, right: Sequence[_Checked]) -> list[Measurement]:
        """In turns over as many sets of operands as L2 must forget; over fewer, then alone, where memory is short."""
        count = self._sets(job, right)
        while right:
            try:
                return self._together(job, [c.subject for c in right], count)
            except torch.OutOfMemoryError:
                if count == 1:
                    break
            except Exception:  # of one of them, which will be told when it is alone
                break
            count = max(count // 2, 1)
            self._forget()
        found = []
        for c in right:
            self._forget()
            self._check_device()
            found.append(self._attempt(partial(self._alone, job, c.subject)))
        return found

    def _alone(self, job: Job, subject: Subject) -> Measurement:
        (found,) = self._together(job, [subject], 1)
        return found

    def _sets(self, job: Job, right: Sequence[_Checked]) -> int:
        size = values.bytes_of(job)
        # a set of each memory format, and of each subject its results and what it keeps of a forward pass
        beside = size * (len({c.subject.channels_last for c in right}) + 2 * len(right))
        free = max(self.probe.free_bytes() - sum(c.peak_bytes for c in right), 0)
        return on_device.rotation(size, self.device.l2_bytes, free * size // max(beside, 1))

    def _together(self, job: Job, those: Sequence[Subject], count: int) -> list[Measurement]:
        formats = {s.channels_last for s in those}
        sets = {last: [values.operands(job, last, self.where, seed=seed) for seed in range(count)] for last in formats}
        samplers, notes = [], []
        for subject in those:
            sampler, note = self._sampler([subject.prepared(t) for t in sets[subject.channels_last]])
            samplers.append(sampler)
            notes.append(note)
        timings = all_rounds(samplers, ROUNDS, self.probe.now, SECONDS, LEAST)
        return [_measurement(t, note) for t, note in zip(timings, notes, strict=True)]

    def _sampler(self, works: Sequence[Work]) -> tuple[Callable[[], float], str]:
        """(samples of seconds of one work, what is to be said of them)."""
        note = ""
        works[0]()
        seconds = self.probe.seconds(works[0])
        if seconds < LONG:
            try:
                return on_device.repeated(self.probe, works), ""
            except torch.OutOfMemoryError:
                raise
            except Exception as error:
                note = f"timed without a CUDA graph: {audit.words(error)}"
            self._check_device()
        works = works[:1] if seconds > VERY_LONG else works
        times = on_device.repeats(seconds * len(works), len(works))
        batch = partial(on_device.in_turn, works, times)
        return lambda: self.probe.seconds(batch) / (times * len(works)), note

    def _forget(self) -> None:
        self._known = None, {}
        self.probe.emptied()


class CudaMeter(DeviceMeter):
    """Measures on a CUDA device, by its index. Raises RuntimeError where there is none."""

    def __init__(self, index: int = 0, who: Collection[str] | None = None):
        if not torch.cuda.is_available():
            raise RuntimeError("there is no CUDA device to measure on")
        where = torch.device("cuda", index)
        device = execute.device_of(where)
        assert device is not None
        super().__init__(where, device, CudaProbe(where), who)
        if device.capability in TARGETS:  # two processors are left to measure with
            self.ahead = Ahead(device.capability, max(len(os.sched_getaffinity(0)) - 2, 1))


def host_seconds(probe: Probe, work: Work) -> float:
    """Of the host for one call: calls that the device has room to queue are not waited for."""
    seconds = probe.seconds(work)
    calls = max(1, min(HOST_CALLS, int(HOST_SECONDS / max(seconds, 1e-9))))
    samples = []
    for _ in range(HOST_ROUNDS if calls > 1 else 2):
        start = probe.now()
        for _ in range(calls):
            work()
        samples.append((probe.now() - start) / calls)
        probe.seconds(lambda: None)  # waits for the device
    return median(samples)


def _measurement(t: Timing, note: str) -> Measurement:
    return Measurement(t.seconds, t.spread, t.rounds, note=note)


@contextmanager
def multiplying(job: Job) -> Iterator[None]:
    """Within it, everybody multiplies float32 as the job says, or as exactly as there is."""
    with ExitStack() as stack:
        precision = ""
        if job.dtype == "float32":
            precision = "tf32" if job.layer.options.get("precision") == "tf32" else "ieee"
            stack.enter_context(ideal.matmul_precision(precision))
        stack.enter_context(backends.cudnn(precision=precision))
        yield
