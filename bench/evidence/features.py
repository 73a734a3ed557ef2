"""Stage f: tensors of more than 2^31 elements, CUDA graphs, streams, `torch.compile`, host cost and memory."""

from __future__ import annotations

from collections.abc import Iterator

from . import capture, compiled, huge, steady
from .units import Context, Unit

NAME = "f"
ABOUT = "more than 2^31 elements, CUDA graphs, streams, torch.compile, host cost, float16, memory, the same bits"
LIMIT = 470.0


def units(context: Context) -> Iterator[Unit]:
    """The quick ones first."""
    for room in (capture, steady, huge, compiled):
        yield from room.units(context)
