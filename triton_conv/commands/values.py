"""Values of arguments: each function reads one from text, and raises ArgumentTypeError for what is none."""

from __future__ import annotations

import argparse
from typing import Any

from .. import installed
from ..devices import DEVICES


def whole(text: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number") from None


def positive(text: str) -> int:
    value = whole(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} is not positive")
    return value


def count(text: str) -> int:
    value = whole(text)
    if value < 0:
        raise argparse.ArgumentTypeError(f"{value} is negative")
    return value


def dtypes() -> dict[str, Any]:
    from ..check import DTYPES

    return {str(dtype).removeprefix("torch."): dtype for dtype in DTYPES}


def dtype_names() -> str:
    return ", ".join(dtypes())


def dtype(text: str) -> Any:
    known = dtypes()
    if text not in known:
        raise argparse.ArgumentTypeError(f"{text!r} is not one of {', '.join(known)}")
    return known[text]


def dtype_or_float8(text: str) -> Any:
    import torch

    return torch.float8_e4m3fn if text == "float8_e4m3fn" else dtype(text)


def layer(text: str) -> str:
    from ..tuning.layers import LAYERS

    if text not in LAYERS:
        raise argparse.ArgumentTypeError(f"{text!r} is not one of {', '.join(LAYERS)}")
    return text


def suite(text: str) -> str:
    installed.require()
    from ..tuning.suites import SUITES

    if text not in SUITES:
        raise argparse.ArgumentTypeError(f"{text!r} is not one of {', '.join(SUITES)}")
    return text


def duration(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of seconds") from None
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text} is not positive")
    return value


def model_input(text: str) -> tuple[tuple[int, ...], Any]:
    sizes, _, name = text.partition(":")
    return shape(sizes), dtype(name) if name else None


def shape(text: str) -> tuple[int, ...]:
    sizes = text.split("x")
    if not all(size.isdecimal() for size in sizes):
        raise argparse.ArgumentTypeError(f"{text!r} is not a shape: write 8x64x56x56")
    return tuple(map(int, sizes))


def ints(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not one value or one per axis: write 2 or 2,1") from None


def padding(text: str) -> Any:
    if text in ("same", "valid"):
        return text
    try:
        axes = [tuple(int(side) for side in part.split(":")) for part in text.split(",")]
    except ValueError:
        axes = []
    if not axes or max(map(len, axes)) > 2:
        raise argparse.ArgumentTypeError(
            f"{text!r} is not a padding: write 1, or one value or (lower, upper) pair per axis as in 2:0,1, "
            "or same or valid"
        )
    return tuple(axis[0] if len(axis) == 1 else axis for axis in axes)


def modes(text: str) -> tuple[str, ...]:
    return tuple(text.split(","))


_OF_A_BRANCH = {"padding": padding, "dilation": ints, "stride": ints, "groups": positive}


def branch(text: str) -> tuple[tuple[int, ...], dict[str, Any]]:
    sizes, *options = text.split("/")
    found = {}
    for option in options:
        name, _, value = option.partition("=")
        if name not in _OF_A_BRANCH or not value:
            names = ", ".join(_OF_A_BRANCH)
            raise argparse.ArgumentTypeError(
                f"{option!r} is not one of {names} with a value: write 256x2048x3x3/padding=6/dilation=6"
            )
        found[name] = _OF_A_BRANCH[name](value)
    return shape(sizes), found


def known_device(text: str) -> Any:
    import torch

    from ..execute import device_of

    if text == "cuda" and torch.cuda.is_available():
        return device_of(torch.device("cuda"))
    if text not in DEVICES:
        raise argparse.ArgumentTypeError(
            f"{text!r} is not one of {', '.join(DEVICES)}, or cuda on a machine with a GPU"
        )
    return DEVICES[text]
