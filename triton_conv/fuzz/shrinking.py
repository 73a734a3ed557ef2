"""Makes a failing case smaller, field by field, while it fails in the same way."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import fields, replace
from typing import Any

from .drawn import Drawn

_WORDS = ("", "zeros", "contiguous", "float32", "float64", "concatenate", "interpreter")  # the simplest first


def shrunk(case: Drawn, fails: Callable[[Drawn], bool], seconds: float = 60.0) -> Drawn:
    """The smallest case found within so many seconds that still fails: greedy, every step simplifies one thing.

    >>> big = Convolution(N=3, C=5, K=7, spatial=(9, 9), kernel=(3, 3), stride=(1, 1), ...)  # doctest: +SKIP
    >>> shrunk(big, lambda case: case.C >= 4).C  # doctest: +SKIP
    4
    """
    end = time.monotonic() + seconds
    tried: set[str] = {repr(case)}
    found = True
    while found:
        found = False
        for simpler in _simpler(case):
            if time.monotonic() > end:
                return case
            text = repr(simpler)
            if text in tried:
                continue
            tried.add(text)
            if simpler.valid() and fails(simpler):
                case, found = simpler, True
                break
    return case


def _simpler(case: Drawn) -> Iterator[Drawn]:
    """Cases that differ in one thing, or in one axis, the boldest first; some are no cases."""
    values = {f.name: getattr(case, f.name) for f in fields(case)}
    usual = {f.name: f.default for f in fields(case)}
    for name, value in values.items():
        if value != usual[name] and not isinstance(value, int | tuple):
            yield _with(case, {name: usual[name]})
    for name in ("batch", "candidate", "device", "places", "frozen", "again", "seed"):
        if values[name] != usual[name]:
            yield _with(case, {name: usual[name]})
    yield from _without_an_axis(case, values)
    yield from _equals_together(case, values)
    for name, value in values.items():
        if name != "seed" and value != usual[name]:
            for simpler in _values(value):
                yield _with(case, {name: simpler})


def _with(case: Drawn, values: dict[str, Any]) -> Drawn:
    changed: Any = values
    return replace(case, **changed)


def _without_an_axis(case: Drawn, values: dict[str, Any]) -> Iterator[Drawn]:
    rank = len(values.get("spatial", ()))
    for axis in range(rank if rank > 1 else 0):
        shorter = {
            name: value[:axis] + value[axis + 1 :]
            for name, value in values.items()
            if isinstance(value, tuple) and len(value) == rank and name not in ("frozen", "places", "parts", "chunks")
        }
        yield _with(case, shorter)


def _equals_together(case: Drawn, values: dict[str, Any]) -> Iterator[Drawn]:
    """Numbers that are equal may have to stay so, and multiples multiples, as channels and groups do."""
    numbers = {name: v for name, v in values.items() if type(v) is int and v > 1 and name not in ("seed", "candidate")}
    for value in set(numbers.values()):
        alike = [name for name, v in numbers.items() if v == value]
        multiples = [name for name, v in numbers.items() if v % value == 0]
        for smaller in (1, 2, value // 2, value - 1):
            if smaller < value:
                yield _with(case, dict.fromkeys(alike, smaller))
                yield _with(case, {name: numbers[name] // value * smaller for name in multiples})


def _values(value: Any) -> Iterator[Any]:
    """Simpler values than this one."""
    if isinstance(value, bool) or value is None:
        if value:
            yield False
    elif isinstance(value, int):
        yield from sorted({v for v in (0, 1, 2, value // 2, value - 1) if 0 <= v < value})
    elif isinstance(value, float):
        yield from (v for v in (0.0, 1.0) if abs(v) < abs(value))
    elif isinstance(value, str):
        yield from _WORDS[: _WORDS.index(value)] if value in _WORDS else _WORDS
    elif isinstance(value, tuple):
        for i in range(len(value)):
            yield value[:i] + value[i + 1 :]
        for i, one in enumerate(value):
            for simpler in _values(one):
                yield (*value[:i], simpler, *value[i + 1 :])
