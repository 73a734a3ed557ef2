"""Convolutions that are checked: a table of corner cases, and random ones."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import replace
from math import prod
from typing import Any

import torch

from .cases import COMPLEX, INTEGERS, MEMORY_FORMATS, Case
from .geometry import PADDING_MODES

_of = Case.of

CASES: tuple[Case, ...] = (
    # plain, in every rank and direction
    _of(11, 3, padding=1),
    _of((7, 9), 3, padding=1),
    _of((4, 5, 6), 3, padding=1),
    _of(11, 3, padding=1, transposed=True),
    _of((7, 9), 3, padding=1, transposed=True),
    _of((4, 5, 6), 3, padding=1, transposed=True),
    # tiles with tails: channels and pixels beyond one block
    _of((6, 7), 3, C=65, K=33, N=1, padding=1, dtype=torch.float16),
    _of((13, 11), 1, C=72, K=130, N=1, dtype=torch.bfloat16),
    _of(150, 3, C=17, K=19, padding=1),
    _of((5, 5), 3, C=33, K=65, N=1, stride=2, padding=1, transposed=True, dtype=torch.float16),
    # odd everything
    _of((7, 11), (5, 3), C=5, K=7, N=3, stride=(3, 2), padding=((2, 1), (0, 1)), dilation=(1, 3)),
    _of((5, 3, 7), (3, 1, 5), C=5, K=7, N=3, stride=(2, 1, 3), padding=((1, 0), (0, 0), (2, 3)), dilation=(1, 1, 2)),
    _of((5, 3), (3, 5), C=7, K=5, N=3, stride=(3, 2), padding=((2, 1), (0, 3)), dilation=(2, 1), transposed=True),
    # a single channel, filter, pixel, sample
    _of((9, 9), 3, C=1, K=1, N=1),
    _of((9, 9), 3, C=1, K=8, padding=1),
    _of((9, 9), 3, C=8, K=1, padding=1),
    _of((3, 3), 3, N=1),
    _of((1, 1), 1, N=1),
    _of((1, 1), 3, padding=1),
    _of((1, 1), 3, transposed=True),
    _of(1, 1, transposed=True),
    # unit axes
    _of((1, 12), (1, 3), padding=(0, 1)),
    _of((12, 1), (3, 1), padding=(1, 0), stride=(2, 1)),
    _of((1, 1, 10), (1, 1, 4), stride=(1, 1, 2)),
    _of((5, 1, 6), (3, 1, 1), padding=(1, 0, 0), transposed=True),
    # filters larger than the input
    _of((2, 3), (5, 7), padding=((2, 3), (3, 3))),
    _of((3, 2), 5, padding=4, stride=2),
    _of((3, 2), 7, padding=3, transposed=True),
    # a stride beyond the filter: residues without taps
    _of((11, 10), (1, 2), stride=(2, 3)),
    _of(17, 2, stride=5, padding=1),
    _of((7, 7, 7), 1, stride=2),
    _of((3, 4), 2, stride=3, output_padding=(2, 1), transposed=True),
    _of((3, 4), 1, stride=4, transposed=True),
    # pointwise, and filters that step by their own length
    _of((6, 7), 1, C=16, K=8),
    _of((6, 7), 1, stride=2, C=16, K=8),
    _of((6, 7), 1, C=16, K=8, padding=1),
    _of((8, 12), 4, stride=4, K=16),
    _of((4, 6, 8), 2, stride=2, K=16, memory_format="channels_last"),
    _of((3, 4), 2, stride=2, K=6, transposed=True),
    _of((3, 4), 2, stride=2, K=6, transposed=True, memory_format="channels_last"),
    _of((3, 4), 2, stride=2, K=1, transposed=True),
    # dilation: larger than the input, sharing a factor with the stride or not
    _of((4, 5), 3, dilation=6, padding=6),
    _of((12, 13), 3, dilation=(2, 3), padding=(2, 3)),
    _of((12, 13), 3, stride=2, dilation=2, padding=2),
    _of((13, 14), (3, 2), stride=(6, 4), dilation=(4, 6), padding=4),
    _of(14, 3, stride=3, dilation=2, padding=1, transposed=True),
    _of((4, 5), 3, stride=(4, 6), dilation=(6, 4), padding=5, transposed=True),
    # output_padding, up to and beyond the stride
    _of((4, 5), 3, stride=2, padding=1, output_padding=1, transposed=True),
    _of((4, 5), 3, stride=(3, 2), padding=1, output_padding=(2, 0), transposed=True),
    _of((4, 5), 2, stride=1, dilation=(4, 3), output_padding=(3, 1), transposed=True),
    _of(5, 3, stride=2, dilation=5, padding=((1, 3),), output_padding=4, transposed=True),
    _of((3, 3, 2), 2, stride=(1, 2, 2), dilation=3, output_padding=(2, 2, 1), padding=1, transposed=True),
    # asymmetric and causal borders
    _of(12, 3, padding=((2, 0),), C=4, groups=4),
    _of((6, 7), 4, padding=((1, 2), (2, 1))),
    _of((5, 6, 6), 3, padding=((2, 0), 1, 1), modes=("replicate", "zeros", "zeros")),
    _of((6, 5), 3, stride=2, padding=((0, 2), (3, 1)), transposed=True),
    # padding modes
    _of(9, 5, padding=4, modes="reflect"),
    _of(9, 4, padding=((7, 2),), modes="replicate", stride=2),
    _of(9, 4, padding=((9, 3),), modes="circular", dilation=2),
    _of((6, 7), 3, padding=1, modes="reflect", dtype=torch.float16),
    _of((6, 7), 5, padding=2, modes="replicate", dtype=torch.bfloat16, stride=(1, 2)),
    _of((6, 7), 3, padding=((2, 1), (0, 3)), modes="circular", stride=2),
    _of((4, 5, 4), 3, padding=1, modes=("circular", "reflect", "replicate")),
    _of((5, 6), 3, padding=((1, 1), (2, 0)), modes=("circular", "zeros"), C=4, K=4, groups=4, dtype=torch.float64),
    _of((1, 6), 3, padding=1, modes=("replicate", "circular")),
    _of(7, 3, padding=2, modes="reflect", transposed=True),
    _of((5, 4), 3, stride=2, padding=1, output_padding=1, modes=("circular", "replicate"), transposed=True),
    _of((3, 3, 3), 2, stride=(2, 1, 1), padding=1, modes=("zeros", "reflect", "circular"), transposed=True),
    _of((4, 4), 2, dilation=3, output_padding=2, padding=1, modes="circular", transposed=True),
    # groups and depthwise
    _of((7, 6), 3, C=6, K=9, groups=3, padding=1),
    _of((7, 6), 3, C=34, K=36, groups=2, padding=1, stride=2, dtype=torch.float16),
    _of((7, 6), 3, C=8, K=8, groups=8, padding=1),
    _of((7, 6), 3, C=5, K=15, groups=5, padding=1, stride=2),
    _of((9, 9), 7, C=4, K=4, groups=4, padding=3, dtype=torch.bfloat16, memory_format="channels_last"),
    _of((4, 4, 4), 3, C=6, K=6, groups=6, padding=1, dilation=2),
    _of(21, 4, C=5, K=5, groups=5, padding=((3, 0),), memory_format="channels_last"),
    _of((5, 4), 3, C=6, K=4, groups=2, stride=2, padding=1, output_padding=1, transposed=True),
    _of((5, 4), 4, C=6, K=6, groups=6, stride=2, padding=1, transposed=True),
    _of((5, 4), 3, C=4, K=8, groups=4, stride=2, transposed=True),
    # nothing to do
    _of((5, 6), 3, N=0, padding=1),
    _of((5, 6), 3, N=0, stride=2, transposed=True),
    _of((5, 6), 3, C=0, padding=1),
    # memory
    _of((6, 7), 3, C=16, K=8, padding=1, memory_format="channels_last", dtype=torch.float16),
    _of((4, 5, 6), 3, C=8, K=4, padding=1, stride=2, memory_format="channels_last", dtype=torch.bfloat16),
    _of((5, 6), 3, C=8, K=16, stride=2, memory_format="channels_last", transposed=True),
    _of((6, 7), 3, padding=1, memory_format="strided"),
    _of((6, 7), 1, C=8, memory_format="strided", dtype=torch.float16),
    _of((4, 5), 3, stride=2, padding=1, memory_format="strided", transposed=True),
    _of((4, 5), 3, C=4, K=4, groups=4, padding=1, memory_format="strided"),
    _of((6, 7), 3, N=3, padding=1, memory_format="expanded"),
    # dtypes and precisions
    _of((6, 7), 3, padding=1, dtype=torch.float64, bias=False),
    _of((6, 7), 3, C=20, padding=1, precision="ieee"),
    _of((6, 7), 3, C=20, padding=1, precision="tf32"),
    _of((6, 7), 3, C=20, padding=1, precision="tf32x3"),
    _of((5, 6), 3, C=20, padding=1, stride=2, precision="tf32x3", transposed=True),
    _of((6, 7), 3, stride=2, padding=1, dtype=torch.complex64),
    _of((4, 5), 3, stride=2, padding=1, dtype=torch.complex128, transposed=True),
    _of(8, 3, padding=1, dtype=torch.complex64, modes="circular", transposed=True),
    _of((6, 7), 3, padding=1, dtype=torch.int8, C=20),
    _of((6, 7), 3, padding=1, dtype=torch.uint8, C=20, stride=2),
    _of(12, 3, padding=1, dtype=torch.int16, modes="reflect"),
    _of((4, 3, 4), 3, padding=1, dtype=torch.int32, transposed=True),
    _of((6, 7), 3, padding=1, dtype=torch.int64, C=4, K=4, groups=4),
)


def random_case(rng: random.Random) -> Case:
    """A valid small case that varies everything a `Case` has; the same for the same state of `rng`.

    >>> random_case(random.Random(7)) == random_case(random.Random(7))
    True
    """
    while True:
        case = _draw(rng)
        try:
            small = case.macs <= 150_000 and prod(case.output_spatial) <= 600
        except RuntimeError:  # not a convolution
            continue
        if small:
            return case


def _draw(rng: random.Random) -> Case:
    rank, transposed = rng.choice((1, 2, 2, 3)), rng.random() < 0.4
    largest = {1: 60, 2: 12, 3: 6}[rank]

    def axes(*values: Any) -> tuple:
        return tuple(rng.choice(values) for _ in range(rank))

    groups, C, K = _channels(rng)
    kernel = axes(1, 2, 3, 3, 4, 5, 7) if rank < 3 else axes(1, 2, 3, 3)
    stride = axes(1) if rng.random() < 0.4 else axes(1, 2, 2, 3, 4)
    dilation = axes(1) if rng.random() < 0.6 else axes(1, 2, 3, 5)
    padded = rng.random()
    pads = [
        (0, 0) if padded < 0.2 else (n, n) if padded < 0.6 else (n, rng.randrange(2 * (taps - 1) * d + 2))
        for taps, d in zip(kernel, dilation, strict=True)
        for n in [rng.randrange((taps - 1) * d + 2)]
    ]
    modes = axes("zeros") if rng.random() < 0.5 else axes(*PADDING_MODES)
    dtype = rng.choice((torch.float32,) * 5 + (torch.float16, torch.bfloat16) * 2 + (torch.float64,))
    if rng.random() < 0.15:
        dtype = rng.choice(COMPLEX + INTEGERS)
    return Case(
        transposed=transposed,
        N=rng.choice((0, 1, 1, 1, 2, 2, 2, 2, 3, 5)),
        C=C,
        K=K,
        spatial=tuple(rng.randint(1, largest // (2 if transposed else 1)) for _ in range(rank)),
        kernel=kernel,
        stride=stride,
        padding=tuple(pads),
        output_padding=axes(0) if not transposed or rng.random() < 0.5 else axes(0, 1, 2, 3),
        dilation=dilation,
        groups=groups,
        modes=modes,
        bias=rng.random() < 0.6,
        dtype=dtype,
        memory_format=rng.choice(MEMORY_FORMATS[:1] * 3 + MEMORY_FORMATS[1:2] * 3 + MEMORY_FORMATS[2:]),
        precision=rng.choice((None, "ieee", "tf32", "tf32x3")) if dtype is torch.float32 else None,
    )


def _channels(rng: random.Random) -> tuple[int, int, int]:
    """groups, C, K: dense, grouped or depthwise, with and without a multiplier."""
    kind = rng.random()
    if kind < 0.55:
        return 1, rng.choice((1, 2, 3, 8, 16, 17, 32, 33, 65)), rng.choice((1, 2, 3, 8, 16, 17, 32, 33, 65))
    groups = rng.choice((2, 3, 4, 5, 8))
    if kind < 0.8:
        return groups, groups * rng.choice((1, 2, 3, 8, 17)), groups * rng.choice((1, 2, 3, 8, 17))
    return groups, groups, groups * rng.choice((1, 1, 1, 2, 3))


def numbered_cases(count: int, seed: int, dtype: torch.dtype | None = None) -> Iterator[tuple[int, Case]]:
    """`CASES`, then `count` random cases; with `dtype`, all of them in that dtype.

    Case number i is the same whatever `count` is, so that it can be run again alone.
    """
    for number in range(len(CASES) + count):
        yield number, numbered_case(number, seed, dtype)


def numbered_case(number: int, seed: int, dtype: torch.dtype | None = None) -> Case:
    """The case that `numbered_cases` gives this number."""
    case = CASES[number] if number < len(CASES) else random_case(random.Random(f"{seed} {number - len(CASES)}"))
    if dtype is None or dtype is case.dtype:
        return case
    return replace(case, dtype=dtype, precision=None)
