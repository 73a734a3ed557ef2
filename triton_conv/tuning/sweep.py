"""Tuning spread over the GPUs of a job, under the user's own launcher; without one it is `tune`.

Each rank takes the next task of its own device from a queue (`ranks.Queue`). What is measured goes to the rank's store
as it is measured; when a task is done, its entries go to all ranks as text, so that file systems need not be shared.
"""

from __future__ import annotations

import base64
import hashlib
import io
import os
import pickle
import socket
import time
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, is_dataclass
from enum import Enum
from typing import Any

from .. import key as keys
from .. import stored
from ..files import shown
from ..stored import Candidate, Entry
from . import ranks, subject
from .measure import Bench
from .ranks import Queue, Ranks
from .store import Store, merged
from .tune import Budget, Result, Task, tune


@dataclass(frozen=True)
class Outcome:
    """What came of a task: its result, and what is now known of its problem, as the texts of `stored.dumps`."""

    result: Result
    texts: tuple[str, ...]


def sweep(
    tasks: Sequence[Task],
    make_bench: Callable[[int], Bench],
    store: Store,
    budget: Budget = Budget(),  # noqa: B008
    group: Ranks | None = None,
    *,
    progress: Callable[[Result], None] | None = None,
    seconds: float | None = None,
    lease: float = 120.0,
    poll: float = 0.05,
) -> list[Result]:
    """The results of all tasks of all ranks, this rank's own first and in their order.

        >>> results = sweep(tasks, CudaBench, Store(stored.user_directory()))  # doctest: +SKIP

    Every rank calls it with the tasks of its own device; ranks of one device list the same ones, and each of these is
    done by one of them, whichever is free. `make_bench` is given the rank's number on its machine, for the GPU to
    measure on. `budget` is of one task, `seconds` of everything; `progress` hears of each task once, whoever did it.
    `group` is by default the default process group, or what the launcher's environment says.

    A task is taken over by another rank when its own has died (no sign of life for `lease` seconds) or has raised:
    then that rank warns, measures no more, and waits for the others. What nobody is left to do is in the results as
    skipped. At the end every machine's store has the entries of all. Raises RuntimeError if the process that serves
    torch.distributed's store ends; what was measured until then is in the stores.
    """
    group = ranks.of_this_job() if group is None else group
    deadline = None if seconds is None else time.monotonic() + seconds
    if group is None:
        return tune(tasks, make_bench(ranks.local_rank()), store, budget, progress, deadline)
    queue = Queue(group, lease)
    found = outcomes(tasks, make_bench, store, budget, queue, progress, deadline, poll)
    return [outcome.result for outcome in found.values()]


def outcomes(
    tasks: Sequence[Task],
    make_bench: Callable[[int], Bench] | None,
    store: Store,
    budget: Budget,
    queue: Queue,
    progress: Callable[[Result], None] | None = None,
    deadline: float | None = None,
    poll: float = 0.05,
) -> dict[str, Outcome]:
    """The same by name of the task; a rank without `make_bench` only waits for what others find."""
    own = {name_of(task): task for task in tasks}
    found: dict[str, Outcome] = {}

    def collect() -> None:
        for name in queue.names():
            if name not in found and queue.is_done(name):
                found[name] = _read(queue.result(name))
                if progress is not None:
                    progress(found[name].result)

    with queue.joined(own):
        if make_bench is None:
            queue.retire()
        bench = make_bench(ranks.local_rank()) if own and make_bench is not None else None
        while True:
            taken = queue.take() if bench is not None else None
            if bench is not None and taken is not None:
                name, turn = taken
                try:
                    if queue.tried_too_often(name):
                        outcome = _skipped(own[name], "every rank that measured it died or failed")
                    else:
                        outcome = done(own[name], bench, store, budget, deadline)
                except Exception as error:  # of a GPU that has failed, most likely: it can measure no more
                    queue.retire()
                    warnings.warn(
                        f"rank {queue.rank} measures no more, other ranks take over: {own[name].label}: "
                        f"{type(error).__name__}: {error}",
                        stacklevel=2,
                    )
                else:
                    queue.finish(name, turn, _written(outcome))
            collect()
            if queue.over():
                break
            if taken is None:
                time.sleep(poll)
        collect()
        place = f"{socket.gethostname()} {os.environ.get('GROUP_RANK', '')} {store.directory}"
        if queue.first_of(place):
            keep(found.values(), store)
    lost = {name: _skipped(task, "no rank was left to measure it") for name, task in own.items() if name not in found}
    return {name: lost.get(name) or found[name] for name in dict.fromkeys([*own, *found])}


def _written(outcome: Outcome) -> str:
    """As text for the distributed store, to which anyone may write who reaches its port."""
    return base64.b64encode(pickle.dumps(outcome)).decode()


def _read(text: str) -> Outcome:
    return _Unpickler(io.BytesIO(base64.b64decode(text))).load()


class _Unpickler(pickle.Unpickler):
    """Makes records of this package and of plain values, and nothing else: it calls no function."""

    def find_class(self, module: str, name: str) -> Any:
        if module.split(".")[0] == "triton_conv":
            found = super().find_class(module, name)
            ours = isinstance(found, type) and found.__module__.split(".")[0] == "triton_conv"
            if ours and (is_dataclass(found) or issubclass(found, (tuple, Enum))):
                return found
        raise pickle.UnpicklingError(f"a rank's result has {shown(f'{module}.{name}')}")


def name_of(task: Task) -> str:
    """The same for the same problem on a device of the same name, whichever rank asks."""
    problem = task.problem
    what = f"{problem.device.name}\n{problem._replace(device=None)!r}"
    return hashlib.sha256(what.encode()).hexdigest()[:24]


def known(task: Task, store: Store) -> tuple[str, ...]:
    """What look-ups find for every way to run a task, as texts: the store's entry, else the config that runs now.

    With both, whoever installs them finds nothing else for this task, whatever its files say.
    """
    texts = []
    kind = subject.of(task.problem)
    for p in kind.every(task.problem):
        place = kind.key_of(task.problem, p)
        entry = Entry(*place, "model", {"kernel": keys.source_hash(p.kernel)}, (Candidate(p.config),), {})
        for there in store.entries(p.device.name, p.kernel):
            found = (there.key, there.extents) == place and stored.current(there, p.kernel)
            if found and there.winner is not None:
                entry = there
        texts.append(stored.dumps(p.device.name, p.kernel, [entry]))
    return tuple(dict.fromkeys(texts))


def entries_of(found: Iterable[Outcome]) -> dict[tuple[str, str], list[Entry]]:
    """The entries of outcomes by device and kernel, each once."""
    new: dict[tuple[str, str], list[Entry]] = {}
    for text in dict.fromkeys(text for outcome in found for text in outcome.texts):
        device, kernel, entries = stored.loads(text, "a rank's entries")
        new.setdefault((device, kernel), []).extend(entries)
    return new


def keep(found: Iterable[Outcome], store: Store) -> None:
    """Writes to a store what was measured and is not there yet."""
    for (device, kernel), entries in entries_of(found).items():
        there = {(e.key, e.extents): e for e in store.entries(device, kernel)}
        new = []
        for entry in entries:
            before = there.get((entry.key, entry.extents))
            if entry.source == "measured" and (before is None or merged(before, entry) != before):
                new.append(entry)
        if new:
            store.add(device, kernel, *new)


def done(task: Task, bench: Bench, store: Store, budget: Budget, deadline: float | None) -> Outcome:
    """What comes of a task here and now."""
    (result,) = tune([task], bench, store, budget, None, deadline)
    stored.forget()  # of what files held before
    return Outcome(result, known(task, store))


def _skipped(task: Task, why: str) -> Outcome:
    return Outcome(Result(task, "", None, None, None, 0.0, {}, 0, 0, why), ())
