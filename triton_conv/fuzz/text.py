"""Cases as text: one line is the call that makes one, read without evaluating anything; a corpus is a file of lines."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints

from .causal import Causal, Streaming
from .compound import Branches, Separable
from .convolutions import Convolution
from .deforming import Deformable
from .drawn import Drawn

KINDS: dict[str, type[Drawn]] = {
    kind.__name__: kind for kind in (Convolution, Separable, Branches, Deformable, Causal, Streaming)
}
LONGEST_LINE, LARGEST_FILE, LARGEST_NUMBER = 4_000, 2**20, 10**7


def parse(line: str) -> Drawn:
    """The case that a line says: `repr` of one.

        >>> parse("Convolution(C=3, K=4, spatial=(9,), kernel=(3,), dtype='float16')")
        Convolution(C=3, K=4, spatial=(9,), kernel=(3,), dtype='float16')

    Raises ValueError for everything else, and for what is no convolution or no small one.
    """
    if len(line) > LONGEST_LINE:
        raise ValueError(f"a case has at most {LONGEST_LINE} characters, but this line has {len(line)}")
    try:
        call = ast.parse(line.strip(), mode="eval").body
        if not isinstance(call, ast.Call) or not isinstance(call.func, ast.Name) or call.args:
            raise ValueError("it is no call with keywords")
        given = {str(keyword.arg): ast.literal_eval(keyword.value) for keyword in call.keywords}
    except (SyntaxError, ValueError, TypeError, RecursionError, MemoryError) as error:
        raise ValueError(f"this is no case: {line.strip()[:200]!r} ({error})") from None
    kind = KINDS.get(call.func.id)
    if kind is None:
        raise ValueError(f"{call.func.id!r} is not one of {', '.join(KINDS)}")
    wanted = get_type_hints(kind)
    known = {f.name: wanted[f.name] for f in fields(kind)}
    for name, value in given.items():
        if name not in known:
            raise ValueError(f"{kind.__name__} has no field {name!r}")
        if not _fits(value, known[name]):
            raise ValueError(f"{kind.__name__}: {name}={value!r} is no {known[name]}")
    case = kind(**given)
    if not case.valid():
        raise ValueError(f"this is no convolution, or a large one: {line.strip()}")
    return case


def _fits(value: Any, kind: Any) -> bool:
    origin, inner = get_origin(kind), get_args(kind)
    if origin in (Union, UnionType):
        return any(_fits(value, one) for one in inner)
    if origin is tuple:
        if not isinstance(value, tuple):
            return False
        if inner[-1] is ...:
            return all(_fits(one, inner[0]) for one in value)
        return len(value) == len(inner) and all(map(_fits, value, inner))
    if kind is Any:
        kinds = (bool, int, float, str, NoneType)
        return isinstance(value, kinds) or (isinstance(value, tuple) and all(_fits(one, Any) for one in value))
    if kind is int:
        return type(value) is int and abs(value) <= LARGEST_NUMBER
    return type(value) is (NoneType if kind is None else kind)


def read(path: Path) -> list[Drawn]:
    """The cases of a corpus; empty lines and those that begin with # say nothing. Raises ValueError with the line."""
    if path.stat().st_size > LARGEST_FILE:
        raise ValueError(f"{path}: a corpus has at most {LARGEST_FILE} bytes")
    return [case for _, case in _lines(path)]


def _lines(path: Path) -> Iterator[tuple[int, Drawn]]:
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        if not line.strip() or line.startswith("#"):
            continue
        try:
            yield number, parse(line)
        except ValueError as error:
            raise ValueError(f"{path}, line {number}: {error}") from None


def keep(path: Path, case: Drawn) -> None:
    """Adds a case to a corpus that has not got it."""
    if not path.exists() or case not in read(path):
        with path.open("a", encoding="utf-8") as file:
            file.write(f"{case!r}\n")
