"""What becomes of an argument that was right: values of every type and size, of its own kind or of another."""

import enum
import random
from collections.abc import Callable, Sequence
from fractions import Fraction
from typing import Any, NamedTuple

import numpy as np
import torch


class Index:
    """What operator.index takes."""

    def __init__(self, value: int):
        self.value = value

    def __index__(self) -> int:
        return self.value

    def __repr__(self) -> str:
        return f"Index({self.value})"


class Once(NamedTuple):
    """An iterator, made anew for every call."""

    entries: Sequence[Any]


class Number(int):
    """A subclass of int."""


class Choice(enum.IntEnum):
    ONE = 1
    TWO = 2


NUMBERS = (0, -1, -(2**62), 3, 7, 2**45, 2**46 + 1, 2**62, 2**63 - 1, 2**63, -(2**63) - 1)
ODD = (True, False, 1.0, 2.5, float("nan"), None, "1", "", b"1", 1j, Fraction(1), Number(1), Number(2), Choice.ONE)
ODD += (Choice.TWO, Index(1), {1}, {1: 1}, object(), np.int64(1), np.int32(2), np.uint8(1), np.bool_(True), slice(1))
ODD += (np.float32(1), np.array(1), np.array([1]), np.array([1, 1]), torch.int64, len)


def _whole(rng: random.Random, rank: int) -> Any:
    tensors = (torch.tensor(1), torch.tensor([1]), torch.tensor(True), torch.tensor(1.0), torch.tensor([1, 1, 1, 1]))
    return rng.choice((*NUMBERS, *ODD, *tensors))


def _wholes(rng: random.Random, rank: int) -> Any:
    if rng.random() < 0.5:
        return _whole(rng, rank)
    length = rng.choice((rank, rank, 0, 1, 2, 3, 4, 5))
    entries = [rng.choice((1, 2)) for _ in range(length)]
    if entries and rng.random() < 0.7:
        entries[rng.randrange(length)] = _whole(rng, rank)
    return rng.choice((tuple, list, Once, torch.Size, np.array))(entries) if _plain(entries) else tuple(entries)


def _plain(entries: Sequence[Any]) -> bool:
    return all(type(e) is int and abs(e) < 2**62 for e in entries)


def _padding(rng: random.Random, rank: int) -> Any:
    if rng.random() < 0.2:
        return rng.choice(("same", "valid", "SAME", "zeros"))
    return _wholes(rng, rank)


def _text(rng: random.Random, rank: int) -> Any:
    return rng.choice(("", "relu", "Relu", "silu", "zeros", "zeros,zeros", "ieee", *ODD, ("zeros",) * 2, torch.ones(2)))


def _truth(rng: random.Random, rank: int) -> Any:
    return rng.choice((0, 1, "yes", *ODD, torch.tensor(True)))


def _number(rng: random.Random, rank: int) -> Any:
    return rng.choice((2, -1.5, float("inf"), 10**400, *ODD, torch.tensor(1.0), torch.ones(2)))


def _dtype(rng: random.Random, rank: int) -> Any:
    return rng.choice((torch.float64, torch.int8, torch.float8_e4m3fn, torch.complex64, torch.bool, *ODD))


DTYPES = (torch.float64, torch.float16, torch.bfloat16, torch.int8, torch.int64, torch.bool, torch.complex64)
DTYPES += (torch.float8_e4m3fn, torch.float8_e5m2, torch.uint16)


def another_tensor(rng: random.Random, t: Any, rank: int) -> Any:
    """Another tensor or none."""
    t = torch.ones(3) if t is None else t
    return rng.choice(
        (
            lambda: rng.choice((None, 1, 1.0, "x", [1.0], [[1.0]], np.ones(3), object(), t.shape, ())),
            lambda: t.to(rng.choice(DTYPES)),
            lambda: t.to("meta"),
            lambda: t.unsqueeze(rng.randrange(t.dim() + 1)),
            t.flatten,
            lambda: t[0] if t.dim() and t.shape[0] else t.unsqueeze(0),
            lambda: (
                t.narrow(axis := rng.randrange(t.dim()), 0, rng.randrange(t.shape[axis] or 1)) if t.dim() else t[None]
            ),
            lambda: torch.cat((t, t), rng.randrange(t.dim())) if t.dim() else t[None],
            lambda: t.float().to_sparse(),
            lambda: torch.nested.nested_tensor([torch.ones(2), torch.ones(3)]),
            lambda: t.transpose(0, -1),
        )
    )()


def _border(rng: random.Random, rank: int) -> Any:
    """Padding of an input that may have fewer positions than it."""
    one = (0, 1, 2, 3, 4, 5, 6, 7, -1, 2**45)
    kind = rng.randrange(4)
    if kind < 2:
        return rng.choice(one) if kind else tuple(rng.choice((*one, True)) for _ in range(rank))
    if kind == 2:
        return tuple((rng.choice(one), rng.choice(one)) for _ in range(rank))
    return _padding(rng, rank)


def _rates(rng: random.Random, rank: int) -> Any:
    """Numbers, as many as there are."""
    many = rng.choice(((), (1,), [2], "12", 2, None, torch.tensor([1, 2]), {1: 2}, (1, (2, 2)), iter((1, 2))))
    return many if rng.random() < 0.5 else (1, _whole(rng, rank))


MUTANTS: dict[str, Callable[[random.Random, int], Any]] = {
    "int": _whole,
    "ints": _wholes,
    "padding": _padding,
    "border": _border,
    "rates": _rates,
    "text": _text,
    "bool": _truth,
    "truth": lambda rng, rank: rng.choice((True, False, 0, 1, None, "", "no", 2.5, object())),
    "float": _number,
    "dtype": _dtype,
}
