"""What a causal convolution launches, as a pure function of numbers: shapes, dtypes, strides and device in, plan out.

A plan prints itself (`str(plan)`); `triton-conv explain --causal` shows it without a GPU.
"""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass
from functools import lru_cache
from math import prod
from typing import TYPE_CHECKING

from . import causal_config as configs
from . import causal_cost as cost
from . import invariance, recovery, stored
from .causal_config import CausalConfig, CausalProblem, CausalRole
from .cost import Prediction, Roofline
from .forks import cached_property
from .frozen import PlanOfProblem

if TYPE_CHECKING:
    from .kernels.launch import Launch

_KERNELS = {
    CausalRole.FORWARD: "causal",
    CausalRole.BACKWARD: "causal_backward",
    CausalRole.UPDATE: "causal_update",
}
_REASONS = {
    CausalRole.FORWARD: "a window of inputs in registers: every input is loaded once",
    CausalRole.BACKWARD: "all gradients in one pass over x and dy",
    CausalRole.UPDATE: "a thread for each channel, of any strides",
}


@dataclass(frozen=True)
class CausalPlan(PlanOfProblem):
    """A causal kernel and everything it is launched with, for tensors of any address."""

    asked: CausalProblem
    config: CausalConfig

    @property
    def problem(self) -> CausalProblem:
        return self.asked

    @property
    def kernel(self) -> str:
        return _KERNELS[self.role]

    @property
    def role(self) -> CausalRole:
        return self.asked.role

    @property
    def N(self) -> int:
        return self.asked.N

    @property
    def compiled_for(self) -> Hashable:
        """All that its kernels' code depends on beside their config."""
        p = self.asked
        return p.role, p.W, p.dtype, p.weight_dtype, p.bias_dtype, p.silu, p.has_state, p.rows, self.index_bits

    @property
    def index_bits(self) -> int:
        """How wide channels and positions are counted; offsets always have 64 bits."""
        return configs.index_bits(self.asked, self.config)

    @property
    def reason(self) -> str:
        return _REASONS[self.role]

    @property
    def accumulator(self) -> str:
        return "float64" if self.dtype == "float64" else "float32"

    @property
    def dtypes(self) -> dict[str, str]:
        """The dtype of every operand that a launch may name."""
        p = self.asked
        operands = dict.fromkeys(("x", "state", "y", "dy", "dx", "dstate"), p.dtype)
        operands |= {"w": p.weight_dtype, "bias": p.bias_dtype or p.weight_dtype}
        return operands | dict.fromkeys(("slabs", "sums"), self.accumulator)

    @property
    def workspace_shape(self) -> tuple[int, ...]:
        """Slabs of the sums of dw and dbias; the result of their sum is as large as one more."""
        return configs.slabs(self.asked, self.config) if self.role is CausalRole.BACKWARD else ()

    @property
    def workspace_bytes(self) -> int:
        """Device memory beyond inputs and outputs, in bytes."""
        if not self.workspace_shape:
            return 0
        return (self.workspace_shape[0] + 1) * prod(self.workspace_shape[1:]) * self.asked.item_bytes_of_sums

    @cached_property
    def launches(self) -> tuple[Launch, ...]:
        """What runs, in order; needs Triton, and is first asked for when TRITON_INTERPRET can no longer be set."""
        from .kernels import causal, causal_backward

        if self.role is CausalRole.BACKWARD:
            return causal_backward.launches(self.asked, self.config)
        launch = causal.launch if self.role is CausalRole.FORWARD else causal.update_launch
        return (launch(self.asked, self.config),)

    @cached_property
    def roofline(self) -> Roofline:
        """The least time of what the plan computes, by whatever kernel."""
        return cost.roofline(self.asked)

    @cached_property
    def prediction(self) -> Prediction:
        """The predicted time of the kernel."""
        return cost.predict(self.asked, self.config)

    @property
    def limit(self) -> str:
        """What the predicted time is spent on."""
        return cost.limit(self.prediction)

    def __str__(self) -> str:
        slabs = f" ({self.workspace_shape[0]} slabs of dw and dbias, summed in order)" if self.workspace_shape else ""
        lines = [
            f"kernel     {self.kernel} ({self.role.value})",
            f"problem    {self.asked}",
            f"config     {self.config}",
            f"numbers    {self.dtype} products, {self.accumulator} accumulator, 64-bit offsets",
            f"workspace  {self.workspace_bytes} bytes{slabs}",
            f"reason     {self.reason}",
        ]
        return "\n".join(lines)


def make(problem: CausalProblem) -> CausalPlan:
    """The plan of a problem; the second time it is a look-up."""
    return _make(problem, stored.generation(), invariance.batch())


@lru_cache(maxsize=8192)
def _make(problem: CausalProblem, _generation: Hashable, batch: int | None) -> CausalPlan:
    rule = configs.default(problem if batch is None else problem._replace(N=batch))
    return recovery.first(problem, (CausalPlan(problem, config) for config in configs.smaller(rule)))
