"""Random wrong calls: one argument, or two, of a right one replaced by a value that may not fit.

What PyTorch says of the same call, or of the plain convolutions a function is made of, is what ours has to say.
"""

import random
import re
from collections.abc import Callable, Sequence
from typing import Any

import invalid_functions as functions
import invalid_modules as modules
import torch
from invalid_arguments import MUTANTS, Once, another_tensor
from invalid_functions import Case, UnaskedError
from torch import Tensor

FAMILIES: dict[str, Callable[[random.Random], Case]] = {
    "conv": functions.plain_convolution,
    "conv_transpose": functions.transposed_convolution,
    "fused": functions.fused_convolution,
    "borders": functions.bordered_convolution,
    "borders of videos": functions.bordered_video,
    "override": functions.overridden_convolution,
    "override operators": functions.overridden_operator,
    "scaled_conv": functions.scaled_convolution,
    "int_conv": functions.int_convolution,
    "separable_conv": functions.separable_convolution,
    "causal_conv1d": functions.causal_convolution,
    "causal chunks": functions.chunked_convolution,
    "deform_conv2d": functions.deformable_convolution,
    "multi_conv2d": functions.branched_convolution,
    "torch's modules": modules.of_torch,
    "own modules": modules.of_ours,
}


def wrong_call(family: str, seed: int) -> tuple[Case, dict[str, Any], tuple[str, ...]]:
    """A case, arguments that may be wrong, and which of them differ from the case's."""
    rng = random.Random(f"{family} {seed}")
    case = FAMILIES[family](rng)
    given = dict(case.arguments)
    changed = tuple(rng.sample(list(case.kinds), rng.choice((1, 1, 1, 2))))
    for argument in changed:
        kind = case.kinds[argument]
        if kind == "tensor":
            given[argument] = another_tensor(rng, given[argument], case.rank)
        else:
            given[argument] = MUTANTS[kind](rng, case.rank)
    return case, given, changed


def described(case: Case, given: dict[str, Any], changed: Sequence[str]) -> str:
    """A call as one line, what was changed first."""

    def text(value: Any) -> str:
        if not isinstance(value, Tensor):
            return repr(value)
        if value.is_nested:
            return "nested"
        kind = "" if value.layout is torch.strided else f" {value.layout}"
        return f"{list(value.shape)} {value.dtype} {value.device}{kind}"

    first = ", ".join(f"{a}={text(given[a])}" for a in changed)
    rest = ", ".join(f"{a}={text(v)}" for a, v in given.items() if a not in changed)
    return f"{case.name}({first} | {rest})"


WRONG = (TypeError, ValueError, RuntimeError)  # what a wrong argument may raise; NotImplementedError is a RuntimeError


def _made(function: Callable[..., Any], given: dict[str, Any]) -> Any:
    """What a call returns or raises."""
    try:
        made = function(**{a: iter(v.entries) if isinstance(v, Once) else v for a, v in given.items()})
        return made[0] if isinstance(made, tuple) else made
    except Exception as error:
        return error


# Bugs of PyTorch's parser, which it asks to report; convolutions that its CPU backends have not, or one of them has;
# and exceptions that say what memory there is not.
EXCUSED = (
    "INTERNAL ASSERT",
    "Could this error message be improved",
    "non-empty 2D or 4D weight",
    "non-empty 5D",
    "could not create a primitive",
)
NO_MEMORY = ("calculation overflowed", "can't allocate memory", "could not create a primitive")
NO_MEMORY += ("iteration over a 0-d",)  # what constructors of torch's say of padding


def fault(family: str, seed: int) -> str:
    """What is wrong with what a random wrong call of ours does; "" if nothing is."""
    case, given, changed = wrong_call(family, seed)
    ours = _made(case.ours, given)
    refused = isinstance(ours, Exception)
    why = ""
    if refused and (not isinstance(ours, WRONG) or isinstance(ours, RecursionError)):
        why = "not an exception for wrong arguments"
    theirs = _made(case.theirs, given) if case.theirs else UnaskedError()
    if not why and not isinstance(theirs, UnaskedError) and set(changed) <= case.shared and not _mixed(case, given):
        why = _different(case, given, changed, ours, theirs)
    if not why and refused and not _names(case, str(ours)) and str(ours)[:80] != str(theirs)[:80]:
        why = "names no argument"
    return f"{why}: {family} {seed}, {described(case, given, changed)}: {ours!r}" if why else ""


def _mixed(case: Case, given: dict[str, Any]) -> bool:
    """Whether PyTorch does not look at what these are: devices of meta tensors, anything about empty ones.

    Without input channels it has no output channels either.
    """
    tensors = [t for t in given.values() if isinstance(t, Tensor) and not t.is_nested]
    empty = any(t.numel() == 0 for t in tensors)
    alike = len({(t.dtype, t.layout) for t in tensors}) == 1 and all(0 not in t.shape[1:] for t in tensors)
    return len({t.device for t in tensors}) > 1 or (empty and not alike)


def _different(case: Case, given: dict[str, Any], changed: Sequence[str], ours: Any, theirs: Any) -> str:
    if isinstance(theirs, Exception) and any(words in str(theirs) for words in EXCUSED):
        return ""
    if not isinstance(theirs, Exception):
        if isinstance(ours, Exception):
            return "" if _unseen(given, changed, ours, theirs) else "PyTorch accepts this"
        same = ours.shape == theirs.shape and ours.dtype == theirs.dtype
        if same and not ours.is_meta:
            same = torch.allclose(ours, theirs, rtol=1e-2, atol=1e-2, equal_nan=True)
        return "" if same else "other values than PyTorch's"
    if not isinstance(ours, Exception):
        return "" if isinstance(given.get("padding_mode"), tuple) else f"PyTorch raises {theirs!r}"
    # of two wrong arguments either may be complained about
    alone = (_made(case.theirs, case.arguments | {a: given[a]}) for a in changed) if len(changed) > 1 else ()
    allowed = tuple({type(e) for e in (theirs, *alone) if isinstance(e, Exception)})
    stumbled = isinstance(theirs, NotImplementedError) and (
        "not implemented for" in str(theirs) or "Supported combinations" in str(theirs)
    )
    if stumbled or any(isinstance(t, Tensor) and t.layout is not torch.strided for t in given.values()):
        allowed += (RuntimeError,)  # PyTorch's depends on which operator stumbles
    return "" if isinstance(ours, allowed) else f"PyTorch raises {theirs!r}"


def _unseen(given: dict[str, Any], changed: Sequence[str], ours: Exception, theirs: Tensor) -> bool:
    """Whether what is wrong is what PyTorch does not look at, or one of its backends does not.

    That is anything about empty tensors, a sum beyond 64 bits, another dtype of a bias, no dilation of a single tap,
    padding of a module that crops.
    """
    beyond = any(abs(n) >= 2**62 for a in changed for n in _flat(given[a]))
    none = "dilation" in changed and "dilation" in str(ours)
    crops = given.get("padding_mode", "zeros") != "zeros" and "negative padding" in str(ours)
    other = any(words in str(ours) for words in ("should be the same", "has dtype", "not Fraction"))
    return theirs.numel() == 0 or beyond or none or crops or other


def _flat(value: Any) -> list[int]:
    entries = value if isinstance(value, (tuple, list)) else [value]
    return [e for e in entries if isinstance(e, int)]


def _names(case: Case, message: str) -> bool:
    """Whether a message names an argument, or says that there is not so much memory."""
    words = re.findall(r"\w+", message)
    return any(a in words for a in (*case.kinds, "input", "x", "weight", "offset")) or any(
        text in message for text in NO_MEMORY
    )
