"""What a deformable convolution launches, as a pure function of numbers: shapes, dtypes, strides and device in, plan out.

A plan prints itself (`str(plan)`).
"""

from __future__ import annotations

from dataclasses import dataclass

from .config import Config
from .deform_config import DeformProblem, DeformRole
from .frozen import Frozen

__all__ = ["DeformPlan", "DeformProblem", "DeformRole", "make"]


@dataclass(frozen=True)
class DeformPlan(Frozen):
    """A kernel and everything it is launched with, for tensors of any address."""

    asked: DeformProblem
    config: Config


def make(problem: DeformProblem) -> DeformPlan:
    """The plan of a problem; the second time it is a look-up."""
    raise NotImplementedError
