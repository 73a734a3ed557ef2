"""Causal convolutions in numbers: what a launch depends on, and how it is cut into programs, by rule."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from enum import Enum
from typing import NamedTuple

from .config import ITEM_BYTES
from .devices import Device
from .tiles import ceil_div, power_of_two_in


class CausalRole(Enum):
    """Which of the three operators; BACKWARD computes all gradients, UPDATE a few steps with a state in place."""

    FORWARD = "forward"
    BACKWARD = "backward"
    UPDATE = "update"


class CausalProblem(NamedTuple):
    """What a plan depends on: N sequences of C channels and L positions, W taps.

    x, y and dx have the strides of a sequence and of a row, with `rows` (channels side by side), or a channel, without;
    in BACKWARD y is its gradient. In UPDATE x, y and state have all three strides, and `rows` says nothing.
    """

    role: CausalRole
    N: int
    C: int
    L: int
    W: int
    dtype: str
    weight_dtype: str
    bias_dtype: str | None
    silu: bool
    has_state: bool
    rows: bool
    device: Device
    x: tuple[int, ...]
    y: tuple[int, ...]
    dx: tuple[int, ...] = ()
    state: tuple[int, ...] = ()

    @property
    def has_bias(self) -> bool:
        return self.bias_dtype is not None

    @property
    def item_bytes(self) -> int:
        return ITEM_BYTES[self.dtype]

    @property
    def item_bytes_of_sums(self) -> int:
        return max(self.item_bytes, 4)

    def __str__(self) -> str:
        layout = "channels_last" if self.rows else "contiguous"
        words = [f"x {self.N}x{self.C}x{self.L}", f"w {self.C}x{self.W}"]
        words += [] if self.role is CausalRole.UPDATE else [layout]
        words += [word for word, there in (("bias", self.has_bias), ("silu", self.silu)) if there]
        return " ".join([*words, "state"] if self.has_state else words)


@dataclass(frozen=True)
class CausalConfig:
    """One way to run a causal kernel: a step of a program is `runs` runs of `unit` positions of `channels` channels.

    `splits` cuts each sequence into that many shares, a program for each; backward, each share writes a slab.
    """

    unit: int
    runs: int
    channels: int
    num_warps: int = 4
    splits: int = 1

    def __post_init__(self) -> None:
        if any(n < 1 or n & (n - 1) for n in (self.runs, self.channels, self.num_warps)):
            raise ValueError(f"runs, channels and num_warps must be powers of two, but got {self}")
        if min(self.unit, self.splits) < 1:
            raise ValueError(f"unit and splits must be positive, but got {self}")

    def __str__(self) -> str:
        step = f"{self.runs} runs of {self.unit} positions x {self.channels} channels"
        return f"{step} warps {self.num_warps} splits {self.splits}"


_WARPS = 4
_PROGRAMS = 16  # for each multiprocessor, so that little of it idles while the last ones end
_STEPS = 64  # after which a program's own expenses no longer count; backward, each program also writes a slab


def default(p: CausalProblem) -> CausalConfig:
    """How many positions and channels a program takes, by rule: few registers, whole vectors, 128 threads."""
    threads, backward = 32 * _WARPS, p.role is CausalRole.BACKWARD
    if p.role is CausalRole.UPDATE:
        return CausalConfig(1, 1, threads, _WARPS)
    if p.rows:
        unit = max(p.W - 1, 3 if backward else 4)  # W - 1 at least: only a sequence's first run reaches the state
        # what a thread holds of a row: 16 bytes, if there are registers for so many windows, taps and sums of dw
        room = (8 if backward else 32) if p.item_bytes == 8 else (32 if backward else 64)
        held = min(16 // p.item_bytes, room // _power_of_two(p.W))
        channels = min(_power_of_two(p.C), max(power_of_two_in(p.C, threads * held), 32 * held))
        runs = threads * held // channels
    else:
        # backward, g is computed W - 1 positions further than dx: less often for longer units
        unit = 16 if backward and p.item_bytes < 8 else 8
        runs = min(32, _power_of_two(ceil_div(p.L, unit)))
        channels = threads // runs
    count = ceil_div(p.L, runs * unit)
    longest = max(1, p.N * ceil_div(p.C, channels) * count // (_PROGRAMS * p.device.multiprocessors))
    splits = ceil_div(count, longest if backward else min(longest, _STEPS))
    return CausalConfig(unit, runs, channels, _WARPS, splits)


def smaller(rule: CausalConfig) -> Iterator[CausalConfig]:
    """A config, then ones that ask for less of a device: fewer slabs, then fewer positions and channels a step."""
    step = rule
    while True:
        yield step
        splits = step.splits
        while splits > 1:
            splits //= 2
            yield replace(step, splits=splits)
        if step.runs * step.channels <= 32:
            return
        part = {"channels": step.channels // 2} if step.channels >= step.runs else {"runs": step.runs // 2}
        step = replace(step, **part)


def blocks(p: CausalProblem, config: CausalConfig) -> int:
    """Programs beside each other that share out the channels."""
    return ceil_div(p.C, config.channels)


def steps(p: CausalProblem, config: CausalConfig) -> int:
    """Steps of each program; those of the last one of a sequence may lie beyond its end."""
    return ceil_div(ceil_div(p.L, config.runs * config.unit), config.splits)


def index_bits(p: CausalProblem, config: CausalConfig) -> int:
    """How wide a kernel counts positions, those beyond the end of its last programs included, channels and taps."""
    positions = (config.splits * steps(p, config) + 1) * config.runs * config.unit + p.W
    taps = (p.C + config.channels) * p.W
    return 64 if max(positions, taps) >= 2**31 else 32


def slabs(p: CausalProblem, config: CausalConfig) -> tuple[int, int, int]:
    """The shape of the partial sums of dw and dbias: a slab of (W + 1, C), without a bias (W, C)."""
    return p.N * config.splits, p.W + p.has_bias, p.C


def _power_of_two(n: int) -> int:
    """The least one that is not below n."""
    return 1 << (n - 1).bit_length()
