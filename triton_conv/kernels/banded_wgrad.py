"""wgrad of depthwise convolutions with long filters on matrix units.

    GEMM_M = HEIGHT filter rows * CHUNK input columns
    GEMM_N = COLUMNS columns of the output
    GEMM_K = blocks of the output, of one row and COLUMNS columns each

Columns are counted from the start of a block, as in `banded`. The product has, on each of its diagonals, the terms of
one filter tap; they are added up after the last step. Each slab of blocks writes a copy of dw of its own.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ..geometry import ConvGeometry, Strides
from ..tiles import BANDED_TAPS
from .banded import SIZES, UNALIGNED, ZEROS, activations, aligned, constants, in_columns, seen
from .indexing import launchable, matrix_product, read_position
from .launch import Launch
from .wgrad import sum_launch


@triton.jit(do_not_specialize=[*SIZES, "slabs", "slab_stride"], do_not_specialize_on_alignment=UNALIGNED)
def banded_wgrad_kernel(
    x,
    dy,
    dw,
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
    w_sc,
    w_sh,
    w_sw,
    taps_h,
    taps_w,
    lower_h,
    lower_w,
    tiles_q,
    slabs,
    slab_stride,
    MODE_H: tl.constexpr,
    MODE_W: tl.constexpr,
    X_VEC: tl.constexpr,
    Y_VEC: tl.constexpr,
    INDEX: tl.constexpr,
    ACC: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCKS_N: tl.constexpr,
    BLOCKS_P: tl.constexpr,
    BLOCKS_Q: tl.constexpr,
    HEIGHT: tl.constexpr,
    COLUMNS: tl.constexpr,
    CHUNK: tl.constexpr,
    TAPS: tl.constexpr,
):
    ROWS: tl.constexpr = BLOCKS_N * BLOCKS_P * BLOCKS_Q
    pid = tl.program_id(0)
    tiles_s = tl.cdiv(taps_w, TAPS)
    tiles_r = tl.cdiv(taps_h, HEIGHT)
    # parts of a filter run beside each other: they read the same channel
    s0 = pid % tiles_s * TAPS
    r0 = pid // tiles_s % tiles_r * HEIGHT
    channel = (pid // tiles_s // tiles_r % C).to(INDEX)
    slab = pid // tiles_s // tiles_r // C

    # output rows that these filter rows connect to the image
    begin_p = 0
    end_p = y_h
    if MODE_H == ZEROS:
        begin_p = tl.maximum(lower_h - r0 - (HEIGHT - 1), 0)
        end_p = tl.minimum(x_h + lower_h - r0, y_h)
    tiles_p = tl.cdiv(tl.maximum(end_p - begin_p, 0), BLOCKS_P)
    steps = tl.cdiv(tl.cdiv(N, BLOCKS_N) * tiles_p * tiles_q, slabs)
    first_tile = slab * steps
    taps = tl.minimum(TAPS, taps_w - s0)
    begin_w, end_w = seen(lower_w - s0, taps, 0, tiles_q * BLOCKS_Q - 1, x_w, COLUMNS, MODE_W)

    x += channel * x_sc * X_VEC
    dy += channel * y_sc * Y_VEC
    m = tl.arange(0, ROWS)[:, None]  # [ROWS, 1]
    row_n = m // (BLOCKS_P * BLOCKS_Q)
    row_p = m // BLOCKS_Q % BLOCKS_P
    row_w = m % BLOCKS_Q * COLUMNS
    position = tl.arange(0, HEIGHT * CHUNK)[None, :]  # [1, HEIGHT * CHUNK]
    r = r0 + position // CHUNK
    lane = position % CHUNK
    q = tl.arange(0, COLUMNS)[None, :]  # [1, COLUMNS]
    tap = tl.arange(0, HEIGHT * TAPS)[:, None]  # [HEIGHT * TAPS, 1]
    sums = tl.zeros((HEIGHT * TAPS,), ACC)
    for column in range(aligned(begin_w), end_w, CHUNK):
        acc = tl.zeros((HEIGHT * CHUNK, COLUMNS), ACC)
        for step in range(steps):
            tile = first_tile + step
            first_q = tile % tiles_q * (BLOCKS_Q * COLUMNS)
            n = tile // tiles_q // tl.maximum(tiles_p, 1) * BLOCKS_N + row_n
            p = (begin_p + tile // tiles_q % tl.maximum(tiles_p, 1) * BLOCKS_P + row_p).to(INDEX)
            valid = (n < N) & (p < end_p)
            n = tl.where(valid, n, 0).to(INDEX)
            ow, valid_q = in_columns(first_q + row_w + q, q, y_w, y_w, ZEROS, Y_VEC)
            grads = tl.load(
                dy + (n * y_sn + tl.where(valid, p, 0) * y_sh) * Y_VEC + ow.to(INDEX) * y_sw,
                mask=valid & valid_q,
                other=0.0,
            )  # [ROWS, COLUMNS]
            h, valid_h = read_position(p + r - lower_h, x_h, valid & (r < taps_h), MODE_H)
            reach_w = y_w + taps_w - 1 - lower_w
            i, valid_w = in_columns(first_q + row_w + column + lane, lane, x_w, reach_w, MODE_W, X_VEC)
            pixels = tl.load(
                x + (n * x_sn + h * x_sh) * X_VEC + i.to(INDEX) * x_sw, mask=valid_h & valid_w, other=0.0
            )  # [ROWS, HEIGHT * CHUNK]
            acc = matrix_product(pixels.trans(), grads, acc, PRECISION)

        # tap s of output column q met input column q + s - lower_w
        met = q + (s0 + tap % TAPS - lower_w - column)  # [HEIGHT * TAPS, COLUMNS]
        met_here = (met >= 0) & (met < CHUNK)
        terms = tl.gather(acc, tl.where(met_here, tap // TAPS * CHUNK + met, 0), axis=0)
        sums += tl.sum(tl.where(met_here, terms, 0.0), axis=1)

    tap = tl.arange(0, HEIGHT * TAPS).to(INDEX)
    r_out = r0 + tap // TAPS
    s_out = s0 + tap % TAPS
    dw += slab.to(INDEX) * slab_stride + channel * w_sc
    valid = (r_out < taps_h) & (s_out < taps_w)
    tl.store(dw + r_out * w_sh + s_out * w_sw, sums.to(dw.dtype.element_ty), mask=valid)


def launches(geometry: ConvGeometry, strides: Strides, config, numerics) -> list[Launch]:
    """w from x and y, by way of slabs in the workspace where config.splits is more than 1."""
    g = geometry
    _, taps_h, taps_w = g.filter
    taps = min(triton.next_power_of_2(taps_w), BANDED_TAPS)
    numel = g.C * taps_h * taps_w
    arguments = {
        **activations(g, strides.x, g.input, strides.y, g.output),
        "w_sc": strides.w[0],
        "w_sh": strides.w[3],
        "w_sw": strides.w[4],
        "taps_h": taps_h,
        "taps_w": taps_w,
        "lower_h": g.padding[1][0],
        "lower_w": g.padding[2][0],
        "tiles_q": triton.cdiv(g.output[2], config.blocks[2] * config.columns),
        "slabs": config.splits,
        "slab_stride": numel,
        "TAPS": taps,
        **constants(g, config, numerics),
    }
    tiles = triton.cdiv(taps_h, config.height) * triton.cdiv(taps_w, taps)
    programs = launchable(g.C * tiles * config.splits, g)
    out = "w" if config.splits == 1 else "workspace"
    first = Launch("banded_wgrad", banded_wgrad_kernel, programs, ("x", "y", out), arguments)
    return [first] if config.splits == 1 else [first, sum_launch(numel, config.splits, arguments["INDEX"])]
