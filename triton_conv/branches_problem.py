"""Several convolutions of slices of one tensor, as numbers. Pure Python.

A term is a convolution of a slice of channels, a part is a slice that is written: a sum over terms.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, NamedTuple

from .devices import Device
from .geometry import ConvGeometry, Role

MOST_TERMS = 8  # of one launch
_LEAST = 16  # channels of a dot's block; 32 where they are bytes, which no launch of several terms reads


class Term(NamedTuple):
    """A convolution of a slice, that adds to part `part`. `filters` are its strides (K, C, 1, R, S)."""

    number: int
    part: int
    geometry: ConvGeometry
    filters: tuple[int, ...]
    has_bias: bool


class Problem(NamedTuple):
    """What a plan depends on. x and y are the strides (N, C, 1, H, W) of the tensors that slices are of.

    Terms of FPROP read slices of x and write slices of y, those of DGRAD the other way. A part is such a written slice.
    `channels` are those of x and y. `aligned` says that every slice starts at a multiple of 16 bytes, `alignable` that
    it would in channels-last copies of x and y.
    """

    role: Role
    terms: tuple[Term, ...]
    dtype: str
    precision: str
    x: tuple[int, ...]
    y: tuple[int, ...]
    channels: tuple[int, int]
    aligned: bool
    alignable: bool
    device: Device

    @property
    def geometry(self) -> ConvGeometry:
        """That of the term of most products."""
        return max((term.geometry for term in self.terms), key=lambda g: g.flops)


def channels_of(role: Role, g: ConvGeometry) -> tuple[int, int]:
    """(source, destination) channels of a group."""
    src, dst = (g.C, g.K) if role is Role.FPROP else (g.K, g.C)
    return src // g.groups, dst // g.groups


def fitted(role: Role, g: ConvGeometry, config: Any) -> Any:
    """The config that a term of this geometry runs with: blocks of channels no wider than its own channels need.

    Filters that are a dot's first operand keep the 64 rows that a warp group multiplies.
    """
    src, dst = channels_of(role, g)
    gathers = hasattr(config, "filters_first")
    least = _LEAST if gathers and not config.filters_first else min(config.BLOCK_N, 64)
    block_n, block_k = _block(dst, least, config.BLOCK_N), _block(src, _LEAST, config.BLOCK_K)
    copied = 32 * config.num_warps * 8 if gathers else 0  # elements of 16 bits, of which each thread copies 16 bytes
    while min(config.BLOCK_M, block_n) * block_k < copied and block_k < config.BLOCK_K:
        block_k *= 2
    while block_n * block_k < copied and block_n < config.BLOCK_N:
        block_n *= 2
    return replace(config, BLOCK_N=block_n, BLOCK_K=block_k)


def _block(extent: int, least: int, most: int) -> int:
    """The power of two in [least, most] that covers extent, or most."""
    while most > least and most // 2 >= extent:
        most //= 2
    return most
