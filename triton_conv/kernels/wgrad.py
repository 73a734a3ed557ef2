"""wgrad by gathering: the reduction runs over pixels, cut into slabs that are summed in fixed order.

    GEMM_M = output channels of one group, K / groups
    GEMM_N = filter taps * input channels of one group   (columns)
    GEMM_K = N * Z * P * Q   (pixels)

A program computes BLOCK_N output channels x BLOCK_K columns from one slab of pixels, BLOCK_M at a time: the blocks
are named as in `gather`, where BLOCK_M counts pixels too. Each slab writes a copy of dw of its own; `sum_slabs` adds
them up, always in the same order, so that no atomics are needed and every run gives the same bits.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .. import tiles
from ..geometry import ConvGeometry, Role, Strides
from .indexing import (
    channel_block,
    constants,
    filter_vectors,
    in_vectors,
    launchable,
    multiply,
    power_of_two_in,
    read_position,
    tap_of,
)
from .launch import Launch, all_registers

# What changes with the image must not be specialised, or every image size would be compiled anew.
IMAGE_SIZED = [
    "N",
    "x_d",
    "x_h",
    "x_w",
    "y_d",
    "y_h",
    "y_w",
    "x_sn",
    "x_sd",
    "x_sh",
    "y_sn",
    "y_sd",
    "y_sh",
    "slabs",
    "steps_per_slab",
    "slab_stride",
]
CHANNEL_STRIDES = ["x_sc", "y_sc"]
SUM_BLOCK = 1024


@triton.jit(do_not_specialize=IMAGE_SIZED, do_not_specialize_on_alignment=CHANNEL_STRIDES)
def wgrad_kernel(
    x,
    dy,
    dw,
    N,
    C,
    K,
    # extents and strides, all but the channel's in units of X_VEC or Y_VEC elements
    x_d,
    x_h,
    x_w,
    y_d,
    y_h,
    y_w,
    x_sn,
    x_sc,
    x_sd,
    x_sh,
    x_sw,
    y_sn,
    y_sc,
    y_sd,
    y_sh,
    y_sw,
    flt_strides,  # of group, k, c and the three taps in dw or in a slab; all but c's in units of FLT_VEC elements
    axis_d,
    axis_h,
    axis_w,
    slabs,
    steps_per_slab,
    slab_stride,
    MODE_D: tl.constexpr,
    MODE_H: tl.constexpr,
    MODE_W: tl.constexpr,
    X_VEC: tl.constexpr,
    Y_VEC: tl.constexpr,
    FLT_VEC: tl.constexpr,
    C_VEC: tl.constexpr,
    K_VEC: tl.constexpr,
    INDEX: tl.constexpr,
    ACC: tl.constexpr,
    PRECISION: tl.constexpr,
    DOT: tl.constexpr,
    FLATTEN: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    taps_h, taps_w = axis_h.filter, axis_w.filter
    taps = axis_d.filter * taps_h * taps_w
    blocks_c = tl.cdiv(C, BLOCK_K)
    tiles_col = tl.cdiv(taps * C, BLOCK_K) if FLATTEN else taps * blocks_c
    tiles_k = tl.cdiv(K, BLOCK_N)
    pid = tl.program_id(0)
    tile_k = pid % tiles_k
    tile_col = pid // tiles_k % tiles_col
    slab = pid // tiles_k // tiles_col % slabs
    group = (pid // tiles_k // tiles_col // slabs).to(INDEX)

    # the tile's columns: a tap and a channel each
    if FLATTEN:
        column = tile_col * BLOCK_K + tl.arange(0, BLOCK_K)
        col_valid = column < taps * C
        column = tl.where(col_valid, column, 0)
        tap = (column // C)[:, None]  # [BLOCK_K, 1]
        c = column % C
    else:
        tap = tile_col // blocks_c  # a scalar
        c, col_valid = channel_block(tile_col % blocks_c * BLOCK_K, C, BLOCK_K, C_VEC)
    c = c.to(INDEX)[:, None]  # [BLOCK_K, 1]
    jd, jh, jw = tap_of(tap, axis_d.filter, taps_h, taps_w, INDEX)
    tap_d = axis_d.offset + jd * axis_d.src_tap_step
    tap_h = axis_h.offset + jh * axis_h.src_tap_step
    tap_w = axis_w.offset + jw * axis_w.src_tap_step
    k, k_valid = channel_block(tile_k * BLOCK_N, K, BLOCK_N, K_VEC)  # [BLOCK_N]
    k = k.to(INDEX)[:, None]

    x_col = x + (group * (C // C_VEC * C_VEC) + c) * x_sc  # [BLOCK_K, 1]
    y_row = dy + (group * (K // K_VEC * K_VEC) + k) * y_sc  # [BLOCK_N, 1]
    acc = tl.zeros((BLOCK_N, BLOCK_K), ACC)
    first = slab.to(INDEX) * steps_per_slab
    for step in range(steps_per_slab):
        m = (first + step) * BLOCK_M + tl.arange(0, BLOCK_M)  # [BLOCK_M]
        q = m % y_w
        p = m // y_w % y_h
        z = m // y_w // y_h % y_d
        n = m // y_w // y_h // y_d
        pixel_valid = n < N
        n = tl.where(pixel_valid, n, 0)
        grads = tl.load(
            y_row + ((n * y_sn + z * y_sd + p * y_sh + q * y_sw) * Y_VEC)[None, :],
            mask=k_valid[:, None] & pixel_valid[None, :],
            other=0,
        )  # [BLOCK_N, BLOCK_M]
        row_valid = pixel_valid[None, :]
        d, valid_d = read_position((z * axis_d.src_step)[None, :] + tap_d, x_d, row_valid, MODE_D)
        h, valid_h = read_position((p * axis_h.src_step)[None, :] + tap_h, x_h, row_valid, MODE_H)
        w, valid_w = read_position((q * axis_w.src_step)[None, :] + tap_w, x_w, row_valid, MODE_W)
        row = ((n * x_sn)[None, :] + d * x_sd + h * x_sh + w * x_sw) * X_VEC
        pixels = tl.load(
            x_col + row, mask=col_valid[:, None] & row_valid & valid_d & valid_h & valid_w, other=0
        )  # [BLOCK_K, BLOCK_M]
        acc = multiply(grads.trans(), pixels.trans(), acc, DOT, PRECISION)

    sg, sk, sc, st, sr, ss = flt_strides
    dw += (slab.to(INDEX) * slab_stride + group * sg) * FLT_VEC
    column = (jd * st + jh * sr + jw * ss) * FLT_VEC + c * sc  # [BLOCK_K, 1]
    offset = k * sk * FLT_VEC + column.trans()
    tl.store(dw + offset, acc.to(dw.dtype.element_ty), mask=k_valid[:, None] & col_valid[None, :])


@triton.jit(do_not_specialize=["count", "slabs"])
def sum_slabs(src, dst, count, slabs, INDEX: tl.constexpr, BLOCK: tl.constexpr):
    """dst[i] = src[0][i] + src[1][i] + ..., in that order, in the slabs' precision."""
    i = tl.program_id(0).to(INDEX) * BLOCK + tl.arange(0, BLOCK)  # [BLOCK]
    valid = i < count
    src += tl.where(valid, i, 0)
    acc = tl.zeros((BLOCK,), src.dtype.element_ty)
    for _ in range(slabs):
        acc += tl.load(src, mask=valid, other=0)
        src += count
    tl.store(dst + i, acc.to(dst.dtype.element_ty), mask=valid)


def launches(geometry: ConvGeometry, strides: Strides, config, numerics) -> list[Launch]:
    """w from x and y, by way of slabs in the workspace where config.splits is more than 1."""
    g, groups = geometry, geometry.groups
    C, K = g.C // groups, g.K // groups
    axes = g.axes(Role.WGRAD)
    x_vec, x_strides = in_vectors(strides.x)
    y_vec, y_strides = in_vectors(strides.y)
    flt_vec, flt_strides = filter_vectors(g, strides.w)
    counted = tiles.wgrad(g, config)
    names = dict(zip(("x_d", "x_h", "x_w", "y_d", "y_h", "y_w"), (*g.input, *g.output), strict=True))
    numel = g.K * C * g.taps
    arguments = dict(
        N=g.N,
        C=C,
        K=K,
        **names,
        **dict(zip(("x_sn", "x_sc", "x_sd", "x_sh", "x_sw"), x_strides, strict=True)),
        **dict(zip(("y_sn", "y_sc", "y_sd", "y_sh", "y_sw"), y_strides, strict=True)),
        flt_strides=flt_strides,
        axis_d=axes[0],
        axis_h=axes[1],
        axis_w=axes[2],
        slabs=config.splits,
        steps_per_slab=counted.longest,
        slab_stride=numel // flt_vec,  # whole: dw is dense
        X_VEC=x_vec,
        Y_VEC=y_vec,
        FLT_VEC=flt_vec,
        C_VEC=min(power_of_two_in(C), config.BLOCK_K),
        K_VEC=min(power_of_two_in(K), config.BLOCK_N),
        **constants(g, config, numerics),
    )
    if g.taps == g.filter[0] > 1:
        arguments["maxnreg"] = all_registers(config.num_warps)
    programs = launchable(counted.total, g)
    if config.splits == 1:
        return [Launch("wgrad", wgrad_kernel, programs, ("x", "y", "w"), arguments)]
    return [
        Launch("wgrad", wgrad_kernel, programs, ("x", "y", "workspace"), arguments),
        sum_launch(numel, config.splits, arguments["INDEX"]),
    ]


def sum_launch(count: int, slabs: int, index) -> Launch:
    """w of `count` elements from the slabs in the workspace."""
    arguments = {"count": count, "slabs": slabs, "INDEX": index, "BLOCK": SUM_BLOCK}
    return Launch("sum_slabs", sum_slabs, triton.cdiv(count, SUM_BLOCK), ("workspace", "w"), arguments)
