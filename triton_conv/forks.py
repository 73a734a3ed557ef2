"""What a process that was forked must not inherit: locks that another thread held, and what was known of devices."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from types import TracebackType
from typing import Any, Generic, TypeVar, overload
from weakref import WeakSet

T = TypeVar("T")


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


class cached_property(Generic[T]):
    """As that of functools, without the lock that all instances share there before Python 3.12.

    Threads would wait for each other's plans, and a child of fork for ever for one of its parent's.
    """

    def __init__(self, work_out: Callable[[Any], T]):
        self._work_out, self.__doc__ = work_out, work_out.__doc__

    def __set_name__(self, owner: type, name: str) -> None:
        self._name = name

    @overload
    def __get__(self, instance: None, owner: type) -> cached_property[T]: ...
    @overload
    def __get__(self, instance: object, owner: type) -> T: ...
    def __get__(self, instance: object | None, owner: type) -> cached_property[T] | T:
        if instance is None:
            return self
        return instance.__dict__.setdefault(self._name, self._work_out(instance))
