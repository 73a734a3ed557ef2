"""Units of stage b about single numbers: what is not finite, denormals, activations at their corners, error growth."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch

from triton_conv.epilogue import ACTIVATIONS

from .. import numerics, special, special_layers
from . import checking
from .record import Facts
from .units import Context, Unit

_SEEDS = 3


def units(context: Context) -> Iterator[Unit]:
    """In a simulation a few of each."""
    some = slice(None, 2) if context.simulate else slice(None)
    for name in list(special_layers.LAYERS)[some]:
        kernel = special_layers.LAYERS[name].kernels[0]
        yield Unit(f"not finite: {name}", partial(_escapes, name, context), kernel=kernel)
    yield Unit("denormals", partial(_denormals, context))
    for name in ACTIVATIONS[some]:
        yield Unit(f"corners of {name}", partial(_corners, name, context))
    for mode in numerics.modes(context.device)[some]:
        yield Unit(f"error growth, {mode.name}", partial(_growth, mode, context))
    yield Unit("error growth by slabs", partial(_slabs, context))


def _found(wrong: list[str]) -> Facts:
    return {"ok": not wrong, "words": "; ".join(wrong[:3]) or "as PyTorch, or as the table says", "wrong": wrong}


def _escapes(name: str, context: Context) -> Facts:
    seeds = range(1 if context.simulate else _SEEDS)
    with checking.watched(context):
        return _found([words for seed in seeds for words in special.escapes(name, context.device, seed)])


def _denormals(context: Context) -> Facts:
    """Those of bfloat16 too, where kernels are not interpreted."""
    dtypes = [torch.float16, torch.float32] if context.simulate else [*special.FLOATS]
    wrong = []
    with checking.watched(context):
        for dtype in dtypes:
            for groups in (1, 16):
                wrong += [f"{dtype}: {words}" for words in special.denormals(dtype, groups, context.device)]
    return _found(wrong)


def _corners(name: str, context: Context) -> Facts:
    with checking.watched(context):
        found = [words for dtype in special.FLOATS for words in special.corners(name, dtype, context.device)]
    return _found(found)


def _growth(mode: numerics.Mode, context: Context) -> Facts:
    depths = numerics.DEPTHS[:2] if context.simulate else numerics.DEPTHS
    with checking.watched(context):
        found = list(numerics.growth(mode, depths, context.device))
    return _errors(found, numerics.table(found))


def _slabs(context: Context) -> Facts:
    depth = numerics.DEPTHS[1] if context.simulate else numerics.DEPTHS[-1]
    with checking.watched(context):
        found = list(numerics.by_slabs(depth, context.device))
    table = ", ".join(f"{slabs} slabs {e.ours:.1e}" for slabs, e in found)
    return _errors([e for _, e in found], table)


def _errors(found: list[numerics.Errors], table: str) -> Facts:
    wrong = [f"{e.role} of {e.operands} operands, GEMM_K {e.depth}: {e.ours:.1e}" for e in found if not e.ok]
    most = max(e.ours for e in found)
    words = f"beyond what may be: {'; '.join(wrong[:3])}" if wrong else f"largest error {most:.1e} of a result's size"
    return {"ok": not wrong, "words": words, "errors": [e._asdict() for e in found], "table": table}
