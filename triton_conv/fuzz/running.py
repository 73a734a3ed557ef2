"""Runs numbered cases, in processes beside each other if asked to."""

from __future__ import annotations

import multiprocessing
import random
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from typing import NamedTuple

import torch

from ..check import Result
from .drawn import Drawn
from .families import FAMILIES
from .shrinking import shrunk

Numbered = tuple[str, int, Drawn]  # family, number, case


class Outcome(NamedTuple):
    """What became of a case; `error` is the exception that ended it, in words, and `smaller` fails as it does."""

    family: str
    number: int
    case: Drawn
    results: list[Result]
    error: str = ""
    smaller: Drawn | None = None

    @property
    def ok(self) -> bool:
        """Whether nothing was raised and everything is within tolerance."""
        return not self.error and all(result.ok for result in self.results)

    @property
    def kind(self) -> str:
        """In which way it fails: by the exception's type, or by values."""
        return self.error.partition(":")[0] or ("" if self.ok else "values")


def drawn(family: str, seed: int, number: int) -> Drawn:
    """The case of a number, the same however many others there are.

    >>> drawn("conv", 7, 3) == drawn("conv", 7, 3)
    True
    """
    return FAMILIES[family](random.Random(f"{seed} {family} {number}"))


def numbered(families: Sequence[str], seed: int, first: int, count: int) -> Iterator[Numbered]:
    """`count` cases of each family, from the first number on, in turns."""
    for number in range(first, first + count):
        for family in families:
            yield family, number, drawn(family, seed, number)


def checked(one: Numbered, where: str = "cpu") -> Outcome:
    """Never raises but for a device that answers no more."""
    family, number, case = one
    try:
        return Outcome(family, number, case, case.check(where))
    except torch.AcceleratorError:
        raise
    except Exception as error:
        return Outcome(family, number, case, [], f"{type(error).__name__}: {error}")


def sweep(cases: Iterable[Numbered], where: str = "cpu", jobs: int = 1, seconds: float = 60.0) -> Iterator[Outcome]:
    """Checks cases in order; what fails is made smaller, for so many seconds."""
    how = ((case, where, seconds) for case in cases)
    if jobs == 1:
        yield from map(_swept, how)
        return
    # not forked: a process that has PyTorch's threads may hang in a copy of itself
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(jobs, mp_context=context, initializer=_one_thread) as pool:
        yield from pool.map(_swept, how, chunksize=4)


def _one_thread() -> None:
    torch.set_num_threads(1)


def _swept(how: tuple[Numbered, str, float]) -> Outcome:
    (family, number, case), where, seconds = how
    outcome = checked((family, number, case), where)
    if outcome.ok or not seconds:
        return outcome
    kind = outcome.kind
    smaller = shrunk(case, lambda other: checked((family, number, other), where).kind == kind, seconds)
    return outcome._replace(smaller=smaller)
