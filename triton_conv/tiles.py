"""How many tiles a launch has and how many steps their main loops take: for kernels, configs and predictions alike.

Configs are those of `config`: boxes have a `box`, slabs of a weight gradient `splits`. Roles are geometry's.
"""

from __future__ import annotations

from itertools import product
from math import prod
from typing import Any, NamedTuple

from .epilogue import PLAIN, Epilogue
from .geometry import Axis, ConvGeometry, Role

# What kernels count in 32 bits stays below it: with a tail of a tile or of padding it is no such number beyond.
COUNTED = 2**31 - 2**17


class Tiles(NamedTuple):
    """tiles_m x tiles_n tiles in each of `parts`: groups, residue classes of the stride, slabs.

    `steps` are those of the main loops of all tiles together, `longest` those of the longest. tiles_m counts pixels
    and tiles_n destination channels; in a weight gradient, columns of taps and input channels, and output channels.
    """

    tiles_m: int
    tiles_n: int
    parts: int
    steps: int
    longest: int

    @property
    def total(self) -> int:
        return self.tiles_m * self.tiles_n * self.parts


def positions(role: Role, geometry: ConvGeometry) -> tuple[int, ...]:
    """(images, depths, rows, columns) of destination positions in the largest residue class, for FPROP or DGRAD."""
    extents = geometry.output if role is Role.FPROP else geometry.input
    axes = geometry.axes(role)
    return geometry.N, *(ceil_div(extent, axis.phases) for extent, axis in zip(extents, axes, strict=True))


def gather(role: Role, geometry: ConvGeometry, config: Any) -> Tiles:
    """FPROP or DGRAD by `kernels.gather`."""
    tiles_m = ceil_div(prod(positions(role, geometry)), config.BLOCK_M)
    return _activations(role, geometry, config, tiles_m, config.flatten)


def box(role: Role, geometry: ConvGeometry, config: Any) -> Tiles:
    """FPROP or DGRAD by `kernels.box`, whose tiles do not run on from one image row into the next."""
    return _activations(role, geometry, config, prod(blocks(positions(role, geometry), config.box)), False)


def box_part(config: Any, epilogue: Epilogue, role: Role, geometry: ConvGeometry) -> tuple[int, ...]:
    """The sides of the box of pixels that `kernels.box` finishes and stores at a time.

    That is half a tile where its sums fill half of the registers, so that what an epilogue adds to them is not spilled;
    a quarter where a residual is added to residue classes, whose places take registers, too.
    """
    sides = list(config.box)
    if epilogue != PLAIN and prod(sides) * config.BLOCK_N // (32 * config.num_warps) >= 128:
        classes = prod(axis.phases for axis in geometry.axes(role))
        for _ in range(2 if epilogue.residual and classes > 1 else 1):
            axis = next(axis for axis, side in enumerate(sides) if side > 1)
            sides[axis] //= 2
    return tuple(sides)


def wgrad(geometry: ConvGeometry, config: Any) -> Tiles:
    """WGRAD by `kernels.wgrad`: every slab has the steps of the longest, some of them perhaps past the last pixel."""
    g = geometry
    C, K = g.C // g.groups, g.K // g.groups
    columns = ceil_div(g.taps * C, config.BLOCK_K) if config.flatten else g.taps * ceil_div(C, config.BLOCK_K)
    steps = ceil_div(ceil_div(g.N * prod(g.output), config.BLOCK_M), config.splits)
    tiles = Tiles(columns, ceil_div(K, config.BLOCK_N), g.groups * config.splits, 0, steps)
    return tiles._replace(steps=tiles.total * steps)


def box_wgrad(geometry: ConvGeometry, config: Any) -> Tiles:
    """WGRAD by `kernels.box_wgrad`, a step for each run of pixels; the last slab may have fewer."""
    g = geometry
    tiles_c, tiles_k = ceil_div(g.C // g.groups, config.BLOCK_K), ceil_div(g.K // g.groups, config.BLOCK_N)
    runs = prod(blocks((g.N, *g.output), config.box))
    tiles = Tiles(g.taps * tiles_c, tiles_k, g.groups * config.splits, 0, ceil_div(runs, config.splits))
    return tiles._replace(steps=tiles.tiles_m * tiles_k * g.groups * runs)


def depthwise(role: Role, geometry: ConvGeometry, config: Any) -> Tiles:
    """A role by `kernels.depthwise` or `kernels.depthwise_wgrad`, a step for each lane that a program walks down.

    Of wgrad, tiles_m counts chunks of the filter that are unrolled together.
    """
    g = geometry
    images, depths, rows, columns = positions(Role.FPROP if role is Role.WGRAD else role, g)
    walks, walk = walks_of(ceil_div(rows, config.rows), config.walk)
    lanes = images * depths * walks * ceil_div(columns, config.columns)
    tiles_m, tiles_n = ceil_div(lanes, config.lanes), ceil_div(g.C if role is Role.DGRAD else g.K, config.channels)
    if role is not Role.WGRAD:
        tiles = Tiles(tiles_m, tiles_n, prod(axis.phases for axis in g.axes(role)), 0, walk)
        return tiles._replace(steps=tiles.total * walk)
    chunks = g.filter[0] * ceil_div(g.filter[1], config.unroll[0]) * ceil_div(g.filter[2], config.unroll[1])
    steps = ceil_div(tiles_m, config.splits) * walk
    tiles = Tiles(chunks, tiles_n, config.splits, 0, steps)
    return tiles._replace(steps=tiles.total * steps)


def depthwise_counts(role: Role, geometry: ConvGeometry, config: Any) -> tuple[int, int]:
    """Bounds of (lanes of a launch of `kernels.depthwise`, rows or columns that the last ones count past an image).

    Rows are those of source or destination. They lie as far apart as the dilation says, and are so many at least.
    """
    images, depths, rows, columns = positions(Role.FPROP if role is Role.WGRAD else role, geometry)
    spread = geometry.dilation[1]
    walks, walk = walks_of(ceil_div(rows, spread * config.rows), config.walk)
    beyond = max(spread * config.rows * walk * geometry.stride[1], config.columns * geometry.stride[2])
    return images * depths * walks * spread * columns, beyond


def walks_of(lanes: int, most: int) -> tuple[int, int]:
    """(walks, lanes of each) down a column of lanes, as long as each other and no longer than `most`."""
    walks = max(ceil_div(lanes, most), 1)
    return walks, ceil_div(lanes, walks)


def banded(role: Role, geometry: ConvGeometry, config: Any) -> Tiles:
    """FPROP or DGRAD by `kernels.banded`, a step for each source row and chunk of its columns that a tile sees."""
    g = geometry
    source, extents = (g.input, g.output) if role is Role.FPROP else (g.output, g.input)
    steps, most, tiles = [], [], []
    for axis, size, side in zip((1, 2), (config.height, config.columns), config.blocks[1:], strict=True):
        lower = g.padding[axis][0] if role is Role.FPROP else g.filter[axis] - 1 - g.padding[axis][0]
        starts = range(0, ceil_div(extents[axis], size), side)
        spans = [
            _seen(lower, g.filter[axis], first, first + side - 1, source[axis], size, g.modes[axis]) for first in starts
        ]
        counts = [max(end - begin, 0) if axis == 1 else _chunks(begin, end, config.chunk) for begin, end in spans]
        steps.append(sum(counts))
        most.append(max(counts, default=0))
        tiles.append(len(starts))
    images = ceil_div(g.N, config.blocks[0])
    return Tiles(images * prod(tiles), 1, g.C, g.C * images * prod(steps), prod(most))


# Columns of a filter that a program of `kernels.banded_wgrad` keeps the sums of, at most.
BANDED_TAPS = 64


def banded_wgrad(geometry: ConvGeometry, config: Any) -> Tiles:
    """WGRAD by `kernels.banded_wgrad`; tiles_m counts parts of a filter, every slab has the steps of the longest."""
    g, zeros = geometry, geometry.modes[1] == "zeros"
    (_, taps_h, taps_w), (lower_h, _), (lower_w, _) = g.filter, *g.padding[1:]
    images, rows, columns = config.blocks
    tiles_q = ceil_div(g.output[2], columns * config.columns)
    chunks = []
    for s in range(0, taps_w, BANDED_TAPS):
        taps, last = min(BANDED_TAPS, taps_w - s), tiles_q * columns - 1
        span = _seen(lower_w - s, taps, 0, last, g.input[2], config.columns, g.modes[2])
        chunks.append(_chunks(*span, config.chunk))
    steps = []
    for r in range(0, taps_h, config.height):
        begin, end = max(lower_h - r - config.height + 1, 0), min(g.input[1] + lower_h - r, g.output[1])
        reached = max(end - begin, 0) if zeros else g.output[1]
        steps.append(ceil_div(ceil_div(g.N, images) * ceil_div(reached, rows) * tiles_q, config.splits))
    parts = g.C * config.splits
    return Tiles(len(chunks) * len(steps), 1, parts, parts * sum(chunks) * sum(steps), max(chunks) * max(steps))


def shifted_shape(geometry: ConvGeometry, item_bytes: int) -> tuple[int, int, int, int]:
    """Of the filters as `kernels.banded` reads them: (channels, shifts within a vector, filter rows, columns)."""
    _, taps_h, taps_w = geometry.filter
    vector = 16 // item_bytes
    return geometry.C, vector, taps_h, (ceil_div(taps_w, vector) + 1) * vector


def _seen(lower: int, taps: int, first: int, last: int, extent: int, size: int, mode: str) -> tuple[int, int]:
    """`kernels.banded.seen`."""
    begin, end = -lower, size + taps - 1 - lower
    return (max(begin, -last * size), min(end, extent - first * size)) if mode == "zeros" else (begin, end)


def _chunks(begin: int, end: int, chunk: int) -> int:
    """Of columns, the first of which are read from a multiple of eight on."""
    return max(ceil_div(end - begin // 8 * 8, chunk), 1)


def blocks(counts: tuple[int, ...], box: tuple[int, ...]) -> tuple[int, ...]:
    """How often a box fits along (images, depths, rows, columns), the last time perhaps in part."""
    return tuple(ceil_div(count, side) for count, side in zip(counts, box, strict=True))


def class_taps(axis: Axis) -> tuple[tuple[int, int], ...]:
    """(taps, residue classes that have so many) of an axis.

    The classes that `common` lets reach the filter start at its taps 0 to tap_step - 1, one at each.
    """
    taps, more = divmod(axis.filter, axis.tap_step)
    unreached = axis.phases - axis.tap_step
    counts = ((taps + 1, more), (taps, axis.tap_step - more), (0, unreached))
    return tuple((taps, classes) for taps, classes in counts if classes)


def whole_vectors(geometry: ConvGeometry) -> bool:
    """Whether the channels of a group are, in x and in y, whole vectors of eight."""
    return (geometry.C // geometry.groups) % 8 == 0 and (geometry.K // geometry.groups) % 8 == 0


def _activations(role: Role, g: ConvGeometry, config: Any, tiles_m: int, flatten: bool) -> Tiles:
    src, dst = (g.C, g.K) if role is Role.FPROP else (g.K, g.C)
    axes = g.axes(role)
    tiles_n = ceil_div(dst // g.groups, config.BLOCK_N)
    steps = longest = 0
    for combination in product(*map(class_taps, axes)):
        taps = prod(taps for taps, _ in combination)
        reduction = src // g.groups
        each = ceil_div(taps * reduction, config.BLOCK_K) if flatten else taps * ceil_div(reduction, config.BLOCK_K)
        steps += each * prod(classes for _, classes in combination)
        longest = max(longest, each)
    parts = g.groups * prod(axis.phases for axis in axes)
    return Tiles(tiles_m, tiles_n, parts, steps * g.groups * tiles_m * tiles_n, longest)


def ceil_div(a: int, b: int) -> int:
    return -(-a // b)


def power_of_two_in(value: int, limit: int = 16) -> int:
    """The largest power of two up to `limit` that divides `value`."""
    return min(limit, value & -value) if value else limit
