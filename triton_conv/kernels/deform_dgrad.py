"""dgrad of deformable convolutions by gathering: what every pixel of x gave is found by sorting, so that nothing races.

    GEMM_M = N * H * W   (pixels)
    GEMM_N = input channels of one segment
    GEMM_K = filter taps * output channels of one group

The pixels of x lie at the corners of *cells*, (H + 1) x (W + 1) of them with the border. `deform_cells` writes the cell
that each output pixel samples in at each tap; sorted by cell, in `order`, output pixels are lists, one for a cell, that
begin at `first`. A pixel of x belongs to four cells, two and two of them neighbours in that order. So a program finds
all that its BLOCK_M pixels contributed to as two runs each, gathers BLOCK_K channels of dy there, weighted anew, and
multiplies the sums by the filters of BLOCK_N channels. It goes on to the tile's longest list. A thread holds a vector
of each PART_K channels, so that it works out a weight for several.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ..deform_config import DeformProblem
from .deform_sampling import (
    CHANNEL_STRIDES,
    IMAGE_SIZED,
    arguments,
    modulation_of,
    options,
    tap_position,
    tile_pixels,
)
from .indexing import channel_block, launchable, multiply
from .launch import Launch, all_registers

CELLS_BLOCK = 256


@triton.jit(do_not_specialize=IMAGE_SIZED)
def deform_cells(
    offset,
    cells,
    N,
    H,
    W,
    P,
    Q,
    taps,
    offset_groups,
    o_sn,
    o_sc,
    o_sp,
    o_sq,
    window,  # filter columns; stride, lower padding and dilation of rows and columns
    INDEX: tl.constexpr,
    ACC: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """cells[n, offset group, tap, p, q]: the number of the cell that is sampled in, or that of cells if in none."""
    pid = tl.program_id(0)
    lists = taps * offset_groups
    index = (pid % lists).to(INDEX)
    n, p, q, valid = tile_pixels(pid // lists, N, P, Q, INDEX, BLOCK)
    offset += n * o_sn + p * o_sp + q * o_sq
    h, w = tap_position(offset, o_sc, index, index % taps, p, q, valid, H, W, window, ACC)
    there = (h > -1) & (h < H) & (w > -1) & (w < W)
    cell = (tl.floor(h).to(tl.int32) + 1) * (W + 1) + tl.floor(w).to(tl.int32) + 1
    cell = tl.where(there, cell, (H + 1) * (W + 1))
    tl.store(cells + ((n * lists + index) * P + p) * Q + q, cell, mask=valid)


@triton.jit(do_not_specialize=IMAGE_SIZED, do_not_specialize_on_alignment=CHANNEL_STRIDES)
def deform_dgrad_kernel(
    offset,
    mask,
    w,
    dy,
    order,
    first,
    dx,
    N,
    H,
    W,
    P,
    Q,
    L,  # channels of a segment
    K,  # output channels of a group
    taps,
    offset_groups,
    group_segments,  # segments of a group, and of an offset group
    offset_segments,
    x_sn,
    x_sc,
    x_sh,
    x_sw,
    y_sn,
    y_sc,
    y_sh,
    y_sw,
    o_sn,
    o_sc,
    o_sp,
    o_sq,
    m_sn,
    m_sc,
    m_sp,
    m_sq,
    flt_strides,  # of group, k, c and the three taps
    window,  # filter columns; stride, lower padding and dilation of rows and columns
    HAS_MASK: tl.constexpr,
    X_VEC: tl.constexpr,
    Y_VEC: tl.constexpr,
    FLT_VEC: tl.constexpr,
    C_VEC: tl.constexpr,
    K_VEC: tl.constexpr,
    INDEX: tl.constexpr,
    ACC: tl.constexpr,
    PRECISION: tl.constexpr,
    DOT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PART_K: tl.constexpr,
):
    blocks_c = tl.cdiv(L, BLOCK_N)
    segments = offset_groups * offset_segments
    pid = tl.program_id(0)
    block_c = pid % blocks_c
    segment = (pid // blocks_c % segments).to(INDEX)
    n, h, w_, pixel_valid = tile_pixels(pid // blocks_c // segments, N, H, W, INDEX, BLOCK_M)
    group = segment // group_segments
    c, c_valid = channel_block(block_c * BLOCK_N, L, BLOCK_N, C_VEC)  # [BLOCK_N]
    c = c.to(INDEX)

    sg, sk, sc, _, sr, ss = flt_strides
    columns = window[0]
    filters_of = (
        w + group * sg * FLT_VEC + ((segment % group_segments * (L // C_VEC * C_VEC) + c) * sc)[None, :]
    )  # [1, BLOCK_N]
    grads_of = dy + group * (K // K_VEC * K_VEC) * y_sc
    lists = n * (taps * offset_groups) + segment // offset_segments * taps  # [BLOCK_M]
    cell = h * (W + 1) + w_
    grads_image = n * y_sn
    offset += n * o_sn
    if HAS_MASK:
        mask += n * m_sn

    acc = tl.zeros((BLOCK_M, BLOCK_N), ACC)
    for tap in range(taps):
        # the cells above the pixel, left and right of it, and those below
        begins = first + ((lists + tap) * ((H + 1) * (W + 1) + 1) + cell)
        above = tl.load(begins, mask=pixel_valid, other=0)
        above_count = tl.load(begins + 2, mask=pixel_valid, other=0) - above
        below = tl.load(begins + W + 1, mask=pixel_valid, other=0)
        count = above_count + tl.load(begins + W + 3, mask=pixel_valid, other=0) - below
        longest = tl.max(count, axis=0)
        index = segment // offset_segments * taps + tap
        entries = order + (lists + tap) * (P * Q).to(INDEX)
        tap_filters = filters_of + ((tap // columns).to(INDEX) * sr + (tap % columns).to(INDEX) * ss) * FLT_VEC
        for block in range(tl.cdiv(K, BLOCK_K)):
            sums = (tl.zeros((PART_K, BLOCK_M), ACC),) * (BLOCK_K // PART_K)
            for j in range(longest):
                has = j < count
                entry = tl.where(has, tl.where(j < above_count, above + j, below + (j - above_count)), 0)
                pixel = tl.load(entries + entry, mask=has, other=0).to(INDEX)
                p, q = pixel // Q, pixel % Q
                at_h, at_w = tap_position(
                    offset + (p * o_sp + q * o_sq), o_sc, index, tap, p, q, has, H, W, window, ACC
                )
                weight = (1 - tl.abs(at_h - h.to(ACC))) * (1 - tl.abs(at_w - w_.to(ACC)))
                mask_of = mask + (p * m_sp + q * m_sq) if HAS_MASK else mask
                weight = tl.where(has, weight * modulation_of(mask_of, m_sc, index, has, at_h, HAS_MASK), 0)
                grads_row = grads_of + ((grads_image + p * y_sh + q * y_sw) * Y_VEC)[None, :]
                added: tl.tuple = ()
                for part in tl.static_range(BLOCK_K // PART_K):
                    k, k_valid = channel_block(block * BLOCK_K + part * PART_K, K, PART_K, K_VEC)
                    grads = tl.load(
                        grads_row + k.to(INDEX)[:, None] * y_sc, mask=k_valid[:, None] & has[None, :], other=0.0
                    )  # [PART_K, BLOCK_M]
                    added += (sums[part] + weight[None, :] * grads.to(ACC),)
                sums = added
            for part in tl.static_range(BLOCK_K // PART_K):
                k, k_valid = channel_block(block * BLOCK_K + part * PART_K, K, PART_K, K_VEC)
                filters = tl.load(
                    tap_filters + k.to(INDEX)[:, None] * sk * FLT_VEC,
                    mask=k_valid[:, None] & c_valid[None, :],
                    other=0.0,
                )  # [PART_K, BLOCK_N]
                acc = multiply(sums[part].to(w.dtype.element_ty), filters, acc, DOT, PRECISION)

    row = (n * x_sn + h * x_sh + w_ * x_sw) * X_VEC
    channel = (segment * (L // C_VEC * C_VEC) + c) * x_sc
    tl.store(
        dx + row[None, :] + channel[:, None],
        acc.trans().to(dx.dtype.element_ty),
        mask=c_valid[:, None] & pixel_valid[None, :],
    )


def launches(problem: DeformProblem, config, numerics, tiles) -> list[Launch]:
    """The cells, from offset, to be sorted; then x from offset, mask, w, y, which is dy, and the sorted lists."""
    g = problem.geometry
    known = arguments(deform_cells, problem, 1, 1)
    known |= {name: value for name, value in options(config, numerics).items() if name in ("INDEX", "ACC", "num_warps")}
    programs = launchable(
        triton.cdiv(g.N * g.output[1] * g.output[2], CELLS_BLOCK) * known["taps"] * known["offset_groups"], g
    )
    cells = Launch("deform_cells", deform_cells, programs, ("offset", "cells"), {**known, "BLOCK": CELLS_BLOCK})
    known = {**arguments(deform_dgrad_kernel, problem, config.BLOCK_N, config.BLOCK_K), **options(config, numerics)}
    part = max(64 // problem.item_bytes, 16) if config.dot else config.BLOCK_K
    if config.dot and problem.item_bytes == 2 and config.BLOCK_N >= 64:
        known["maxnreg"] = all_registers(config.num_warps)
    known["PART_K"] = min(part, config.BLOCK_K)
    operands = ("offset", "mask" if problem.has_mask else None, "w", "y", "order", "first", "x")
    return [cells, Launch("deform_dgrad", deform_dgrad_kernel, launchable(tiles.total, g), operands, known)]
