"""Wrong calls of tensors without memory and numbers that are symbols, as torch.compile and torch.export make them."""

from typing import Any

import torch
from invalid_arguments import Once
from invalid_calls import NO_MEMORY, WRONG, described, wrong_call
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv

_OFFSET = 5  # a symbol stands for this number, and others are as far from it as they are from this


def _symbolic(mode: FakeTensorMode, value: Any) -> Any:
    """The same with symbols for sizes and whole numbers."""
    if isinstance(value, Tensor):
        return mode.from_tensor(value, static_shapes=False)
    if type(value) is int and abs(value) < 2**60:
        return mode.from_tensor(torch.empty(_OFFSET, device="meta"), static_shapes=False).shape[0] + value - _OFFSET
    if type(value) in (tuple, list):
        return type(value)(_symbolic(mode, v) for v in value)
    return value


def _fits(kind: str, value: Any) -> bool:
    """Whether there is such a thing without memory: no number in a tensor, say, and nothing that is read once."""
    if isinstance(value, Tensor):
        return kind == "tensor" and value.layout is torch.strided and not value.is_nested
    return not isinstance(value, Once)


def fault(family: str, seed: int) -> str:
    """How a call of symbols differs from the same of numbers: only one raises, other exceptions, other shapes."""
    case, given, changed = wrong_call(family, seed)
    if not all(_fits(case.kinds[a], v) for a, v in given.items() if a in case.kinds):
        return ""
    real, mode = _outcome(case.ours, given), FakeTensorMode(shape_env=ShapeEnv(), allow_non_fake_inputs=False)
    with mode:
        found = _outcome(case.ours, {a: _symbolic(mode, v) for a, v in given.items()})
    told = f"{family} {seed}, {described(case, given, changed)}: {found!r} of symbols, {real!r} of numbers"
    if isinstance(real, Exception) and any(words in str(real) for words in NO_MEMORY):
        return ""
    if isinstance(found, Exception) != isinstance(real, Exception):
        return told
    if isinstance(found, Exception):
        return "" if type(found) is type(real) and isinstance(found, WRONG) else told
    shape = [n.node.hint if isinstance(n, torch.SymInt) else n for n in found.shape]
    return "" if shape == list(real.shape) and found.dtype is real.dtype else told


def _outcome(function: Any, given: dict[str, Any]) -> Any:
    try:
        made = function(**given)
        return made[0] if isinstance(made, tuple) else made
    except Exception as error:
        return error
