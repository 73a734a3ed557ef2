"""Depthwise convolutions of long filters on matrix units: each row of a filter becomes a banded matrix.

For one channel and one filter row, a row of the output is a row of the input times a matrix that holds the filter row
once in each column, moved down by one each time. It is mostly zeros unless the filter is long, but matrix units
multiply faster than that wastes.

    GEMM_M = blocks of destination positions, HEIGHT rows x COLUMNS columns each
    GEMM_N = positions of a block
    GEMM_K = source positions that a block sees: one row at a time, CHUNK columns of it

A tile has BLOCKS_N images x BLOCKS_P x BLOCKS_Q blocks of one channel. Positions are counted from the start of a block,
so that all blocks share one banded matrix; those outside of the image for every block of a tile are left out.

A column of the banded matrix starts anywhere in a filter row, but memory is read in aligned vectors: `shift_kernel`
writes the filters once for every shift within a vector, between zeros. Sources that no tap connects to a destination
are multiplied by such zeros: an infinity or NaN spreads over its tile.
"""

from __future__ import annotations

from math import prod

import triton
import triton.language as tl

from ..geometry import ConvGeometry, Role, Strides
from ..tiles import shifted_shape
from .epilogue import constants as epilogue_constants
from .epilogue import scaled, store
from .indexing import MODE_CODES, launchable, matrix_product, power_of_two_in, read_position
from .launch import Launch, all_registers

ZEROS: tl.constexpr = tl.constexpr(MODE_CODES["zeros"])
ALIGN: tl.constexpr = tl.constexpr(8)  # columns are read from multiples of it
_SHIFT_BLOCK = 1024

# What changes with the image must not be specialised, or every image size would be compiled anew.
SIZES = ["N", "x_h", "x_w", "y_h", "y_w", "x_sn", "x_sh", "y_sn", "y_sh", "tiles_p", "tiles_q"]
UNALIGNED = ["scale_a", "scale_b", "x_sc", "y_sc"]


@triton.jit
def seen(lower, taps, first, last, extent, SIZE: tl.constexpr, MODE: tl.constexpr):
    """[begin, end) of the source positions that any of the blocks first ... last sees, counted from a block's start."""
    begin = -lower
    end = SIZE + taps - 1 - lower
    if MODE == ZEROS:
        begin = tl.maximum(begin, -last * SIZE)
        end = tl.minimum(end, extent - first * SIZE)
    return begin, end


@triton.jit
def aligned(position):
    """A position, negative perhaps, rounded down to a multiple of ALIGN; integer division rounds toward zero."""
    return tl.where(position < 0, position - (ALIGN - 1), position) // ALIGN * ALIGN


@triton.jit
def in_columns(column, lane, extent, reach, MODE: tl.constexpr, VEC: tl.constexpr):
    """(where columns of the padded image read, whether they do); whole vectors stay whole, as in `channel_block`."""
    if MODE == ZEROS:
        valid = (column >= 0) & (column < extent // VEC * VEC)
        inside = tl.where(valid, column, lane % VEC)
        return tl.max_contiguous(tl.multiple_of(inside, [1, VEC]), [1, VEC]), valid
    else:
        return read_position(column, extent, column < reach, MODE)


@triton.jit
def shift_kernel(
    w,
    shifted,
    taps_h,
    taps_w,
    width,
    count,
    w_first,
    w_sc,
    w_sh,
    w_sw,
    VEC: tl.constexpr,
    INDEX: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """shifted[c, v, r, l] = w[c, r, l + v - VEC], or 0 where there is no such tap."""
    i = tl.program_id(0).to(INDEX) * BLOCK + tl.arange(0, BLOCK)  # [BLOCK]
    v = i // width // taps_h % VEC
    r = i // width % taps_h
    s = i % width + v - VEC
    c = i // width // taps_h // VEC
    valid = (i < count) & (s >= 0) & (s < taps_w)
    offset = tl.where(valid, c * w_sc + w_first + r * w_sh + s * w_sw, 0)
    tl.store(shifted + i, tl.load(w + offset, mask=valid, other=0), mask=i < count)


@triton.jit(do_not_specialize=SIZES, do_not_specialize_on_alignment=UNALIGNED)
def banded_kernel(
    x,
    shifted,
    scale_a,
    scale_b,
    scale,
    bias,
    residual,  # in y's strides, as is what is kept
    kept,
    y,
    N,
    C,
    x_h,
    x_w,
    y_h,
    y_w,
    # strides, all but the column's in units of X_VEC or Y_VEC elements
    x_sn,
    x_sc,
    x_sh,
    x_sw,
    y_sn,
    y_sc,
    y_sh,
    y_sw,
    taps_h,
    taps_w,
    lower_h,
    lower_w,
    tiles_p,
    tiles_q,
    HAS_SCALE: tl.constexpr,
    SCALED: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    RESIDUAL: tl.constexpr,
    ACTIVATION: tl.constexpr,
    SLOPE: tl.constexpr,
    KEEPS: tl.constexpr,
    MODE_H: tl.constexpr,
    MODE_W: tl.constexpr,
    X_VEC: tl.constexpr,
    Y_VEC: tl.constexpr,
    FLT_VEC: tl.constexpr,
    INDEX: tl.constexpr,
    ACC: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCKS_N: tl.constexpr,
    BLOCKS_P: tl.constexpr,
    BLOCKS_Q: tl.constexpr,
    HEIGHT: tl.constexpr,
    COLUMNS: tl.constexpr,
    CHUNK: tl.constexpr,
):
    ROWS: tl.constexpr = BLOCKS_N * BLOCKS_P * BLOCKS_Q
    pid = tl.program_id(0)
    tiles_n = tl.cdiv(N, BLOCKS_N)
    # tiles of a channel run beside each other: they read the same rows and filters
    first_q = pid % tiles_q * BLOCKS_Q
    first_p = pid // tiles_q % tiles_p * BLOCKS_P
    first_n = pid // tiles_q // tiles_p % tiles_n * BLOCKS_N
    channel = (pid // tiles_q // tiles_p // tiles_n).to(INDEX)
    begin_h, end_h = seen(lower_h, taps_h, first_p, first_p + BLOCKS_P - 1, x_h, HEIGHT, MODE_H)
    begin_w, end_w = seen(lower_w, taps_w, first_q, first_q + BLOCKS_Q - 1, x_w, COLUMNS, MODE_W)
    begin_w = aligned(begin_w)
    chunks = tl.maximum(tl.cdiv(end_w - begin_w, CHUNK), 1)

    # where the tile's blocks start
    m = tl.arange(0, ROWS)[:, None]  # [ROWS, 1]
    n = first_n + m // (BLOCKS_P * BLOCKS_Q)
    row_h = ((first_p + m // BLOCKS_Q % BLOCKS_P) * HEIGHT).to(INDEX)
    row_w = (first_q + m % BLOCKS_Q) * COLUMNS
    image_valid = n < N
    n = tl.where(image_valid, n, 0).to(INDEX)

    # the banded matrix: for position (p, q) of a block, the shifted copy it reads and where its column starts there
    position = tl.arange(0, HEIGHT * COLUMNS)[None, :]  # [1, HEIGHT * COLUMNS]
    p = position // COLUMNS
    q = position % COLUMNS
    width = (tl.cdiv(taps_w, FLT_VEC) + 1) * FLT_VEC
    shift = (lower_w - q) & (FLT_VEC - 1)  # of a negative number too, unlike %
    start = lower_w - q - shift + FLT_VEC
    copy = (shift * taps_h - p) * width + start
    shifted += channel * FLT_VEC * taps_h * width

    x += channel * x_sc * X_VEC
    lane = tl.arange(0, CHUNK)
    acc = tl.zeros((ROWS, HEIGHT * COLUMNS), ACC)
    for step in range(tl.maximum(end_h - begin_h, 0) * chunks):
        row = begin_h + step // chunks
        column = begin_w + step % chunks * CHUNK
        h = row_h + row
        h, valid_h = read_position(h, x_h, image_valid & (h < y_h + taps_h - 1 - lower_h), MODE_H)
        reach_w = y_w + taps_w - 1 - lower_w
        i, valid_w = in_columns(row_w + (column + lane)[None, :], lane[None, :], x_w, reach_w, MODE_W, X_VEC)
        pixels = tl.load(
            x + (n * x_sn + h * x_sh) * X_VEC + i.to(INDEX) * x_sw, mask=valid_h & valid_w, other=0.0
        )  # [ROWS, CHUNK]

        r = row + lower_h
        vector = start + (column + lane // FLT_VEC * FLT_VEC)[:, None]
        valid = (p <= r) & (r - p < taps_h) & (vector >= 0) & (vector < width)
        offset = tl.where(valid, copy + r * width + (column + lane)[:, None], (lane % FLT_VEC)[:, None])
        offset = tl.max_contiguous(tl.multiple_of(offset, [FLT_VEC, 1]), [FLT_VEC, 1])
        band = tl.load(shifted + offset, mask=valid, other=0.0)  # [CHUNK, HEIGHT * COLUMNS]
        acc = matrix_product(pixels, band, acc, PRECISION)

    oh = row_h + p  # [ROWS, HEIGHT * COLUMNS]
    ow, valid_w = in_columns(row_w + q, q, y_w, y_w, ZEROS, Y_VEC)
    at = channel * y_sc * Y_VEC + (n * y_sn + oh * y_sh) * Y_VEC + ow.to(INDEX) * y_sw
    valid = image_valid & (oh < y_h) & valid_w
    one = channel + tl.arange(0, 1)
    acc = scaled(acc, scale_a, scale_b, scale, bias, one, one < C, HAS_SCALE, SCALED, HAS_BIAS)
    store(acc, at, valid, residual, kept, y, RESIDUAL, ACTIVATION, SLOPE, KEEPS)


def launches(role: Role, geometry: ConvGeometry, strides: Strides, config, numerics, item_bytes: int) -> list[Launch]:
    """FPROP: y from x and w; DGRAD: x from y and w; the workspace, of w's dtype, holds the shifted filters."""
    g, forward = geometry, role is Role.FPROP
    _, taps_h, taps_w = g.filter
    (lower_h, _), (lower_w, _) = g.padding[1:]
    w_sc, _, _, w_sh, w_sw = strides.w
    src, dst = ("x", "y") if forward else ("y", "x")
    sides = (strides.x, g.input), (strides.y, g.output)
    (src_strides, src_extents), (dst_strides, dst_extents) = sides if forward else sides[::-1]
    shape = shifted_shape(g, item_bytes)
    blocks_n, blocks_p, blocks_q = config.blocks
    tiles_p = triton.cdiv(dst_extents[1], blocks_p * config.height)
    tiles_q = triton.cdiv(dst_extents[2], blocks_q * config.columns)
    shifting = {
        "taps_h": taps_h,
        "taps_w": taps_w,
        "width": shape[3],
        "count": prod(shape),
        "w_first": 0 if forward else (taps_h - 1) * w_sh + (taps_w - 1) * w_sw,
        "w_sc": w_sc,
        "w_sh": w_sh if forward else -w_sh,
        "w_sw": w_sw if forward else -w_sw,
        "VEC": shape[1],
        "INDEX": getattr(tl, f"int{numerics.index_bits}"),
        "BLOCK": _SHIFT_BLOCK,
    }
    arguments = {
        **activations(g, src_strides, src_extents, dst_strides, dst_extents),
        "taps_h": taps_h,
        "taps_w": taps_w,
        "lower_h": lower_h if forward else taps_h - 1 - lower_h,
        "lower_w": lower_w if forward else taps_w - 1 - lower_w,
        "tiles_p": tiles_p,
        "tiles_q": tiles_q,
        "HAS_SCALE": numerics.has_scale,
        **epilogue_constants(numerics),
        "FLT_VEC": shape[1],
        **constants(g, config, numerics),
    }
    programs = launchable(g.C * triton.cdiv(g.N, blocks_n) * tiles_p * tiles_q, g)
    operands = (src, "workspace", *numerics.operands, dst)
    return [
        Launch("shift", shift_kernel, triton.cdiv(prod(shape), _SHIFT_BLOCK), ("w", "workspace"), shifting),
        Launch("banded", banded_kernel, programs, operands, arguments),
    ]


def activations(g: ConvGeometry, src_strides, src_extents, dst_strides, dst_extents) -> dict:
    """The arguments about what is called x and y in the kernels."""
    x_vec, x_strides = _in_vectors(src_strides, src_extents[2])
    y_vec, y_strides = _in_vectors(dst_strides, dst_extents[2])
    return {
        "N": g.N,
        "C": g.C,
        "x_h": src_extents[1],
        "x_w": src_extents[2],
        "y_h": dst_extents[1],
        "y_w": dst_extents[2],
        **dict(zip(("x_sn", "x_sc", "x_sh", "x_sw"), x_strides, strict=True)),
        **dict(zip(("y_sn", "y_sc", "y_sh", "y_sw"), y_strides, strict=True)),
        "X_VEC": x_vec,
        "Y_VEC": y_vec,
    }


def _in_vectors(strides: tuple[int, ...], columns: int) -> tuple[int, tuple[int, ...]]:
    """(vec, strides of n, c, h in units of vec elements, and of w): every row starts and ends at multiples of vec."""
    n, c, _, h, w = strides
    vec = min(power_of_two_in(s, ALIGN.value) for s in (n, c, h, columns)) if w == 1 else 1
    return vec, (n // vec, c // vec, h // vec, w)


def constants(g: ConvGeometry, config, numerics) -> dict:
    blocks_n, blocks_p, blocks_q = config.blocks
    return {
        "MODE_H": MODE_CODES[g.modes[1]],
        "MODE_W": MODE_CODES[g.modes[2]],
        "INDEX": getattr(tl, f"int{numerics.index_bits}"),
        "ACC": getattr(tl, numerics.accumulator),
        "PRECISION": numerics.precision,
        "BLOCKS_N": blocks_n,
        "BLOCKS_P": blocks_p,
        "BLOCKS_Q": blocks_q,
        "HEIGHT": config.height,
        "COLUMNS": config.columns,
        "CHUNK": config.chunk,
        "num_warps": config.num_warps,
        "num_stages": config.num_stages,
        "maxnreg": all_registers(config.num_warps),
    }
