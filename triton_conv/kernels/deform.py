"""fprop of deformable convolutions by gathering: bilinear samples are combined in registers on their way to the dot.

    GEMM_M = N * P * Q   (pixels)
    GEMM_N = output channels of one group
    GEMM_K = filter taps * input channels of one group

A program computes BLOCK_N output channels x BLOCK_M pixels of one group. It reads the offsets of its pixels once for
each tap and offset group, and then gathers the four corners of BLOCK_K channels a step; no column is ever stored.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ..deform_config import DeformProblem
from .deform_sampling import (
    CHANNEL_STRIDES,
    IMAGE_SIZED,
    arguments,
    corner_weights,
    corners,
    interpolate,
    modulation_of,
    options,
    tap_position,
    tile_pixels,
)
from .epilogue import finish
from .indexing import channel_block, launchable, multiply
from .launch import Launch


@triton.jit(do_not_specialize=[*IMAGE_SIZED, "tiles_m", "tiles_n"], do_not_specialize_on_alignment=CHANNEL_STRIDES)
def deform_kernel(
    x,
    offset,
    mask,
    w,
    bias,
    y,
    N,
    H,
    W,
    P,
    Q,
    L,  # channels of a segment
    K,  # output channels of a group
    taps,
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
    tiles_m,
    tiles_n,
    HAS_MASK: tl.constexpr,
    HAS_BIAS: tl.constexpr,
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
    tile_n = pid % tiles_n
    tile_m = pid // tiles_n % tiles_m
    group = (pid // tiles_n // tiles_m).to(INDEX)
    n, p, q, pixel_valid = tile_pixels(tile_m, N, P, Q, INDEX, BLOCK_M)
    k, k_valid = channel_block(tile_n * BLOCK_N, K, BLOCK_N, K_VEC)  # [BLOCK_N]

    sg, sk, sc, _, sr, ss = flt_strides
    columns = window[0]
    filters_of = w + (group * sg + k.to(INDEX) * sk)[None, :] * FLT_VEC  # [1, BLOCK_N]
    offset += n * o_sn + p * o_sp + q * o_sq  # [BLOCK_M]
    if HAS_MASK:
        mask += n * m_sn + p * m_sp + q * m_sq
    image = n * x_sn

    acc = tl.zeros((BLOCK_M, BLOCK_N), ACC)
    for step in range(taps * group_segments):
        tap, part = step // group_segments, (step % group_segments).to(INDEX)
        segment = group * group_segments + part
        index = segment // offset_segments * taps + tap
        at_h, at_w = tap_position(offset, o_sc, index, tap, p, q, pixel_valid, H, W, window, ACC)
        modulation = modulation_of(mask, m_sc, index, pixel_valid, at_h, HAS_MASK)
        rows, there, past_h, past_w = corners(at_h, at_w, image, pixel_valid, H, W, x_sh, x_sw, X_VEC, INDEX)
        weights = corner_weights(past_h, past_w, modulation)
        source = x + segment * (L // C_VEC * C_VEC) * x_sc
        tap_filters = (
            filters_of
            + ((tap // columns).to(INDEX) * sr + (tap % columns).to(INDEX) * ss) * FLT_VEC
            + part * (L // C_VEC * C_VEC) * sc
        )
        for block in range(tl.cdiv(L, BLOCK_K)):
            c, c_valid = channel_block(block * BLOCK_K, L, BLOCK_K, C_VEC)
            c = c.to(INDEX)[:, None]  # [BLOCK_K, 1]
            c_valid = c_valid[:, None]
            filters = tl.load(tap_filters + c * sc, mask=c_valid & k_valid[None, :], other=0.0)  # [BLOCK_K, BLOCK_N]
            sampled = interpolate(source + c * x_sc, c_valid, rows, there, weights, ACC)  # [BLOCK_K, BLOCK_M]
            acc = multiply(sampled.to(w.dtype.element_ty), filters, acc, DOT, PRECISION)

    bias_group = bias + group * K if HAS_BIAS else bias
    out = finish(acc.trans(), None, None, bias_group, k, k_valid, False, HAS_BIAS, y.dtype.element_ty)
    row = (n * y_sn + p * y_sh + q * y_sw) * Y_VEC
    channel = (group * (K // K_VEC * K_VEC) + k) * y_sc
    tl.store(y + row[None, :] + channel[:, None], out, mask=k_valid[:, None] & pixel_valid[None, :])


def launches(problem: DeformProblem, config, numerics, tiles) -> list[Launch]:
    """y from x, offset, mask, w and bias."""
    known = dict(
        **arguments(deform_kernel, problem, config.BLOCK_K, config.BLOCK_N),
        **options(config, numerics),
        tiles_m=tiles.tiles_m,
        tiles_n=tiles.tiles_n,
        HAS_BIAS=problem.has_bias,
    )
    mask, bias = "mask" if problem.has_mask else None, "bias" if problem.has_bias else None
    programs = launchable(tiles.total, problem.geometry)
    return [Launch("deform", deform_kernel, programs, ("x", "offset", mask, "w", bias, "y"), known)]
