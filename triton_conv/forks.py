"""What a process that was forked must not inherit: locks that another thread held, and what was known of devices."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from types import TracebackType
from weakref import WeakSet


class Lock:
    """A `threading.Lock` that is open in a forked child, whoever held it in the parent: that thread is not there.

    What is changed under it is to be replaced by one assignment, or may be half done in the child.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        _locks.add(self)

    def __enter__(self) -> None:
        self._lock.acquire()

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._lock.release()


_locks: WeakSet[Lock] = WeakSet()


def _opened() -> None:
    for lock in list(_locks):
        lock._lock = threading.Lock()


def in_child(action: Callable[[], object]) -> None:
    """Has `action` called in every child of a fork, before anything else runs there."""
    if hasattr(os, "register_at_fork"):
        os.register_at_fork(after_in_child=action)


in_child(_opened)
