"""A depthwise convolution and the 1x1 convolution that follows it, in one kernel: what lies between stays in registers.

    GEMM_M = N * output positions   (pixels)
    GEMM_N = K output channels
    GEMM_K = E channels between the two; channel e of them belongs to input channel e // MULTIPLIER

A program computes BLOCK_N channels x BLOCK_M pixels. A step of the main loop sums up the products of all taps for
BLOCK_K channels of its pixels, rounds the sums to the operands' dtype, as memory would, and multiplies them by a block
of the 1x1 filters. Programs that share pixels each compute these sums again.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ..geometry import ConvGeometry, Role
from .epilogue import finish
from .indexing import (
    channel_block,
    constants,
    in_vectors,
    launchable,
    matrix_product,
    power_of_two_in,
    read_position,
)
from .launch import Launch

# What changes with the image must not be specialised, or every image size would be compiled anew.
IMAGE_SIZED = ["N", "y_d", "y_h", "y_w", "x_d", "x_h", "x_w"]
IMAGE_SIZED += ["x_sn", "x_sd", "x_sh", "x_sw", "y_sn", "y_sd", "y_sh", "y_sw"]


@triton.jit(do_not_specialize=IMAGE_SIZED, do_not_specialize_on_alignment=["x_sc", "y_sc"])
def separable_kernel(
    x,
    depthwise,
    depthwise_bias,
    pointwise,
    bias,
    y,
    N,
    E,
    K,
    # extents of output and input, and strides, all but the channel's in units of X_VEC or Y_VEC elements
    y_d,
    y_h,
    y_w,
    x_d,
    x_h,
    x_w,
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
    tap_strides,  # of a depthwise filter: of its channel and of the three taps
    pointwise_k,  # strides of the 1x1 filters
    pointwise_e,
    axis_d,
    axis_h,
    axis_w,
    HAS_DEPTHWISE_BIAS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    TAPS_D: tl.constexpr,
    TAPS_H: tl.constexpr,
    TAPS_W: tl.constexpr,
    MODE_D: tl.constexpr,
    MODE_H: tl.constexpr,
    MODE_W: tl.constexpr,
    X_VEC: tl.constexpr,
    Y_VEC: tl.constexpr,
    E_VEC: tl.constexpr,
    K_VEC: tl.constexpr,
    MULTIPLIER: tl.constexpr,
    INDEX: tl.constexpr,
    ACC: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    tiles_n = tl.cdiv(K, BLOCK_N)
    tile_n = tl.program_id(0) % tiles_n
    tile_m = tl.program_id(0) // tiles_n

    m = tile_m.to(INDEX) * BLOCK_M + tl.arange(0, BLOCK_M)  # [BLOCK_M]
    q = m % y_w
    p = m // y_w % y_h
    z = m // y_w // y_h % y_d
    n = m // y_w // y_h // y_d
    pixel_valid = n < N
    n = tl.where(pixel_valid, n, 0)
    base_d = (axis_d.offset + z * axis_d.src_step)[None, :]  # [1, BLOCK_M]
    base_h = (axis_h.offset + p * axis_h.src_step)[None, :]
    base_w = (axis_w.offset + q * axis_w.src_step)[None, :]
    image = (n * x_sn)[None, :]
    pixel_valid_row = pixel_valid[None, :]

    channel, channel_valid = channel_block(tile_n * BLOCK_N, K, BLOCK_N, K_VEC)  # [BLOCK_N]
    filters_k = channel.to(INDEX)[None, :] * pointwise_k
    se, st, sr, ss = tap_strides
    one = tl.full([], 1, INDEX)  # strides times it are as wide as offsets
    st, sr, ss = st * one, sr * one, ss * one

    acc = tl.zeros((BLOCK_M, BLOCK_N), ACC)
    for start in range(0, E, BLOCK_K):
        e, e_valid = channel_block(start, E, BLOCK_K, E_VEC)
        e = e.to(INDEX)[:, None]  # [BLOCK_K, 1]
        e_valid = e_valid[:, None]
        source = x + (e if MULTIPLIER == 1 else e // MULTIPLIER) * x_sc
        valid = pixel_valid_row & e_valid  # guards tails in pixels and in channels
        between = tl.zeros((BLOCK_K, BLOCK_M), ACC)
        if HAS_DEPTHWISE_BIAS:
            between += tl.load(depthwise_bias + e, mask=e_valid, other=0).to(ACC)
        for jd in range(TAPS_D):
            d, valid_d = read_position(base_d + jd * axis_d.src_tap_step, x_d, pixel_valid_row, MODE_D)
            for jh in range(TAPS_H):
                h, valid_h = read_position(base_h + jh * axis_h.src_tap_step, x_h, pixel_valid_row, MODE_H)
                for jw in tl.static_range(TAPS_W):
                    w, valid_w = read_position(base_w + jw * axis_w.src_tap_step, x_w, pixel_valid_row, MODE_W)
                    row = (image + d * x_sd + h * x_sh + w * x_sw) * X_VEC
                    pixels = tl.load(source + row, mask=valid & valid_d & valid_h & valid_w, other=0)
                    tap = tl.load(depthwise + e * se + (jd * st + jh * sr + jw * ss), mask=e_valid, other=0)
                    between = tl.fma(pixels.to(ACC), tl.broadcast_to(tap.to(ACC), (BLOCK_K, BLOCK_M)), between)
        filters = tl.load(
            pointwise + filters_k + e * pointwise_e, mask=e_valid & channel_valid[None, :], other=0
        )  # [BLOCK_K, BLOCK_N]
        acc = matrix_product(between.to(x.dtype.element_ty).trans(), filters, acc, PRECISION)

    out = finish(acc.trans(), y, y, bias, channel, channel_valid, False, HAS_BIAS, y.dtype.element_ty)
    row = (n * y_sn + z * y_sd + p * y_sh + q * y_sw) * Y_VEC
    at = row[None, :] + (channel.to(INDEX) * y_sc)[:, None]
    tl.store(y + at, out, mask=channel_valid[:, None] & pixel_valid_row)


def launch(depthwise: ConvGeometry, pointwise: ConvGeometry, strides, config, numerics, has_bias: bool) -> Launch:
    """`strides` are those of "x", "depthwise" (E, 1, T, R, S), "pointwise" (K, E, 1, 1, 1) and "y", by name.

    Numerics are those of the depthwise part, its bias included; `has_bias` is the 1x1 part's.
    """
    g = depthwise
    axes = g.axes(Role.FPROP)
    x_vec, x_strides = in_vectors(strides["x"])
    y_vec, y_strides = in_vectors(strides["y"])
    names = dict(zip(("y_d", "y_h", "y_w", "x_d", "x_h", "x_w"), (*g.output, *g.input), strict=True))
    shared = constants(g, config, numerics)
    arguments = dict(
        N=g.N,
        E=g.K,
        K=pointwise.K,
        **names,
        **dict(zip(("x_sn", "x_sc", "x_sd", "x_sh", "x_sw"), x_strides, strict=True)),
        **dict(zip(("y_sn", "y_sc", "y_sd", "y_sh", "y_sw"), y_strides, strict=True)),
        tap_strides=(strides["depthwise"][0], *strides["depthwise"][2:]),
        pointwise_k=strides["pointwise"][0],
        pointwise_e=strides["pointwise"][1],
        axis_d=axes[0],
        axis_h=axes[1],
        axis_w=axes[2],
        HAS_DEPTHWISE_BIAS=numerics.has_bias,
        HAS_BIAS=has_bias,
        TAPS_D=g.filter[0],
        TAPS_H=g.filter[1],
        TAPS_W=g.filter[2],
        X_VEC=x_vec,
        Y_VEC=y_vec,
        E_VEC=min(power_of_two_in(g.K), config.BLOCK_K),
        K_VEC=min(power_of_two_in(pointwise.K), config.BLOCK_N),
        MULTIPLIER=g.K // g.C,
        **{name: value for name, value in shared.items() if name not in ("DOT", "FLATTEN")},
    )
    positions = g.N * g.output[0] * g.output[1] * g.output[2]
    programs = -(-positions // config.BLOCK_M) * -(-pointwise.K // config.BLOCK_N)
    depthwise_bias, bias = ("depthwise_bias" if numerics.has_bias else None), ("bias" if has_bias else None)
    operands = ("x", "depthwise", depthwise_bias, "pointwise", bias, "y")
    return Launch("separable", separable_kernel, launchable(programs, g), operands, arguments)
