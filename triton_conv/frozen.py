"""What plans have in common, whatever they compute: they keep what they have worked out, and launch it."""

from __future__ import annotations

from dataclasses import fields
from typing import TYPE_CHECKING, Any

from .devices import Device
from .forks import cached_property

if TYPE_CHECKING:
    from .kernels.direct import Direct
    from .kernels.launch import Launch


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
