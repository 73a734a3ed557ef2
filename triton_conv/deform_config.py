"""Deformable convolutions in numbers: what a launch depends on, and its tiles, by rule.

Letters are geometry's, in two dimensions: x N C H W, w K C R S, y N K P Q. An offset group's channels share their
offsets. A *segment* is a run of channels that lie in one group and in one offset group.
"""

from __future__ import annotations

from dataclasses import replace
from enum import Enum
from math import gcd, prod
from typing import NamedTuple

from .config import ITEM_BYTES, LARGEST_TILE, Config, _tile, most_splits
from .devices import Device
from .geometry import ConvGeometry, Strides
from .tiles import Tiles, ceil_div


class DeformRole(Enum):
    """What is computed: y; the gradient of x; those of offset and mask; that of w."""

    FORWARD = "forward"
    INPUT = "input gradient"
    OFFSET = "offset and mask gradient"
    WEIGHT = "weight gradient"


class DeformProblem(NamedTuple):
    """What a plan depends on.

    Strides count elements along five axes, as geometry's, for gradients as for what they are gradients of: in INPUT x
    is the gradient that is written and y the one that is read, in WEIGHT w is written, in OFFSET the gradients of
    offset and mask have the strides of these. `mask` is () where there is none. offset and mask have `offset_dtype`.
    """

    role: DeformRole
    geometry: ConvGeometry
    offset_groups: int
    dtype: str
    precision: str
    strides: Strides
    offset: tuple[int, ...]
    mask: tuple[int, ...]
    has_bias: bool
    device: Device
    offset_dtype: str

    @property
    def has_mask(self) -> bool:
        return bool(self.mask)

    @property
    def segment(self) -> int:
        """Channels of a segment."""
        return gcd(self.geometry.C // self.geometry.groups, self.geometry.C // self.offset_groups)

    @property
    def item_bytes(self) -> int:
        return ITEM_BYTES[self.dtype]

    def __str__(self) -> str:
        mask = ", mask" if self.has_mask else ""
        return f"{self.geometry}  offset groups {self.offset_groups}{mask}"


def default(p: DeformProblem) -> Config:
    """Tiles by rule: as large as the problem fills, small enough that samples and accumulator share the registers.

    A thread holds four corners of its share of a BLOCK of channels x pixels beside the accumulator, so that tiles are
    smaller than those of an ordinary convolution.
    """
    g = p.geometry
    K = g.K // g.groups
    pixels = g.N * prod(g.input if p.role is DeformRole.INPUT else g.output)
    reduced, written = _sides(p)
    if p.segment * K <= 8:
        return _without_dot(p, pixels)
    wide, costly = p.item_bytes > 2, p.dtype == "float64" or (p.dtype == "float32" and p.precision != "tf32")
    if p.role is DeformRole.WEIGHT:
        largest = 32 if costly else 64
        config = Config(
            BLOCK_M=_tile(pixels, 16, 16 if wide else 32),
            BLOCK_N=_tile(K, 16, largest),
            BLOCK_K=_tile(p.segment, 16, largest),
            num_stages=2,
        )
        return replace(config, splits=_splits(p, config))
    block_m = _tile(pixels, 16, 32 if costly else 64)
    block_n = _tile(written, 16, 32 if costly else 64 if wide or p.role is DeformRole.OFFSET else 128)
    block_n = min(block_n, LARGEST_TILE // block_m)
    return Config(block_m, block_n, _tile(reduced, 16, 16 if wide else 32), num_stages=2)


def tiles(p: DeformProblem, config: Config) -> Tiles:
    """Programs and steps of the main kernel of a role; those of an input gradient take more where lists are long."""
    g = p.geometry
    K, segments = g.K // g.groups, g.C // p.segment
    reduced, written = _sides(p)
    pixels = g.N * prod(g.input if p.role is DeformRole.INPUT else g.output)
    tiles_m, tiles_n = ceil_div(pixels, config.BLOCK_M), ceil_div(written, config.BLOCK_N)
    steps = ceil_div(reduced, config.BLOCK_K)
    if p.role is DeformRole.FORWARD:
        found = Tiles(tiles_m, tiles_n, g.groups, 0, g.taps * (segments // g.groups) * steps)
    elif p.role is DeformRole.INPUT:
        found = Tiles(tiles_m, tiles_n, segments, 0, g.taps * steps)
    elif p.role is DeformRole.OFFSET:
        found = Tiles(tiles_m, 1, g.taps * p.offset_groups, 0, segments // p.offset_groups * tiles_n * steps)
    else:
        columns = g.taps * ceil_div(p.segment, config.BLOCK_K)
        parts = segments * config.splits
        found = Tiles(columns, ceil_div(K, config.BLOCK_N), parts, 0, ceil_div(tiles_m, config.splits))
    return found._replace(steps=found.total * found.longest)


def lists_shape(p: DeformProblem) -> tuple[int, int, int]:
    """(lists, output pixels that each one sorts, places where its runs may begin or end) of an input gradient."""
    g = p.geometry
    (_, H, W), (_, P, Q) = g.input, g.output
    return g.N * p.offset_groups * g.taps, P * Q, (H + 1) * (W + 1) + 1


def _sides(p: DeformProblem) -> tuple[int, int]:
    """(channels that are reduced, channels beside pixels that a tile has) of a segment and a group."""
    K = p.geometry.K // p.geometry.groups
    return (p.segment, K) if p.role in (DeformRole.FORWARD, DeformRole.WEIGHT) else (K, p.segment)


def _without_dot(p: DeformProblem, pixels: int) -> Config:
    """Groups so narrow that a dot would multiply padding: products summed in registers."""
    reduced, written = _sides(p)
    if p.role is DeformRole.WEIGHT:
        config = Config(_tile(pixels, 16, 128), _tile(written, 1, 4), _tile(reduced, 1, 4), num_stages=1, dot=False)
        return replace(config, splits=_splits(p, config))
    return Config(_tile(pixels, 16, 128), _tile(written, 1, 4), _tile(reduced, 1, 4), num_stages=1, dot=False)


def _splits(p: DeformProblem, config: Config) -> int:
    """Slabs so that every multiprocessor has two programs, while slabs stay long and the workspace bounded."""
    whole = tiles(p, config)  # in one slab
    wanted = ceil_div(2 * p.device.multiprocessors, max(whole.total, 1))
    return min(wanted, most_splits(p.geometry, whole.longest))
