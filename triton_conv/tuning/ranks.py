"""Work shared by the ranks of a job: a queue in torch.distributed's store, from which nobody's death takes anything.

The store is all that is used, no process group: ranks on CPUs or GPUs, before or after `init_process_group`, and no
collective that a dead rank could hang. A queue keeps, under a prefix of its own,

    names <rank>           the tasks that a rank can do, as JSON
    owner <task>           who does it: rank, and a number that tells its turns apart
    result <task> <owner>  what came of it, as text
    done <task>            whose result counts: the first
    beat <rank>            a count that a thread of the rank keeps going up
    retired <rank>, left <rank>

No clock is compared with another: a rank is gone when its count has not moved for as long as a lease on one's own.
"""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import NamedTuple

import torch.distributed as dist


class Ranks(NamedTuple):
    """The ranks of a job, this one among them, and a store that all of them reach."""

    store: dist.Store
    rank: int
    size: int


def of_this_job(timeout: float = 300.0) -> Ranks | None:
    """The ranks of the default process group, else of the launcher's environment; None for a process on its own.

    The environment is torchrun's: RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT. `timeout` is in seconds. Raises
    RuntimeError if a store cannot be reached by then.
    """
    found = of_process_group()
    if found is None and dist.is_available() and int(os.environ.get("WORLD_SIZE", "1")) > 1:
        found = Ranks(*next(iter(dist.rendezvous("env://", timeout=timedelta(seconds=timeout)))))
    return found


def of_process_group() -> Ranks | None:
    """The ranks of the default process group, None if there is none or this one is alone in it."""
    if not dist.is_available() or not dist.is_initialized() or dist.get_world_size() == 1:
        return None
    return Ranks(dist.distributed_c10d._get_default_store(), dist.get_rank(), dist.get_world_size())


def local_rank() -> int:
    """Which of its machine's ranks this one is, and so which GPU is its own; 0 without a launcher."""
    return int(os.environ.get("LOCAL_RANK", "0"))


class Queue:
    """Tasks by name, each done by one of the ranks that list it.

    A rank `joins`, takes tasks one by one, finishes each, and goes on until all are `over`. `lease` is after how many
    seconds without a sign of life a rank's task is another's; after `tries` attempts it is nobody's any more.
    """

    def __init__(self, ranks: Ranks, lease: float = 120.0, tries: int = 3) -> None:
        self.rank, self.size = ranks.rank, ranks.size
        self._lease, self._most_tries = lease, tries
        turn = ranks.store.add(f"triton_conv queues of {ranks.rank}", 1)
        self._store = dist.PrefixStore(f"triton_conv queue {turn}", ranks.store)
        self._turns = 0
        self._names: list[str] = []
        self._untouched: list[str] = []
        self._lists: dict[int, list[str]] = {}
        self._counts: dict[int, tuple[int, float]] = {}
        self._done: set[str] = set()
        self._retired = False

    @contextmanager
    def joined(self, names: Iterable[str]) -> Iterator[None]:
        """Within it this rank is alive, and does tasks of these names. Whoever leaves by an exception has retired."""
        self._names = list(dict.fromkeys(names))
        self._untouched = self._names[::-1]
        self._store.set(f"names {self.rank}", json.dumps(self._names))
        stop = threading.Event()
        heart = threading.Thread(target=self._beat, args=(stop,), daemon=True)
        heart.start()
        try:
            yield
            self._store.set(f"left {self.rank}", "")
            if self.rank == 0:  # whose process may be the one that serves the store
                while not all(self._has(f"left {r}") or self._gone(r) for r in range(self.size)):
                    time.sleep(0.01)
        except BaseException:
            with suppress(RuntimeError):
                self.retire()
            raise
        finally:
            stop.set()
            heart.join()

    def take(self) -> tuple[str, str] | None:
        """(a task, what this turn at it is called) that is this rank's now: nobody's, else that of a rank that is gone.

        None if each is done or with someone who lives, or if this rank has retired.
        """
        if self._retired:
            return None
        self._turns += 1
        mine = f"{self.rank}.{self._turns}"
        while self._untouched:
            name = self._untouched.pop()
            if self._store.compare_set(f"owner {name}", "", mine).decode() == mine:
                return name, mine
        for name in self._names:
            if self.is_done(name):
                continue
            owner = self._store.compare_set(f"owner {name}", "", mine).decode()
            if owner != mine and self._gone(int(owner.split(".")[0])):
                owner = self._store.compare_set(f"owner {name}", owner, mine).decode()
            if owner == mine:
                return name, mine
        return None

    def tried_too_often(self, name: str) -> bool:
        """Counts one more attempt at a task: whether the ones before were enough to think that it kills."""
        return self._store.add(f"tries {name}", 1) > self._most_tries

    def finish(self, name: str, turn: str, result: str) -> bool:
        """Hands in a task's result; False if another's came first, which then counts."""
        self._store.set(f"result {name} {turn}", result)
        return self._store.compare_set(f"done {name}", "", turn).decode() == turn

    def retire(self) -> None:
        """Takes nothing more; what this rank has in hand is others' at once."""
        self._retired = True
        self._store.set(f"retired {self.rank}", "")

    def is_done(self, name: str) -> bool:
        """Whether anybody has handed in a task's result."""
        if name not in self._done and self._has(f"done {name}"):
            self._done.add(name)
        return name in self._done

    def result(self, name: str) -> str:
        """The result of a task that is done."""
        turn = self._store.get(f"done {name}").decode()
        return self._store.get(f"result {name} {turn}").decode()

    def over(self) -> bool:
        """Whether every task of every rank is done, but for those that only ranks list that are gone."""
        known = [self._listed(rank) for rank in range(self.size)]
        return all(known[rank] is not None or self._gone(rank) for rank in range(self.size)) and all(
            self.is_done(name) or self._gone(rank) for rank in range(self.size) for name in known[rank] or ()
        )

    def names(self) -> list[str]:
        """Those of all ranks that have joined, this one's first."""
        others = [name for rank in range(self.size) for name in self._listed(rank) or ()]
        return list(dict.fromkeys([*self._names, *others]))

    def first_of(self, place: str) -> bool:
        """Whether this rank is the first to ask on behalf of a place that it shares with others."""
        return self._store.add(f"place {place}", 1) == 1

    def _listed(self, rank: int) -> list[str] | None:
        if rank not in self._lists and self._has(f"names {rank}"):
            self._lists[rank] = json.loads(self._store.get(f"names {rank}"))
        return self._lists.get(rank)

    def _has(self, key: str) -> bool:
        return self._store.check([key])

    def _gone(self, rank: int) -> bool:
        if rank == self.rank:
            return self._retired
        if self._has(f"retired {rank}"):
            return True
        count, now = self._store.add(f"beat {rank}", 0), time.monotonic()
        last, since = self._counts.get(rank, (-1, now))
        if count != last:
            self._counts[rank] = count, now
            return False
        return now - since > self._lease

    def _beat(self, stop: threading.Event) -> None:
        with suppress(RuntimeError):  # the store is gone, which the thread that needs it will hear
            while not stop.is_set():
                self._store.add(f"beat {self.rank}", 1)
                stop.wait(self._lease / 8)


def announce(ranks: Ranks, topic: str, mine: str | None) -> dist.Store:
    """Says something on a topic to all ranks, without waiting for any; None says that there will be nothing.

    Returns where they say it, by rank. What is said the second time belongs to what others say the second time.
    """
    turn = ranks.store.add(f"triton_conv {topic} of {ranks.rank}", 1)
    store = dist.PrefixStore(f"triton_conv {topic} {turn}", ranks.store)
    store.set(str(ranks.rank), json.dumps(mine))
    return store


def gathered(ranks: Ranks, topic: str, mine: str, timeout: float) -> list[str]:
    """What every rank says on a topic, by rank.

    Raises RuntimeError naming the ranks that said nothing in `timeout` seconds, or that say that there will be nothing.
    """
    store = announce(ranks, topic, mine)
    end = time.monotonic() + timeout
    said: dict[int, str | None] = {}
    while len(said) < ranks.size:
        missing = [rank for rank in range(ranks.size) if rank not in said]
        said |= {rank: json.loads(store.get(str(rank))) for rank in missing if store.check([str(rank)])}
        failed = [rank for rank in said if said[rank] is None]
        if failed:
            raise RuntimeError(f"{topic}: rank {_listed(failed)} of {ranks.size} left it by an exception")
        if len(said) < ranks.size:
            if time.monotonic() > end:
                late = _listed(rank for rank in missing if rank not in said)
                raise RuntimeError(f"{topic}: waited {timeout:g} s for rank {late} of {ranks.size}, which did not come")
            time.sleep(0.01)
    return [said[rank] or "" for rank in range(ranks.size)]


def _listed(some: Iterable[int]) -> str:
    return ", ".join(map(str, some))
