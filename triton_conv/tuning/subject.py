"""What the tuner asks about a problem, of whatever kind: its ways, other configs, operands, what is right.

    >>> of(problem).every(problem)  # doctest: +SKIP

An epilogue has no part in a problem that is tuned: configs are shared with the convolution without it. A streaming
convolution is tuned as the ordinary one of a fixed number of frames that its plans are made for (`streaming`).
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from .. import (
    backends,
    branches_plan,
    branches_problem,
    branches_ways,
    deform_plan,
    deform_run,
    execute,
    plan,
    streaming_plan,
    ways,
)
from ..branches_plan import BranchesPlan
from ..config import KernelConfig
from ..deform_plan import DeformProblem
from ..key import Extents, Key
from ..streaming_plan import StreamingPlan
from . import branches, deform, operands, space

# `ways.Problem`, `DeformProblem` or `branches_problem.Problem`: a NamedTuple with role, geometry, dtype, precision and
# device
AnyProblem = Any


class Subject(Protocol):
    """A kind of problem. Plans that it is given are its own; a case holds the operands and outputs of a problem."""

    def comparable(self, problem: Any) -> bool:
        """Whether others have kernels for a problem."""

    def every(self, problem: Any) -> list[Any]:
        """The plans of all ways to run it, with the configs that look-ups find."""

    def choice(self, found: list[Any]) -> Any:
        """The one that runs."""

    def plans(self, problem: Any, ways_of_it: Sequence[Any]) -> list[Any]:
        """Those to measure: the ways' own first, then other configs by predicted time."""

    def with_config(self, problem: Any, p: Any, config: KernelConfig) -> Any:
        """The plan that goes the way of another with this config."""

    def key_of(self, problem: Any, p: Any) -> tuple[Key, Extents]:
        """Under what the configs of its way are filed."""

    def place(self, p: Any) -> Hashable:
        """How its operands lie: plans of one place read the same copies."""

    def case(self, problem: Any, device: torch.device, seed: int) -> Any:
        """Random operands, and outputs full of NaN."""

    def bytes_of(self, problem: Any) -> int:
        """Of a case."""

    def expected(self, problem: Any, case: Any) -> Any:
        """What a plan should write, in float64."""

    def wrong(self, problem: Any, p: Any, case: Any, want: Any) -> str | None:
        """How what a plan writes differs from that, in words."""

    def prepared(self, p: Any, case: Any) -> dict[str, Tensor]:
        """A case as the kernels take it, but for a workspace."""

    def work(self, p: Any, device: torch.device) -> Callable[[dict[str, Tensor]], None]:
        """Runs what is measured of a plan on prepared operands."""


class _Convolution:
    def comparable(self, problem: ways.Problem) -> bool:
        return backends.comparable(problem)

    def every(self, problem: ways.Problem) -> list[plan.Plan]:
        return plan.every(problem)

    def choice(self, found: list[plan.Plan]) -> plan.Plan:
        return plan.choice(found)

    def plans(self, problem: ways.Problem, ways_of_it: Sequence[plan.Plan]) -> list[plan.Plan]:
        return space.plans(problem, ways_of_it)

    def with_config(self, problem: ways.Problem, p: plan.Plan, config: KernelConfig) -> plan.Plan:
        return plan.with_config(problem, p, config)

    def key_of(self, problem: ways.Problem, p: plan.Plan) -> tuple[Key, Extents]:
        return ways.key_of(problem, p.layout)

    def place(self, p: plan.Plan) -> Hashable:
        return p.layout

    def case(self, problem: ways.Problem, device: torch.device, seed: int) -> tuple[execute.Call, Tensor]:
        return operands.operands(problem, device, seed)

    def bytes_of(self, problem: ways.Problem) -> int:
        return operands.bytes_of(problem)

    def expected(self, problem: ways.Problem, case: tuple[execute.Call, Tensor]) -> Tensor:
        return operands.expected(problem, case[0])

    def wrong(self, problem: ways.Problem, p: plan.Plan, case: tuple[execute.Call, Tensor], want: Tensor) -> str | None:
        return operands.wrong(problem, p, *case, want)

    def prepared(self, p: plan.Plan, case: tuple[execute.Call, Tensor]) -> dict[str, Tensor]:
        return execute.prepared(p, *case)[0]

    def work(self, p: plan.Plan, device: torch.device) -> Callable[[dict[str, Tensor]], None]:
        shared = execute.workspace(p, device)
        launches = p.launches[:-1] if p.fold else p.launches  # a fold is no part of the kernel

        def on(tensors: dict[str, Tensor]) -> None:
            for launch in launches:
                launch.run(tensors | shared)

        return on


class _Deformable:
    def comparable(self, problem: DeformProblem) -> bool:
        return False

    def every(self, problem: DeformProblem) -> list[deform_plan.DeformPlan]:
        return deform_plan.every(problem)

    def choice(self, found: list[deform_plan.DeformPlan]) -> deform_plan.DeformPlan:
        return deform_plan.choice(found)

    def plans(
        self, problem: DeformProblem, ways_of_it: Sequence[deform_plan.DeformPlan]
    ) -> list[deform_plan.DeformPlan]:
        others = [
            deform_plan.with_config(problem, p, config)
            for p in ways_of_it
            for config in deform.candidates(problem, p)[1:]
        ]
        return [*ways_of_it, *sorted(others, key=lambda p: p.seconds)]

    def with_config(
        self, problem: DeformProblem, p: deform_plan.DeformPlan, config: KernelConfig
    ) -> deform_plan.DeformPlan:
        return deform_plan.with_config(problem, p, config)  # type: ignore[arg-type]

    def key_of(self, problem: DeformProblem, p: deform_plan.DeformPlan) -> tuple[Key, Extents]:
        return deform_plan.key_of(p.problem)

    def place(self, p: deform_plan.DeformPlan) -> Hashable:
        return p.packs

    def case(self, problem: DeformProblem, device: torch.device, seed: int) -> deform.Case:
        return deform.case(problem, device, seed)

    def bytes_of(self, problem: DeformProblem) -> int:
        return deform.bytes_of(problem)

    def expected(self, problem: DeformProblem, case: deform.Case) -> tuple[Tensor, ...]:
        return deform.expected(problem, case)

    def wrong(
        self, problem: DeformProblem, p: deform_plan.DeformPlan, case: deform.Case, want: tuple[Tensor, ...]
    ) -> str | None:
        return deform.wrong(problem, p, case, want)

    def prepared(self, p: deform_plan.DeformPlan, case: deform.Case) -> dict[str, Tensor]:
        return deform_run.laid(p, case)

    def work(self, p: deform_plan.DeformPlan, device: torch.device) -> Callable[[dict[str, Tensor]], None]:
        return lambda tensors: deform_run.launched(p, tensors)


class _Branches:
    def comparable(self, problem: branches_problem.Problem) -> bool:
        return False

    def every(self, problem: branches_problem.Problem) -> list[BranchesPlan]:
        return branches_plan.every(problem)

    def choice(self, found: list[BranchesPlan]) -> BranchesPlan:
        return branches_plan.choice(found)

    def plans(self, problem: branches_problem.Problem, ways_of_it: Sequence[BranchesPlan]) -> list[BranchesPlan]:
        return branches.plans(ways_of_it)

    def with_config(self, problem: branches_problem.Problem, p: BranchesPlan, config: KernelConfig) -> BranchesPlan:
        return branches_plan.with_config(p, config)  # type: ignore[arg-type]

    def key_of(self, problem: branches_problem.Problem, p: BranchesPlan) -> tuple[Key, Extents]:
        return branches_ways.key_of(p.problem)

    def place(self, p: BranchesPlan) -> Hashable:
        return p.moves, p.packs

    def case(self, problem: branches_problem.Problem, device: torch.device, seed: int) -> branches.Case:
        return branches.case(problem, device, seed)

    def bytes_of(self, problem: branches_problem.Problem) -> int:
        return branches.bytes_of(problem)

    def expected(self, problem: branches_problem.Problem, case: branches.Case) -> tuple[Tensor, ...]:
        return branches.expected(problem, case)

    def wrong(
        self, problem: branches_problem.Problem, p: BranchesPlan, case: branches.Case, want: tuple[Tensor, ...]
    ) -> str | None:
        return branches.wrong(problem, p, case, want)

    def prepared(self, p: BranchesPlan, case: branches.Case) -> dict[str, Tensor]:
        return branches.prepared(p, case)

    def work(self, p: BranchesPlan, device: torch.device) -> Callable[[dict[str, Tensor]], None]:
        def on(tensors: dict[str, Tensor]) -> None:
            for launch in p.direct:
                launch.run(tensors)

        return on


_CONVOLUTION, _DEFORMABLE, _BRANCHES = _Convolution(), _Deformable(), _Branches()


def of(problem: AnyProblem) -> Subject:
    """The kind of a problem."""
    if isinstance(problem, branches_problem.Problem):
        return _BRANCHES
    return _DEFORMABLE if isinstance(problem, DeformProblem) else _CONVOLUTION


def streaming(p: StreamingPlan) -> ways.Problem | None:
    """The ordinary problem by whose stored configs a streaming convolution runs, whatever the frames of its chunk.

    None where an ordinary plan of it computes on other axes, and files its configs under these.
    """
    alike, layout = streaming_plan.asked_as(p.problem)
    filed = {ways.key_of(alike, found.layout) for found in plan.every(alike)}
    return alike if ways.key_of(alike, layout) in filed else None
