"""Stage f: tensors of more than 2^31 elements, CUDA graphs, streams, `torch.compile`, host cost and memory."""

from __future__ import annotations

from collections.abc import Iterator

from . import bits, capture, compiled, huge, steady
from .units import Context, Unit

NAME = "f"
ABOUT = "more than 2^31 elements, CUDA graphs, streams, torch.compile, host cost, float16, memory, the same bits"
LIMIT = 470.0


def units(context: Context) -> Iterator[Unit]:
    """Those that say most in the least time first."""
    host_cost, *others = steady.units(context)
    yield host_cost
    for room in (bits.units(context), capture.units(context), others, compiled.units(context), huge.units(context)):
        yield from room
