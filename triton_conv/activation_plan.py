"""What the gradient of an activation launches: as `plan`, for `triton_conv::activation_backward`."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from functools import lru_cache
from typing import TYPE_CHECKING, NamedTuple

from .config import ITEM_BYTES
from .cost import LAUNCH, MEMORY_SHARE, Prediction, Roofline
from .devices import Device
from .forks import cached_property
from .frozen import PlanOfProblem
from .tiles import ceil_div

if TYPE_CHECKING:
    from .kernels.launch import Launch


class ActivationRole(Enum):
    BACKWARD = "activation gradient"


class ActivationProblem(NamedTuple):
    """`total` elements of a dtype; `of_output` says that the activation's output was saved, else its input was."""

    total: int
    dtype: str
    activation: str
    slope: float
    of_output: bool
    device: Device


@dataclass(frozen=True)
class ActivationConfig:
    """Elements of a program, and its warps: with these a thread moves 16 bytes of 16-bit floats at a time."""

    block: int = 1024
    num_warps: int = 4


@dataclass(frozen=True)
class ActivationPlan(PlanOfProblem):
    """The kernel and everything it is launched with, for tensors of any address."""

    asked: ActivationProblem
    config: ActivationConfig = ActivationConfig()

    kernel = "activation_backward"
    role = ActivationRole.BACKWARD
    workspace_bytes = 0
    reason = "every element is read and written once"

    @property
    def problem(self) -> ActivationProblem:
        return self.asked

    @property
    def dtypes(self) -> dict[str, str]:
        """The dtype of every operand that a launch may name."""
        return dict.fromkeys(("dy", "saved", "dz"), self.dtype)

    @property
    def accumulator(self) -> str:
        return "float64" if self.dtype == "float64" else "float32"

    @cached_property
    def launches(self) -> tuple[Launch, ...]:
        from .kernels import activation

        return (activation.launch(self.asked, self.config, self.accumulator),)

    @cached_property
    def roofline(self) -> Roofline:
        """A product for each element; dy and what was saved read, dz written."""
        moved = 3 * self.asked.total * ITEM_BYTES[self.dtype]
        return Roofline(self.asked.total, moved, "memory bandwidth", moved / self.device.bandwidth)

    @cached_property
    def prediction(self) -> Prediction:
        memory = self.roofline.bytes / (self.device.bandwidth * MEMORY_SHARE)
        programs = ceil_div(self.asked.total, self.config.block)
        resident = 64 // self.config.num_warps
        return Prediction(
            seconds=memory + LAUNCH,
            tiles=programs,
            waves=ceil_div(programs, resident * self.device.multiprocessors),
            resident=resident,
            useful=self.asked.total / max(programs * self.config.block, 1),
            loop_seconds=0.0,
            compute_seconds=0.0,
            l2_seconds=self.roofline.bytes / self.device.l2_bandwidth,
            memory_seconds=memory,
        )

    @property
    def limit(self) -> str:
        return self.roofline.limit

    def __str__(self) -> str:
        p = self.asked
        saved = "output" if p.of_output else "input"
        lines = [
            f"kernel     {self.kernel} ({self.role.value})",
            f"problem    {p.activation} of {p.total} elements, from its {saved}",
            f"config     {self.config}",
            f"numbers    {self.dtype}, computed in {self.accumulator}",
            "layout     as what was saved",
            f"workspace  {self.workspace_bytes} bytes",
            f"reason     {self.reason}",
        ]
        return "\n".join(lines)


@lru_cache(maxsize=8192)
def make(problem: ActivationProblem) -> ActivationPlan:
    """The plan of a problem; the second time it is a look-up."""
    return ActivationPlan(problem)
