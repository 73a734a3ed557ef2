"""wgrad of deformable convolutions: as `wgrad`, over samples that are interpolated on their way to the dot.

    GEMM_M = output channels of one group, K / groups
    GEMM_N = filter taps * input channels of one group
    GEMM_K = N * P * Q   (pixels)

A program computes BLOCK_N output channels x BLOCK_K input channels of one segment at one tap, from one slab of pixels,
BLOCK_M at a time. Slabs are summed in fixed order by `wgrad.sum_slabs`.
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
from .indexing import channel_block, launchable, multiply
from .launch import Launch
from .wgrad import sum_launch


@triton.jit(
    do_not_specialize=[*IMAGE_SIZED, "slabs", "steps_per_slab", "slab_stride"],
    do_not_specialize_on_alignment=CHANNEL_STRIDES,
)
def deform_wgrad_kernel(
    x,
    offset,
    mask,
    dy,
    dw,
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
    flt_strides,  # of group, k, c and the three taps in dw or in a slab
    window,  # filter columns; stride, lower padding and dilation of rows and columns
    slabs,
    steps_per_slab,
    slab_stride,
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
    blocks_c, tiles_k = tl.cdiv(L, BLOCK_K), tl.cdiv(K, BLOCK_N)
    pid = tl.program_id(0)
    tile_k = pid % tiles_k
    block = pid // tiles_k % blocks_c
    tap = pid // tiles_k // blocks_c % taps
    rest = pid // tiles_k // blocks_c // taps
    slab = rest % slabs
    segment = (rest // slabs).to(INDEX)
    group, part = segment // group_segments, segment % group_segments
    index = segment // offset_segments * taps + tap

    c, c_valid = channel_block(block * BLOCK_K, L, BLOCK_K, C_VEC)  # [BLOCK_K]
    k, k_valid = channel_block(tile_k * BLOCK_N, K, BLOCK_N, K_VEC)  # [BLOCK_N]
    c, k = c.to(INDEX)[:, None], k.to(INDEX)[:, None]
    c_valid, k_valid = c_valid[:, None], k_valid[:, None]
    channels = x + (segment * (L // C_VEC * C_VEC) + c) * x_sc  # [BLOCK_K, 1]
    grads_of = dy + (group * (K // K_VEC * K_VEC) + k) * y_sc  # [BLOCK_N, 1]

    acc = tl.zeros((BLOCK_N, BLOCK_K), ACC)
    first = slab.to(INDEX) * steps_per_slab
    for step in range(steps_per_slab):
        n, p, q, pixel_valid = tile_pixels(first + step, N, P, Q, INDEX, BLOCK_M)
        pixel = ((n * y_sn + p * y_sh + q * y_sw) * Y_VEC)[None, :]
        grads = tl.load(grads_of + pixel, mask=k_valid & pixel_valid[None, :], other=0)  # [BLOCK_N, BLOCK_M]
        offset_of = offset + (n * o_sn + p * o_sp + q * o_sq)
        at_h, at_w = tap_position(offset_of, o_sc, index, tap, p, q, pixel_valid, H, W, window, ACC)
        mask_of = mask + (n * m_sn + p * m_sp + q * m_sq) if HAS_MASK else mask
        modulation = modulation_of(mask_of, m_sc, index, pixel_valid, at_h, HAS_MASK)
        rows, there, past_h, past_w = corners(at_h, at_w, n * x_sn, pixel_valid, H, W, x_sh, x_sw, X_VEC, INDEX)
        weights = corner_weights(past_h, past_w, modulation)
        sampled = interpolate(channels, c_valid, rows, there, weights, ACC).to(grads.dtype)  # [BLOCK_K, BLOCK_M]
        acc = multiply(grads.trans(), sampled.trans(), acc, DOT, PRECISION)

    sg, sk, sc, _, sr, ss = flt_strides
    columns = window[0]
    tap = tap.to(INDEX)
    dw += (slab.to(INDEX) * slab_stride + group * sg + tap // columns * sr + tap % columns * ss) * FLT_VEC
    at = k * sk * FLT_VEC + ((part * (L // C_VEC * C_VEC) + c) * sc).trans()
    tl.store(dw + at, acc.to(dw.dtype.element_ty), mask=k_valid & c_valid.trans())


def launches(problem: DeformProblem, config, numerics, tiles) -> list[Launch]:
    """w from x, offset, mask and y, by way of slabs in the workspace where config.splits is more than 1."""
    g = problem.geometry
    numel = g.K * (g.C // g.groups) * g.taps
    known = arguments(deform_wgrad_kernel, problem, config.BLOCK_K, config.BLOCK_N)
    known |= dict(
        **options(config, numerics),
        slabs=config.splits,
        steps_per_slab=tiles.longest,
        slab_stride=numel // known["FLT_VEC"],  # whole: dw is dense
    )
    mask, dw = "mask" if problem.has_mask else None, "w" if config.splits == 1 else "workspace"
    programs = launchable(tiles.total, g)
    found = [Launch("deform_wgrad", deform_wgrad_kernel, programs, ("x", "offset", mask, "y", dw), known)]
    return found if config.splits == 1 else [*found, sum_launch(numel, config.splits, known["INDEX"])]
