"""Stage f: tensors of more than 2^31 elements, CUDA graphs, streams, `torch.compile`, host cost, memory and a soak."""

from __future__ import annotations

from collections.abc import Iterator

from . import bits, capture, compiled, huge, soaked, steady
from .units import Context, Unit

NAME = "f"
ABOUT = "more than 2^31 elements, CUDA graphs, streams, torch.compile, host cost, float16, memory, same bits, a soak"
LIMIT = 470.0


def units(context: Context) -> Iterator[Unit]:
    """Those that say most in the least time first."""
    host_cost, *others = steady.units(context)
    yield host_cost
    first, last = (bits, capture), (compiled, huge, soaked)
    for found in (*(room.units(context) for room in first), others, *(room.units(context) for room in last)):
        yield from found
