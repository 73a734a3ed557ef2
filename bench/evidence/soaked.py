"""What is left of a stage's time in calls of random shapes and kinds, with all that the process holds flat."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

from ..soak import soak, words
from .units import Context, Unit

_SECONDS, _RESERVE = 300.0, 40.0  # at most, and what is left for the last round
_SEED = 1


def units(context: Context) -> Iterator[Unit]:
    """One."""
    yield Unit("soak", partial(soaked, context), timeout=_SECONDS + 150)


def soaked(context: Context) -> dict[str, Any]:
    """Facts of a soak, with the holdings after each round."""
    seconds = 1.0 if context.simulate else min(_SECONDS, max(context.left() - _RESERVE, 10.0))
    found = soak(seconds, context.device, _SEED, calls=2 if context.simulate else None)
    faults = [fault for fault in found.faults if not (context.simulate and fault.startswith("too few rounds"))]
    text = f"{found.calls} calls in {len(found.rounds)} rounds, {found.seconds:.0f} s; {words(found.rounds[-1])}"
    text += f"; {'; '.join(faults[:3])}" if faults else ""
    return {"ok": not faults, "words": text, "faults": faults, "rounds": [now._asdict() for now in found.rounds]}
