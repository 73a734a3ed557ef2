"""Deformable convolutions in numbers: what a launch depends on, and its tiles, by rule.

Letters are geometry's, in two dimensions: x N C H W, w K C R S, y N K P Q. An offset group's channels share their
offsets. A *segment* is a run of channels that lie in one group and in one offset group.
"""

from __future__ import annotations

from dataclasses import replace
from enum import Enum
from math import gcd, prod
from typing import NamedTuple

from .config import ITEM_BYTES, Config, _tile, most_splits
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


# The largest tiles (BLOCK_M, BLOCK_N, BLOCK_K) of four warps that spill nothing, by what is multiplied: a thread holds
# four corners of its share of a block of channels x pixels beside its accumulator, or four accumulators in OFFSET.
_LARGEST = {
    DeformRole.FORWARD: {
        "half": (64, 128, 32),
        "tf32": (64, 64, 16),
        "tf32x3": (32, 32, 16),
        "ieee": (32, 32, 16),
        "float64": (32, 32, 16),
    },
    DeformRole.INPUT: {  # BLOCK_K is what a walk along a list is for
        "half": (64, 128, 64),
        "tf32": (64, 64, 16),
        "tf32x3": (32, 32, 16),
        "ieee": (32, 64, 16),
        "float64": (32, 32, 16),
    },
    DeformRole.OFFSET: {
        "half": (32, 64, 64),
        "tf32": (32, 32, 32),
        "tf32x3": (16, 32, 16),
        "ieee": (16, 32, 16),
        "float64": (16, 32, 16),
    },
    DeformRole.WEIGHT: {
        "half": (32, 128, 64),
        "tf32": (16, 64, 32),
        "tf32x3": (16, 32, 32),
        "ieee": (16, 32, 32),
        "float64": (16, 32, 16),
    },
}


def default(p: DeformProblem) -> Config:
    """Tiles by rule: as large as the problem fills and registers allow."""
    g = p.geometry
    pixels = g.N * prod(g.input if p.role is DeformRole.INPUT else g.output)
    reduced, written = _sides(p)
    if p.segment * (g.K // g.groups) <= 8:  # a dot would multiply padding
        config = Config(_tile(pixels, 16, 128), _tile(written, 1, 4), _tile(reduced, 1, 4), num_stages=1, dot=False)
    else:
        kind = "half" if p.item_bytes == 2 else p.precision if p.dtype == "float32" else p.dtype
        block_m, block_n, block_k = _LARGEST[p.role][kind]
        if not _whole_vectors(p):  # every element has an address in a register of its own
            block_m, block_n, block_k = max(block_m // 2, 16), min(block_n, 64), min(block_k, 32)
        elif _writes_apart(p):  # every element that is written has an address of its own: Triton 3.6 would spill some
            block_n = block_n // 2
        elif p.role is DeformRole.INPUT and kind == "half" and p.device.capability == 90:
            block_k = 128
        elif p.segment <= 16 and (p.role is DeformRole.OFFSET or p.device.capability >= 100):
            block_k = min(block_k, 32)  # which ptxas gives few registers, and a few too few for more
        config = Config(
            _tile(pixels, 16, block_m), _tile(written, 16, block_n), _tile(reduced, 16, block_k), num_stages=2
        )
    return replace(config, splits=_splits(p, config)) if p.role is DeformRole.WEIGHT else config


def _whole_vectors(p: DeformProblem) -> bool:
    """Whether the activations that are read lie in whole vectors of channels of a segment or a group."""
    sources = {"x": (p.strides.x, p.segment), "y": (p.strides.y, p.geometry.K // p.geometry.groups)}
    if p.role in (DeformRole.FORWARD, DeformRole.INPUT):
        del sources["y" if p.role is DeformRole.FORWARD else "x"]
    return all(strides[1] == 1 and channels * p.item_bytes % 16 == 0 for strides, channels in sources.values())


def _writes_apart(p: DeformProblem) -> bool:
    """Whether the channels of y or of the gradient of x, if that is what is written, lie apart in memory."""
    written = {DeformRole.FORWARD: p.strides.y, DeformRole.INPUT: p.strides.x}.get(p.role)
    return written is not None and written[1] != 1 and p.item_bytes == 2


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
    """(channels that blocks of BLOCK_K cover, those that blocks of BLOCK_N cover)."""
    K = p.geometry.K // p.geometry.groups
    return (p.segment, K) if p.role in (DeformRole.FORWARD, DeformRole.WEIGHT) else (K, p.segment)


def _splits(p: DeformProblem, config: Config) -> int:
    """Slabs so that every multiprocessor has two programs, while slabs stay long and the workspace bounded."""
    whole = tiles(p, config)  # in one slab
    wanted = ceil_div(2 * p.device.multiprocessors, max(whole.total, 1))
    return min(wanted, most_splits(p.geometry, whole.longest))
