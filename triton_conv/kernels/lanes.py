"""The walk of depthwise kernels over the positions of a destination, in lanes of ROWS x COLUMNS of them.

A tile is LANES lanes, and a program walks down `walk` lanes. The rows of a lane lie `spread` apart, so that its taps
fall on the same source rows whatever the dilation: tap r of row p reads row p * ROW_STEP + r of the lane, in units of
`reach` source rows. COLUMNS lie side by side where vectors run along W, and are one where they run along C.
"""

from __future__ import annotations

from math import gcd

import triton
import triton.language as tl

from .. import tiles
from ..geometry import ConvGeometry, Strides
from .indexing import MODE_CODES, in_vectors

# What changes with the image must not be specialised, or every image size would be compiled anew: one by one, for what
# is in a tuple always is.
IMAGE_SIZED = ["N", "dst_d", "dst_h", "dst_w", "src_d", "src_h", "src_w", "walk", "tiles"]
IMAGE_SIZED += ["dst_sn", "dst_sd", "dst_sh", "dst_sw", "src_sn", "src_sd", "src_sh", "src_sw"]
CHANNEL_STRIDES = ["dst_sc", "src_sc"]


@triton.jit
def divided(index, extent):
    """(index // extent, index % extent); neither is negative, and unsigned division takes fewer instructions."""
    unsigned: tl.constexpr = tl.uint64 if index.dtype == tl.int64 else tl.uint32
    quotient = index.to(unsigned, bitcast=True) // extent.to(index.dtype).to(unsigned, bitcast=True)
    quotient = quotient.to(index.dtype, bitcast=True)
    return quotient, index - quotient * extent


@triton.jit
def lanes_of(
    tile,
    dst_d,
    dst_h,
    dst_w,
    axis_d,
    axis_h,
    axis_w,
    spread,
    walk,
    HAS_D: tl.constexpr,
    HAS_H: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    LANES: tl.constexpr,
    INDEX: tl.constexpr,
):
    """(image, depth, row, block of columns) that each lane of a tile starts at, all [1, LANES].

    They are counted within a residue class. Images past the last are of lanes that are not there.
    """
    lane = (tile.to(INDEX) * LANES + tl.arange(0, LANES))[None, :]
    n, block_w = divided(lane, tl.cdiv(dst_w.to(INDEX), axis_w.phases * COLUMNS))
    h = tl.zeros_like(n)
    if HAS_H:
        n, h = divided(n, tl.cdiv(dst_h.to(INDEX), axis_h.phases * spread * ROWS * walk) * spread)
    h = h // spread * (spread * ROWS * walk) + h % spread
    d = tl.zeros_like(n)
    if HAS_D:
        n, d = divided(n, tl.cdiv(dst_d.to(INDEX), axis_d.phases))
    return n, d, h, block_w


def tiling(g: ConvGeometry, strides: Strides, axes, forward: bool, unroll: tuple[int, int], config, numerics) -> dict:
    """The arguments that kernels have for walking over positions of the destination: y if `forward`, else x."""
    src_extents, dst_extents = (g.input, g.output) if forward else (g.output, g.input)
    src_strides, dst_strides = (strides.x, strides.y) if forward else (strides.y, strides.x)
    column_step = axes[2].src_step
    along_w = src_strides[4] == dst_strides[4] == axes[2].src_tap_step == 1 and column_step in (1, 2, 4)
    columns = config.columns if along_w and unroll[1] == g.filter[2] else 1
    vector = min(config.vector, columns * column_step)
    inside = g.modes[2] == "zeros" or dst_extents[2] * column_step <= src_extents[2]
    if columns == 1:
        whole, dst_w_vec = False, 1
        src_vec, src_strides = in_vectors(src_strides)
        dst_vec, dst_strides = in_vectors(dst_strides)
    else:
        src_vec, src_strides = _rows_in_vectors(src_strides, src_extents[2], vector)
        dst_vec, dst_strides = _rows_in_vectors(dst_strides, dst_extents[2], min(vector, columns))
        whole, dst_w_vec = src_vec == vector and inside, dst_vec
    spread, row_step, reach = 1, 1, axes[1].src_step
    if unroll[0] > 1:
        reach = axes[1].src_tap_step
        common = gcd(axes[1].src_step, reach)
        spread, row_step = reach // common, axes[1].src_step // common
    walks, walk = tiles.walks_of(tiles.ceil_div(dst_extents[1], axes[1].phases * spread * config.rows), config.walk)
    lanes = g.N * tiles.ceil_div(dst_extents[0], axes[0].phases) * walks * spread
    lanes *= tiles.ceil_div(dst_extents[2], axes[2].phases * columns)
    mode_d, mode_h, mode_w = (MODE_CODES[mode] for mode in g.modes)
    return {
        "N": g.N,
        **dict(zip(("dst_d", "dst_h", "dst_w", "src_d", "src_h", "src_w"), (*dst_extents, *src_extents), strict=True)),
        **dict(zip(("dst_sn", "dst_sc", "dst_sd", "dst_sh", "dst_sw"), dst_strides, strict=True)),
        **dict(zip(("src_sn", "src_sc", "src_sd", "src_sh", "src_sw"), src_strides, strict=True)),
        "axis_d": axes[0],
        "axis_h": axes[1],
        "axis_w": axes[2],
        "spread": spread,
        "reach": reach,
        "walk": walk,
        "tiles": tiles.ceil_div(lanes, config.lanes),
        "HAS_D": dst_extents[0] > 1,
        "HAS_H": dst_extents[1] > 1,
        "MODE_D": mode_d,
        "MODE_H": mode_h,
        "MODE_W": mode_w,
        "SRC_VEC": src_vec,
        "DST_VEC": dst_vec,
        "DST_W_VEC": dst_w_vec,
        "VECTOR": vector,
        "WHOLE": whole,
        "FIRST_W": axes[2].offset if columns > 1 else 0,
        "MULTIPLIER": g.K // g.C,
        "INDEX": getattr(tl, f"int{numerics.index_bits}"),
        "ACC": getattr(tl, numerics.accumulator),
        "ROWS": config.rows,
        "COLUMNS": columns,
        "ROW_STEP": row_step,
        "COLUMN_STEP": column_step if columns > 1 else 1,
        "LANES": config.lanes,
        "CHANNELS": config.channels,
        "num_warps": config.num_warps,
    }


def _rows_in_vectors(strides: tuple[int, ...], extent: int, vector: int) -> tuple[int, tuple[int, ...]]:
    """`in_vectors` of rows along W: all of `vector` or none, or every width would be another compilation."""
    if any(n % vector for n in (extent, *strides[:4])):
        return 1, strides
    return vector, (*(s // vector for s in strides[:4]), strides[4])
