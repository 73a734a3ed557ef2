"""The gradients of a deformable convolution's offset and mask: results of dots meet the corners of x in registers.

    GEMM_M = input channels of one segment
    GEMM_N = N * P * Q   (pixels)
    GEMM_K = output channels of one group

A program has one tap of one offset group at BLOCK_M pixels. It computes what arrives at samples of BLOCK_N channels,

    column[c, pixel] = sum over k of w[k, c, tap] * dy[k, pixel],

multiplies it by each corner of x there, and sums up over channels, always in the same order. Slopes are differences of
these four sums.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ..deform_config import DeformProblem
from .deform_sampling import (
    CHANNEL_STRIDES,
    IMAGE_SIZED,
    arguments,
    corner_values,
    corners,
    modulation_of,
    options,
    tap_position,
    tile_pixels,
)
from .indexing import channel_block, launchable, multiply
from .launch import Launch


@triton.jit(do_not_specialize=IMAGE_SIZED, do_not_specialize_on_alignment=CHANNEL_STRIDES)
def deform_offset_kernel(
    x,
    offset,
    mask,
    w,
    dy,
    doffset,
    dmask,
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
):
    pid = tl.program_id(0)
    tap = pid % taps
    offset_group = (pid // taps % offset_groups).to(INDEX)
    n, p, q, pixel_valid = tile_pixels(pid // taps // offset_groups, N, P, Q, INDEX, BLOCK_M)
    index = offset_group * taps + tap
    of_offset = n * o_sn + p * o_sp + q * o_sq  # [BLOCK_M]
    at_h, at_w = tap_position(offset + of_offset, o_sc, index, tap, p, q, pixel_valid, H, W, window, ACC)
    rows, there, past_h, past_w = corners(at_h, at_w, n * x_sn, pixel_valid, H, W, x_sh, x_sw, X_VEC, INDEX)
    grads_of = dy + ((n * y_sn + p * y_sh + q * y_sw) * Y_VEC)[None, :]  # [1, BLOCK_M]

    sg, sk, sc, _, sr, ss = flt_strides
    columns = window[0]
    filters_of = w + ((tap // columns).to(INDEX) * sr + (tap % columns).to(INDEX) * ss) * FLT_VEC
    sum_a = tl.zeros((BLOCK_N, BLOCK_M), ACC)
    sum_b = tl.zeros((BLOCK_N, BLOCK_M), ACC)
    sum_c = tl.zeros((BLOCK_N, BLOCK_M), ACC)
    sum_d = tl.zeros((BLOCK_N, BLOCK_M), ACC)
    blocks_c = tl.cdiv(L, BLOCK_N)
    for step in range(offset_segments * blocks_c):
        segment = offset_group * offset_segments + step // blocks_c
        group, part = segment // group_segments, segment % group_segments
        c, c_valid = channel_block(step % blocks_c * BLOCK_N, L, BLOCK_N, C_VEC)  # [BLOCK_N]
        c = c.to(INDEX)
        block_filters = filters_of + group * sg * FLT_VEC + (part * (L // C_VEC * C_VEC) + c)[None, :] * sc
        block_grads = grads_of + group * (K // K_VEC * K_VEC) * y_sc
        column = tl.zeros((BLOCK_N, BLOCK_M), ACC)
        for block in range(tl.cdiv(K, BLOCK_K)):
            k, k_valid = channel_block(block * BLOCK_K, K, BLOCK_K, K_VEC)
            k = k.to(INDEX)[:, None]  # [BLOCK_K, 1]
            k_valid = k_valid[:, None]
            filters = tl.load(block_filters + k * sk * FLT_VEC, mask=k_valid & c_valid[None, :], other=0.0)
            grads = tl.load(block_grads + k * y_sc, mask=k_valid & pixel_valid[None, :], other=0.0)
            column = multiply(filters, grads, column, DOT, PRECISION)

        channels = x + (segment * (L // C_VEC * C_VEC) + c)[:, None] * x_sc
        a, b, c, d = corner_values(channels, c_valid[:, None], rows, there, ACC)  # [BLOCK_N, BLOCK_M] each
        sum_a += column * a
        sum_b += column * b
        sum_c += column * c
        sum_d += column * d

    sum_a, sum_b = tl.sum(sum_a, axis=0), tl.sum(sum_b, axis=0)
    sum_c, sum_d = tl.sum(sum_c, axis=0), tl.sum(sum_d, axis=0)
    # weighted, not sum_a + past_w * (sum_b - sum_a), which would make NaN of an infinity
    upper, lower = (1 - past_w) * sum_a + past_w * sum_b, (1 - past_w) * sum_c + past_w * sum_d
    slope_h = lower - upper
    slope_w = (1 - past_h) * (sum_b - sum_a) + past_h * (sum_d - sum_c)
    if HAS_MASK:
        of_mask = n * m_sn + p * m_sp + q * m_sq
        modulation = modulation_of(mask + of_mask, m_sc, index, pixel_valid, at_h, HAS_MASK)
        slope_h *= modulation
        slope_w *= modulation
        value = (1 - past_h) * upper + past_h * lower
        tl.store(dmask + of_mask + index * m_sc, value.to(dmask.dtype.element_ty), mask=pixel_valid)
    doffset += of_offset + 2 * index * o_sc
    tl.store(doffset, slope_h.to(doffset.dtype.element_ty), mask=pixel_valid)
    tl.store(doffset + o_sc, slope_w.to(doffset.dtype.element_ty), mask=pixel_valid)


def launches(problem: DeformProblem, config, numerics, tiles) -> list[Launch]:
    """doffset and dmask from x, offset, mask, w and y, which is dy."""
    known = {
        **arguments(deform_offset_kernel, problem, config.BLOCK_N, config.BLOCK_K),
        **options(config, numerics),
    }
    mask, dmask = ("mask", "dmask") if problem.has_mask else (None, None)
    operands = ("x", "offset", mask, "w", "y", "doffset", dmask)
    programs = launchable(tiles.total, problem.geometry)
    return [Launch("deform_offset", deform_offset_kernel, programs, operands, known)]
