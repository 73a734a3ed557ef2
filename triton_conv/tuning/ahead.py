"""Compiles plans by other processes while this one measures; what they compiled is in Triton's cache on the disk."""

from __future__ import annotations

import multiprocessing
import os
import sys
from collections.abc import Iterable, Iterator
from concurrent.futures import CancelledError, Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager, suppress
from types import ModuleType

from ..explain import AnyPlan
from . import audit

_NICENESS = 10


class Ahead:
    """The rows of plans (`audit.Row`) for an architecture, from `jobs` processes that live until the end.

    `jobs` defaults to the processors at hand, shared among the ranks of this machine, but one.
    """

    def __init__(self, arch: int, jobs: int | None = None):
        ranks = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        self.arch, self.jobs = arch, jobs or max(len(os.sched_getaffinity(0)) // ranks - 1, 1)
        self._pool: ProcessPoolExecutor | None = None
        self._waiting: dict[AnyPlan, Future[list[audit.Row]]] = {}

    def expect(self, plans: Iterable[AnyPlan]) -> None:
        """Begins with plans, in this order, and drops those that were expected before and are not begun."""
        self.drop()
        self.expect_too(plans)

    def expect_too(self, plans: Iterable[AnyPlan]) -> None:
        """Begins with plans, in this order, after those that are expected already."""
        for p in plans:
            if p not in self._waiting:
                self._waiting[p] = self._submitted(p)

    def drop(self) -> None:
        """Expects nothing any more."""
        for future in self._waiting.values():
            future.cancel()
        self._waiting.clear()

    def rows(self, p: AnyPlan) -> list[audit.Row]:
        """Of a plan, expected or not; of one whose compiler died they say so."""
        future = self._waiting.pop(p, None)
        try:
            return (future or self._submitted(p)).result()
        except (BrokenProcessPool, CancelledError):  # by whichever plan: this one is compiled alone
            self._pool = None
            self.expect(list(self._waiting))  # those that broke with it
            with _without_main():
                ((_, rows),) = audit.audit([audit.Subject("", p)], self.arch, jobs=1)
            return rows

    def _submitted(self, p: AnyPlan) -> Future[list[audit.Row]]:
        task = audit.Compilation(0, audit.Subject("", p), self.arch, (), stubs=True)
        for _ in range(2):
            if self._pool is None:
                context = multiprocessing.get_context("spawn")
                self._pool = ProcessPoolExecutor(self.jobs, context, initializer=_begin)
            try:
                with _without_main():
                    return self._pool.submit(audit.compiled, task)
            except BrokenProcessPool:
                self._pool = None
        raise RuntimeError("processes that compile kernels die as they start")


def _begin() -> None:
    """In a process that compiles: whoever measures meanwhile goes first."""
    audit.heed_the_parent()
    with suppress(OSError):
        os.nice(_NICENESS)


@contextmanager
def _without_main() -> Iterator[None]:
    """A process that starts in here does not run the user's script, which need not be made for that."""
    main = sys.modules["__main__"]
    sys.modules["__main__"] = ModuleType("__main__")
    try:
        yield
    finally:
        sys.modules["__main__"] = main
