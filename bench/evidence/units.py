"""What a stage of the evidence run is made of."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Context:
    """What a stage is told: where its files go, what it runs on and how long it may take.

    `left()` gives the seconds left for this stage; a long unit asks it and stops in time.
    With `simulate` everything runs on the CPU and times come from a simulated clock.
    """

    out: Path
    device: torch.device
    simulate: bool
    left: Callable[[], float]


class Unit(NamedTuple):
    """One piece of a stage that can fail by itself: its name and what it does.

    `run()` returns facts that JSON can hold, always with `ok: bool` and `words: str` (one line for a person); with
    `"unfinished": True` it goes on when the run is resumed. An exception is a failed unit. The name is stable, so that
    a run that goes on skips what is finished. `timeout` is how many seconds it may take before it counts as hung.
    Units of a `kernel` that has ended several processes are left out.
    """

    name: str
    run: Callable[[], dict[str, Any]]
    timeout: float = 120.0
    kernel: str = ""


def shunned(kernel: str) -> dict[str, Any]:
    """The facts of a unit of a kernel that would take too much time to fail once more."""
    words = f"left out: {kernel} has hung, or ended its process, before"
    return {"ok": False, "words": words, "unfinished": True}


class Stage(Protocol):
    """A stage: a module with these names.

    NAME is its letter, ABOUT one line for a person and LIMIT the most seconds it may take, below 480. All
    `units(context)` are listed before the first of them runs, in a resumed run too: that is to be cheap.
    """

    NAME: str
    ABOUT: str
    LIMIT: float

    def units(self, context: Context) -> Iterator[Unit]: ...
