"""What plans have in common, whatever they compute: they keep what they have worked out, and launch it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields
from typing import TYPE_CHECKING, Any, Generic, TypeVar, overload

from .devices import Device

if TYPE_CHECKING:
    from .kernels.direct import Direct
    from .kernels.launch import Launch

T = TypeVar("T")


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


class Frozen:
    """A frozen dataclass whose cached properties stay behind when it is copied or pickled: kernels do not travel."""

    def __getstate__(self) -> dict[str, Any]:
        return {f.name: getattr(self, f.name) for f in fields(self)}  # type: ignore[arg-type]

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)


class Planned(Frozen):
    """A plan: `launches` are what runs, in order."""

    @cached_property
    def launches(self) -> tuple[Launch, ...]:
        raise NotImplementedError

    @cached_property
    def direct(self) -> tuple[Direct, ...]:
        """The same, launched without Triton's binder from the second time on."""
        from .kernels.direct import Direct

        return tuple(map(Direct, self.launches))


class PlanOfProblem(Planned):
    """A plan whose `problem` says for which dtype and device it is."""

    problem: Any

    @property
    def dtype(self) -> str:
        return self.problem.dtype

    @property
    def device(self) -> Device:
        return self.problem.device
