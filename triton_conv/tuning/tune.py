"""Tuning a problem: its candidates are checked, measured in turns, and kept as they are measured."""

from __future__ import annotations

import math
import warnings
from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from time import monotonic
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, runtime_checkable

import torch

from .. import execute, key, stored
from ..config import KernelConfig
from ..devices import Device
from ..stored import Candidate, Entry
from . import audit, subject
from .measure import Bench
from .subject import AnyProblem

if TYPE_CHECKING:
    from .store import Store

_TOGETHER = 12  # candidates whose rounds are interleaved, beside the best so far
_FINALISTS = 8  # of all candidates, measured once more beside each other
_NEAR = 1.1  # times the best time: what other rounds, at another temperature, may turn around


class Task(NamedTuple):
    """A problem to tune, and what to call it: the name of a layer, say."""

    label: str
    problem: AnyProblem


@dataclass(frozen=True)
class Budget:
    """Of one task: seconds, after which no further candidates are begun, and candidates. None is no limit.

    The configs of the rules are measured in any case.
    """

    seconds: float | None = None
    candidates: int | None = None

    def __post_init__(self) -> None:
        if self.seconds is not None and not self.seconds >= 0:
            raise ValueError(f"seconds must be 0 or more, but got {self.seconds}")
        if self.candidates is not None and self.candidates < 1:
            raise ValueError(f"candidates must be 1 or more, but got {self.candidates}")


@dataclass(frozen=True)
class Result:
    """What is known of a task: the winner, its `seconds` with the copies around its kernel, which are predicted.

    `default_seconds` are those of what would run without tuning, `spread` is the winner's, `rival` others' seconds by
    name. Of `tried` candidates, old ones included, `wrong` had wrong values, each with its words in `faults`.
    `skipped` says why nothing was measured, if so; `kernel` and `config` are then the rules', or "" and None where no
    kernel can run it.
    """

    task: Task
    kernel: str
    config: KernelConfig | None
    seconds: float | None
    default_seconds: float | None
    spread: float
    rival: Mapping[str, float]
    tried: int
    wrong: int
    skipped: str = ""
    faults: tuple[str, ...] = ()


def tasks_of(calls: Iterable[execute.Call], device: Device, label: str = "") -> list[Task]:
    """The problems of recorded calls, each once, in the order in which they first occur.

    Calls that launch no kernel are left out: empty ones, and, with a warning, complex ones, which are made of real
    ones, and dtypes that only plain PyTorch computes.
    """
    found: dict[AnyProblem, Task] = {}
    left_out: Counter[str] = Counter()
    for call in calls:
        try:
            problem = execute.problem_of(call, device)
        except NotImplementedError:
            left_out[str(call.a.dtype).removeprefix("torch.")] += 1
            continue
        g = problem.geometry
        if min(*g.shape("x"), *g.shape("w"), *g.shape("y")) > 0:
            found.setdefault(problem, Task(label or f"{problem.role.value} {g}", problem))
    if left_out:
        words = ", ".join(f"{count} of {dtype}" for dtype, count in sorted(left_out.items()))
        warnings.warn(f"convolutions without kernels to tune are left out: {words}", stacklevel=2)
    return list(found.values())


def tune_one(task: Task, bench: Bench, store: Store, budget: Budget = Budget(), again: bool = False) -> Result:
    """The result of a task, whose candidates are in the store as soon as they are measured.

    What the store has of the same kernel source is not measured `again` unless so asked. Raises torch.AcceleratorError
    where a candidate broke the device, which is then in the store as failed: a new process goes on with the others.
    """
    kind = subject.of(task.problem)
    try:
        with stored.hidden():
            rules = kind.every(task.problem)
    except (NotImplementedError, RuntimeError) as error:
        return _skipped(task, str(error))
    session = _Session(task.problem, bench, store, again)
    chosen = kind.choice(rules)
    tuned = [p for p in kind.every(task.problem) if all(p.config != rule.config for rule in rules)]
    start = monotonic()
    waiting = [*rules, *tuned, *kind.plans(task.problem, rules)[len(rules) :]]
    waiting = list({(p.kernel, kind.place(p), p.config): p for p in waiting}.values())
    if budget.candidates is not None:
        waiting = waiting[: max(budget.candidates, len(rules))]
    session.expect(waiting)
    try:
        size = len(rules)
        while waiting and (size < _TOGETHER or budget.seconds is None or monotonic() - start < budget.seconds):
            session.measure(waiting[:size])
            waiting, size = waiting[size:], _TOGETHER
        session.finish()
    finally:
        session.expect(())
    stored.forget()
    return session.result(task, chosen)


def tune(
    tasks: Sequence[Task],
    bench: Bench,
    store: Store,
    budget: Budget = Budget(),
    progress: Callable[[Result], None] | None = None,
    deadline: float | None = None,
    again: bool = False,
) -> list[Result]:
    """The results of tasks, one after the other; `progress` is told each.

    No task is begun after `deadline`, in seconds of time.monotonic, and the one before it ends there: those left are
    results that say so.
    """
    results = []
    for task in tasks:
        left = math.inf if deadline is None else deadline - monotonic()
        if left <= 0:
            result = _skipped(task, "the time of the sweep was up")
        else:
            seconds = min(left, math.inf if budget.seconds is None else budget.seconds)
            of_task = Budget(None if seconds == math.inf else seconds, budget.candidates)
            result = tune_one(task, bench, store, of_task, again)
        results.append(result)
        if progress is not None:
            progress(result)
    return results


_Known = dict[KernelConfig, Candidate]


class _Session:
    """The measurements of one problem: what the store had, and what is added to it."""

    def __init__(self, problem: AnyProblem, bench: Bench, store: Store, again: bool):
        self.problem, self.bench, self.store, self.again = problem, bench, store, again
        self.kind = subject.of(problem)
        self.rivals: dict[str, float] | None = None
        self.measured = False
        self.plans: dict[tuple[str, Hashable, KernelConfig], Any] = {}
        self.known: dict[tuple[str, Hashable], _Known] = {}
        self.faults: list[str] = []

    def expect(self, waiting: Sequence[Any]) -> None:
        """Tells a bench that compiles ahead what will be measured."""
        if isinstance(self.bench, _Expecting):
            self.bench.expect([p for p in waiting if self._new(p)])

    def measure(self, group: Sequence[Any]) -> None:
        """Checks and measures what is not known of the group, beside the best of what is."""
        right = [p for p in group if self._new(p) and self._right(p)]
        if right:
            best = self._best()
            self._time([*([best] if best is not None and best not in right else []), *right])

    def _new(self, p: Any) -> bool:
        self.plans[p.kernel, self.kind.place(p), p.config] = p
        return self.again or p.config not in self._known(p)

    def finish(self) -> None:
        """Measures those that are nearly the quickest once more beside each other, if anything was measured."""
        if not self.measured:
            return
        timed = [(self._seconds(p), key.simplicity(p.config), p) for p in self._timed()]
        least = min((seconds for seconds, _, _ in timed), default=0.0)
        near = [p for seconds, _, p in sorted(timed, key=lambda one: one[:2]) if seconds <= _NEAR * least]
        if len(near) > 1:
            self._time(near[:_FINALISTS])

    def result(self, task: Task, chosen: Any) -> Result:
        """Of the ways' winners the quickest, against what the rules had chosen."""
        winners = []
        for (kernel, layout), known in self.known.items():
            winner = stored.winner_of(c for c in known.values() if c.seconds is not None)
            if winner is not None:
                winners.append(self.plans[kernel, layout, winner.config])
        tried = [c for known in self.known.values() for c in known.values()]
        if not winners:
            return _skipped(task, "no candidate could be measured", chosen, len(tried), tuple(self.faults))
        best = min(winners, key=lambda p: (self._seconds(p), key.simplicity(p.config)))
        default = self._known(chosen).get(chosen.config)
        measured = default is not None and default.status == "ok" and default.seconds is not None
        return Result(
            task,
            best.kernel,
            best.config,
            self._seconds(best),
            self._seconds(chosen) if measured else None,
            self._known(best)[best.config].spread,
            self._baseline(),
            len(tried),
            sum(c.status == "wrong" for c in tried),
            "",
            tuple(self.faults),
        )

    def _right(self, p: Any) -> bool:
        try:
            fault = self.bench.fault(self.problem, p)
        except torch.AcceleratorError as error:
            self.rivals = self.rivals or {}  # which nobody can measure any more
            self._keep(p, Candidate(p.config, status="failed", why=audit.words(error)))
            raise
        if fault is not None:
            status, why = fault
            self.faults.append(f"{status}: {p.kernel} {p.config}: {why}")
            self._keep(p, Candidate(p.config, status=status, why=why))
        return fault is None

    def _time(self, group: Sequence[Any]) -> None:
        for p, timing in zip(group, self.bench.time(self.problem, group), strict=True):
            if timing is not None:
                self._keep(p, Candidate(p.config, timing.seconds, timing.spread))

    def _keep(self, p: Any, candidate: Candidate) -> None:
        self._known(p)[p.config] = candidate
        self.measured = True
        of, extents = self.kind.key_of(self.problem, p)
        # after copies, an entry is that of operands which lie so from the start: others take another time for these
        baseline = {} if p.packs else self._baseline()
        entry = Entry(of, extents, "measured", self.bench.stamp(p.kernel), (candidate,), baseline)
        self.store.add(self.bench.device.name, p.kernel, entry)

    def _baseline(self) -> dict[str, float]:
        if self.rivals is None:
            self.rivals = self.bench.rivals(self.problem)
        return self.rivals

    def _known(self, p: Any) -> _Known:
        """The candidates of a plan's way, from the store where they were measured with this source of the kernel."""
        where = (p.kernel, self.kind.place(p))
        if where not in self.known:
            wanted, source = self.kind.key_of(self.problem, p), key.source_hash(p.kernel)
            entries = [
                entry
                for entry in self.store.entries(self.bench.device.name, p.kernel)
                if (entry.key, entry.extents) == wanted
                and (entry.source, entry.stamp.get("kernel")) == ("measured", source)
            ]
            self.known[where] = {
                c.config: c for e in entries for c in e.candidates if c.seconds is not None or c.status != "ok"
            }
            for entry in entries if not (p.packs or self.again) else ():
                self.rivals = dict(entry.baseline) or self.rivals
            for config in self.known[where]:
                self.plans.setdefault((*where, config), self.kind.with_config(self.problem, p, config))
        return self.known[where]

    def _timed(self) -> list[Any]:
        found = [(p, self._known(p).get(p.config)) for p in list(self.plans.values())]
        return [p for p, c in found if c is not None and c.status == "ok" and c.seconds is not None]

    def _best(self) -> Any | None:
        return min(self._timed(), key=lambda p: (self._seconds(p), key.simplicity(p.config)), default=None)

    def _seconds(self, p: Any) -> float:
        """Of everything, a kernel that was measured and copies around it that are predicted."""
        return replace(p, measured=self._known(p)[p.config].seconds).measured_seconds or math.inf


@runtime_checkable
class _Expecting(Protocol):
    """A bench that compiles ahead."""

    def expect(self, plans: Sequence[Any]) -> None: ...


def _skipped(task: Task, why: str, chosen: Any | None = None, tried: int = 0, faults: tuple[str, ...] = ()) -> Result:
    """Of a task that has no winner."""
    wrong = sum(words.startswith("wrong") for words in faults)
    kernel, config = ("", None) if chosen is None else (chosen.kernel, chosen.config)
    return Result(task, kernel, config, None, None, 0.0, {}, tried, wrong, why, faults)
