"""`autotune`: what the first steps of training compute is tuned when they are over, alike on all ranks.

When they are over, and not at each first call: then activations are freed, no other rank waits in a collective of the
step, and all ranks' problems are known, so that they can be shared out. The steps inside run what is known before.
"""

from __future__ import annotations

import hashlib
import json
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from typing import TYPE_CHECKING

import torch

from .. import backends, execute, installed, plan, stored
from ..ways import Problem
from . import ranks
from .ranks import Queue, Ranks
from .store import Store

if TYPE_CHECKING:  # they need Triton, which need not be there where there is no GPU
    from . import sweep
    from .measure import Bench
    from .tune import Budget, Result, Task

_tuned: set[Problem] = set()  # by this process
_told = False  # that there is no GPU


@contextmanager
def autotune(
    budget: float | None = 300.0,
    backend: str | None = None,
    *,
    candidates: int | None = None,
    bench: Bench | None = None,
    store: Store | None = None,
    progress: Callable[[Result], None] | None = None,
    timeout: float = 600.0,
    lease: float = 120.0,
) -> Iterator[list[Result]]:
    """Tune what the code inside computes, when it is over; for a training step, or a few.

        >>> with triton_conv.autotune(budget=120) as results:  # doctest: +SKIP
        ...     loss = model(images).sum()
        ...     loss.backward()

    Convolutions that kernels compute inside, forward and backward, are noted, each distinct one once. At the end those
    that nobody measured before are tuned on the current GPU, for `budget` seconds (None: until done) and at most
    `candidates` configs of each; what was measured goes to `store`, by default the user's, and holds from the next
    call on. The list that the context gives has the results then. A second time costs nothing. PyTorch's random state
    is left as it was. An exception from inside passes through, and nothing is tuned.

    backend: "auto" lets cuDNN run where it was measured to be quicker, "triton" does not, both from here on and after
    the context too: see `triton_conv.backend`. None leaves that as it is.

    Under torch.distributed (with a default process group) all ranks enter and leave together. They share out the
    problems of all of them, and each installs the same entries, which it asks before any file: all run the same configs
    whatever their file systems hold. Who is not there after `timeout` seconds is named in a RuntimeError; the problems
    of a rank that dies are another's after `lease` seconds.

    Nothing is measured while a CUDA graph is captured or code is traced: a context that ends there warns. Calls that
    were captured or compiled inside are tuned as others are; a graph keeps what it has captured. Without a GPU there is
    nothing to tune: the context warns, once in a process. `bench` is what measures, for tests.

    Raises ValueError for a budget, timeout or lease that is no number of seconds above 0, for candidates that are no
    whole number above 0, and for an unknown backend.
    """
    if budget is not None:
        _check_seconds("budget", budget)
    _check_seconds("timeout", timeout)
    _check_seconds("lease", lease)
    if candidates is not None and not (isinstance(candidates, int) and candidates > 0):
        raise ValueError(f"candidates must be a whole number above 0, or None, but got candidates={candidates!r}")
    if backend is not None:
        backends.check(backend, "backend")
    results: list[Result] = []
    if bench is None and not torch.cuda.is_available():
        _tell()
        yield results
        return
    installed.require()
    from .tune import Budget

    asked = backends.backend(backend) if backend is not None else nullcontext()
    try:
        with execute.problems() as problems:
            yield results
    except BaseException:
        asked.__exit__(None, None, None)
        group = ranks.of_process_group()
        if group is not None:
            with suppress(RuntimeError):
                ranks.announce(group, _TOPIC, None)
        raise
    how = Budget(budget, candidates)
    results += _agreed(list(problems), how, bench, store or Store(stored.user_directory()), progress, timeout, lease)


def _check_seconds(name: str, value: float) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not value > 0:
        raise ValueError(f"{name} must be a number of seconds above 0, but got {name}={value!r}")


_TOPIC = "triton_conv.autotune"


def _agreed(
    problems: list[Problem],
    budget: Budget,
    bench: Bench | None,
    store: Store,
    progress: Callable[[Result], None] | None,
    timeout: float,
    lease: float,
) -> list[Result]:
    """The results of all ranks' problems that are not settled, after what was found is installed."""
    from . import sweep
    from .measure import CudaBench
    from .tune import Budget

    name = bench.device.name if bench else execute._cuda_device(torch.cuda.current_device()).name
    others = {problem.device.name for problem in problems if problem.device.name != name}
    if others:
        warnings.warn(f"what ran on {', '.join(sorted(others))} is not tuned: {name} is current", stacklevel=4)
    tasks = {sweep.name_of(task): task for task in _tasks(problems) if task.problem.device.name == name}
    states = {name: _state(task.problem) for name, task in tasks.items()}
    group, unsettled = ranks.of_process_group(), [name for name, state in states.items() if not state]
    if group is not None:
        there = {sweep.name_of(task): _state(task.problem) for task in _tasks(_tuned)}
        unsettled = _unsettled(group, list(tasks), there | states, timeout)
    if not unsettled:
        return []
    why = _cannot_measure()
    if why:
        warnings.warn(f"{why}, so autotune measures nothing here", stacklevel=4)

    def make_bench(_: int) -> Bench:
        return bench or CudaBench(torch.cuda.current_device())

    mine = [tasks[name] for name in unsettled if name in tasks]
    seconds, deadline = budget.seconds, None
    if seconds is not None:
        deadline = time.monotonic() + seconds
        share = seconds * (group.size if group else 1) / len(unsettled)
        budget = Budget(min(seconds, share), budget.candidates)
    with _undisturbed():
        if group is not None:
            queue = Queue(group, lease)
            found = sweep.outcomes(mine, None if why else make_bench, store, budget, queue, progress, deadline)
        else:
            found = {} if why else _alone(mine, make_bench(0), store, budget, progress, deadline)
    for (device, kernel), entries in sweep.entries_of(found.values()).items():
        stored.install(device, kernel, entries)
    _tuned.update(o.result.task.problem for o in found.values() if not o.result.skipped)
    return [outcome.result for outcome in found.values()]


def _alone(
    tasks: list[Task],
    bench: Bench,
    store: Store,
    budget: Budget,
    progress: Callable[[Result], None] | None,
    deadline: float | None,
) -> dict[str, sweep.Outcome]:
    from . import sweep

    found: dict[str, sweep.Outcome] = {}
    for task in tasks:
        try:
            found[sweep.name_of(task)] = outcome = sweep.done(task, bench, store, budget, deadline)
        except Exception as error:  # training goes on without
            warnings.warn(f"autotune ends at {task.label}: {type(error).__name__}: {error}", stacklevel=5)
            break
        if progress is not None:
            progress(outcome.result)
    return found


def _tasks(problems: Iterable[Problem]) -> list[Task]:
    from .tune import Task

    return [Task(f"{problem.role.value} {problem.geometry}", problem) for problem in problems]


def _state(problem: Problem) -> str:
    """Names what runs for a problem; empty where nobody has measured that yet."""
    found = plan.every(problem)
    if problem not in _tuned and any(p.measured is None for p in found):
        return ""
    what = repr([(p.kernel, p.config, p.measured, p.rival) for p in found])
    return hashlib.sha256(what.encode()).hexdigest()[:16]


def _unsettled(group: Ranks, mine: list[str], states: dict[str, str], timeout: float) -> list[str]:
    """Names of the tasks of all ranks that not every one of them knows in the same state; the same on all ranks."""
    said = [json.loads(text) for text in ranks.gathered(group, _TOPIC, json.dumps([mine, states]), timeout)]
    names = dict.fromkeys(name for used, _ in said for name in used)
    found = {name: {known.get(name, "") for _, known in said} for name in names}
    return [name for name, they in found.items() if len(they) > 1 or "" in they]


def _cannot_measure() -> str:
    """Why nothing can be measured at this moment, in words; empty if it can."""
    if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
        return "a CUDA graph is being captured"
    if torch.compiler.is_compiling() or torch._guards.detect_fake_mode() is not None:
        return "code is being traced"
    return ""


@contextmanager
def _undisturbed() -> Iterator[None]:
    """Leaves PyTorch's random state as it was; no graph is recorded."""
    devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
    with torch.random.fork_rng(devices=devices), torch.no_grad():
        yield


def _tell() -> None:
    global _told
    if not _told:
        _told = True
        warnings.warn("triton_conv.autotune has nothing to tune without a GPU", stacklevel=4)
