"""Units of stage b about single numbers: what is not finite, denormals, activations at their corners, error growth."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from itertools import product
from typing import Any

import torch

from triton_conv.epilogue import ACTIVATIONS

from .. import numerics, special, special_layers
from . import checking
from .record import Facts
from .units import Context, Unit

_SEEDS = 3
_LONG = 240.0  # seconds: a dozen kernels are compiled


def units(context: Context) -> Iterator[Unit]:
    """In a simulation a few of each."""
    some = slice(None, 2) if context.simulate else slice(None)
    for name in list(special_layers.LAYERS)[some]:
        kernel = special_layers.LAYERS[name].kernels[0]
        yield Unit(f"not finite: {name}", partial(_escapes, name, context), _LONG, kernel)
    yield Unit("denormals", partial(_denormals, context), _LONG)
    for name in ACTIVATIONS[some]:
        yield Unit(f"corners of {name}", partial(_corners, name, context), _LONG)
    for mode in numerics.modes(context.device)[some]:
        yield Unit(f"error growth, {mode.name}", partial(_growth, mode, context), _LONG)
    yield Unit("error growth by slabs", partial(_slabs, context), _LONG)


def _found(wrong: list[str]) -> Facts:
    return {"ok": not wrong, "words": "; ".join(wrong[:3]) or "as PyTorch, or as the table says", "wrong": wrong}


def _each(steps: Iterator[Any], context: Context) -> list[Any]:
    """What they give, each watched by itself: all of them compile kernels as they go."""
    found = []
    while True:
        with checking.watched(context):
            try:
                found.append(next(steps))
            except StopIteration:
                return found


def _escapes(name: str, context: Context) -> Facts:
    seeds = range(1 if context.simulate else _SEEDS)
    found = _each((special.escapes(name, context.device, seed) for seed in seeds), context)
    return _found(sum(found, []))


def _denormals(context: Context) -> Facts:
    """Those of bfloat16 too, where kernels are not interpreted."""
    dtypes = (torch.float16, torch.float32) if context.simulate else special.FLOATS
    asked = list(product(dtypes, (1, 16)))
    found = _each((special.denormals(*how, context.device) for how in asked), context)
    return _found([f"{how}: {words}" for how, wrong in zip(asked, found, strict=True) for words in wrong])


def _corners(name: str, context: Context) -> Facts:
    found = _each((special.corners(name, dtype, context.device) for dtype in special.FLOATS), context)
    return _found(sum(found, []))


def _growth(mode: numerics.Mode, context: Context) -> Facts:
    depths = numerics.DEPTHS[:2] if context.simulate else numerics.DEPTHS
    found = _each(numerics.growth(mode, depths, context.device), context)
    return _errors(found, numerics.table(found))


def _slabs(context: Context) -> Facts:
    depth = numerics.DEPTHS[1] if context.simulate else numerics.DEPTHS[-1]
    found = _each(numerics.by_slabs(depth, context.device), context)
    table = ", ".join(f"{slabs} slabs {e.ours:.1e}" for slabs, e in found)
    return _errors([e for _, e in found], table)


def _errors(found: list[numerics.Errors], table: str) -> Facts:
    wrong = [f"{e.role} of {e.operands} operands, GEMM_K {e.depth}: {e.ours:.1e}" for e in found if not e.ok]
    most = max(e.ours for e in found)
    words = f"beyond what may be: {'; '.join(wrong[:3])}" if wrong else f"largest error {most:.1e} of a result's size"
    return {"ok": not wrong, "words": words, "errors": [e._asdict() for e in found], "table": table}
