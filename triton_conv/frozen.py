"""What plans have in common, whatever they compute: they keep what they have worked out, and launch it."""

from __future__ import annotations

from dataclasses import fields
from typing import TYPE_CHECKING, Any

from .cost import Prediction, copy_seconds
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
    """A plan: `launches` are what runs, in order; `measured` are their seconds where those are known."""

    measured: float | None = None

    if TYPE_CHECKING:  # a property here would be the default of a field of that name

        @property
        def device(self) -> Device: ...

    @cached_property
    def launches(self) -> tuple[Launch, ...]:
        raise NotImplementedError

    @cached_property
    def direct(self) -> tuple[Direct, ...]:
        """The same, launched without Triton's binder from the second time on."""
        from .kernels.direct import Direct

        return tuple(map(Direct, self.launches))

    @cached_property
    def prediction(self) -> Prediction:
        """The predicted time of what is launched."""
        raise NotImplementedError

    @property
    def limit(self) -> str:
        """What the predicted time is spent on."""
        return self.prediction.limit

    @property
    def _copies(self) -> dict[str, int]:
        """The size in bytes of every tensor that stands for another."""
        return {}

    @property
    def _around(self) -> float:
        """The predicted time of what goes on beside the launches."""
        return sum(copy_seconds(size, self.device) for size in self._copies.values())

    @cached_property
    def seconds(self) -> float:
        """The predicted time of everything."""
        return self.prediction.seconds + self._around

    @property
    def measured_seconds(self) -> float | None:
        """The time of everything where what is launched was measured; what is around it is predicted."""
        return None if self.measured is None else self.measured + self._around


class PlanOfProblem(Planned):
    """A plan whose `problem` says for which dtype and device it is."""

    problem: Any

    @property
    def dtype(self) -> str:
        return self.problem.dtype

    @property
    def device(self) -> Device:
        return self.problem.device
