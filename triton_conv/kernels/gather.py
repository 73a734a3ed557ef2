"""fprop and dgrad by gathering: pointer arithmetic over `Axis` maps, for any strides, dtype, rank and padding mode.

    GEMM_M = N * destination positions   (pixels)
    GEMM_N = destination channels of one group
    GEMM_K = filter taps * source channels of one group

| role  | src | flt               | dst | source channels | destination channels |
|-------|-----|-------------------|-----|-----------------|----------------------|
| fprop | x   | w                 | y   | C / groups      | K / groups           |
| dgrad | dy  | w, C and K swapped| dx  | K / groups      | C / groups           |

A program computes BLOCK_N channels x BLOCK_M pixels of one group and one residue class of the stride; a class
that no tap reaches runs no step and writes zeros. Without FLATTEN a step of the main loop is one tap and BLOCK_K
channels; with it, BLOCK_K consecutive (tap, channel) pairs, which suits few channels.

With CONTEXT the first ctx_d source frames (D) are in another tensor: each pixel and tap chooses where it reads.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .. import tiles
from ..geometry import Context, ConvGeometry, Role, Strides
from .epilogue import constants as epilogue_constants
from .epilogue import scaled, store
from .indexing import (
    channel_block,
    constants,
    filter_vectors,
    in_vectors,
    launchable,
    multiply,
    power_of_two_in,
    read_position,
    residue_class,
    tap_of,
)
from .launch import Launch

# What changes with the image must not be specialised, or every image size would be compiled anew.
IMAGE_SIZED = [
    "N",
    "dst_d",
    "dst_h",
    "dst_w",
    "src_d",
    "src_h",
    "src_w",
    "src_sn",
    "src_sd",
    "src_sh",
    "dst_sn",
    "dst_sd",
    "dst_sh",
    "tiles_m",
    "tiles_n",
    "ctx_d",
    "ctx_sn",
    "ctx_sd",
    "ctx_sh",
]
UNALIGNED = ["scale_a", "scale_b", "src_sc", "dst_sc", "ctx_sc"]


@triton.jit(do_not_specialize=IMAGE_SIZED, do_not_specialize_on_alignment=UNALIGNED)
def gather_kernel(
    src,
    context,  # the first frames of the source, or None
    flt,
    scale_a,
    scale_b,
    scale,
    bias,
    residual,  # in dst's strides, as is what is kept
    kept,
    dst,
    N,
    SRC_C,
    DST_C,
    # extents of destination and source, and strides, all but the channel's in units of SRC_VEC or DST_VEC elements
    dst_d,
    dst_h,
    dst_w,
    src_d,
    src_h,
    src_w,
    src_sn,
    src_sc,
    src_sd,
    src_sh,
    src_sw,
    dst_sn,
    dst_sc,
    dst_sd,
    dst_sh,
    dst_sw,
    flt_strides,  # of group, k, c and the three taps; all but c's in units of FLT_VEC elements
    axis_d,
    axis_h,
    axis_w,
    tiles_m,
    tiles_n,
    # frames of the context, and its strides, all but the channel's in units of CTX_VEC elements
    ctx_d,
    ctx_sn,
    ctx_sc,
    ctx_sd,
    ctx_sh,
    ctx_sw,
    CONTEXT: tl.constexpr,
    BOTH_LAST: tl.constexpr,  # channels lie side by side in both
    CTX_VEC: tl.constexpr,
    CTX_WHOLE: tl.constexpr,  # elements that divide the address of every row of channels, in both
    FORWARD: tl.constexpr,
    HAS_SCALE: tl.constexpr,
    SCALED: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    RESIDUAL: tl.constexpr,
    ACTIVATION: tl.constexpr,
    SLOPE: tl.constexpr,
    KEEPS: tl.constexpr,
    MODE_D: tl.constexpr,
    MODE_H: tl.constexpr,
    MODE_W: tl.constexpr,
    SRC_VEC: tl.constexpr,
    DST_VEC: tl.constexpr,
    FLT_VEC: tl.constexpr,
    SRC_C_VEC: tl.constexpr,
    DST_C_VEC: tl.constexpr,
    INDEX: tl.constexpr,
    ACC: tl.constexpr,
    PRECISION: tl.constexpr,
    DOT: tl.constexpr,
    FLATTEN: tl.constexpr,
    FILTERS_FIRST: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    pid = tl.program_id(0)
    tile_n = pid % tiles_n
    tile_m = pid // tiles_n % tiles_m
    part = pid // tiles_n // tiles_m
    phase_w = part % axis_w.phases
    phase_h = part // axis_w.phases % axis_h.phases
    phase_d = part // axis_w.phases // axis_h.phases % axis_d.phases
    group = (part // axis_w.phases // axis_h.phases // axis_d.phases).to(INDEX)

    # the tile's pixels: positions u within the residue class, then where they lie in the destination
    u_d = tl.cdiv(dst_d, axis_d.phases)
    u_h = tl.cdiv(dst_h, axis_h.phases)
    u_w = tl.cdiv(dst_w, axis_w.phases)
    m = tile_m.to(INDEX) * BLOCK_M + tl.arange(0, BLOCK_M)  # [BLOCK_M]
    uw = m % u_w
    uh = m // u_w % u_h
    ud = m // u_w // u_h % u_d
    n = m // u_w // u_h // u_d
    od = phase_d + ud * axis_d.phases
    oh = phase_h + uh * axis_h.phases
    ow = phase_w + uw * axis_w.phases
    pixel_valid = (n < N) & (od < dst_d) & (oh < dst_h) & (ow < dst_w)
    n = tl.where(pixel_valid, n, 0)

    source_d, taps_d, first_d = residue_class(axis_d, phase_d)
    source_h, taps_h, first_h = residue_class(axis_h, phase_h)
    source_w, taps_w, first_w = residue_class(axis_w, phase_w)
    base_d = (source_d + ud * axis_d.src_step)[None, :]  # [1, BLOCK_M]
    base_h = (source_h + uh * axis_h.src_step)[None, :]
    base_w = (source_w + uw * axis_w.src_step)[None, :]
    image = (n * src_sn)[None, :]
    pixel_valid_row = pixel_valid[None, :]

    channel, channel_valid = channel_block(tile_n * BLOCK_N, DST_C, BLOCK_N, DST_C_VEC)  # [BLOCK_N]
    sg, sk, sc, st, sr, ss = flt_strides
    src += group * (SRC_C // SRC_C_VEC * SRC_C_VEC) * src_sc
    flt += group * sg * FLT_VEC
    wide_channel = channel.to(INDEX)[None, :]  # [1, BLOCK_N]
    if CONTEXT:
        context += group * (SRC_C // SRC_C_VEC * SRC_C_VEC) * ctx_sc
        ctx_image = (n * ctx_sn)[None, :]

    if FILTERS_FIRST:
        acc = tl.zeros((BLOCK_N, BLOCK_M), ACC)
    else:
        acc = tl.zeros((BLOCK_M, BLOCK_N), ACC)
    taps = taps_d * taps_h * taps_w
    blocks_c = tl.cdiv(SRC_C, BLOCK_K)
    steps = tl.cdiv(taps * SRC_C, BLOCK_K) if FLATTEN else taps * blocks_c
    for step in range(steps):
        if FLATTEN:
            k = step * BLOCK_K + tl.arange(0, BLOCK_K)
            k_valid = k < taps * SRC_C
            k = tl.where(k_valid, k, 0)
            tap = (k // SRC_C)[:, None]  # [BLOCK_K, 1]
            c = k % SRC_C
        else:
            tap = step // blocks_c  # a scalar
            c, k_valid = channel_block(step % blocks_c * BLOCK_K, SRC_C, BLOCK_K, SRC_C_VEC)
        c = c.to(INDEX)[:, None]  # [BLOCK_K, 1]
        k_valid = k_valid[:, None]
        jd, jh, jw = tap_of(tap, taps_d, taps_h, taps_w, INDEX)

        valid = pixel_valid_row & k_valid  # guards tails in pixels and in channels
        d, valid_d = read_position(base_d + jd * axis_d.src_tap_step, src_d, pixel_valid_row, MODE_D)
        h, valid_h = read_position(base_h + jh * axis_h.src_tap_step, src_h, pixel_valid_row, MODE_H)
        w, valid_w = read_position(base_w + jw * axis_w.src_tap_step, src_w, pixel_valid_row, MODE_W)
        if CONTEXT:
            early = d < ctx_d
            row = (image + (d - ctx_d) * src_sd + h * src_sh + w * src_sw) * SRC_VEC
            ctx_row = (ctx_image + d * ctx_sd + h * ctx_sh + w * ctx_sw) * CTX_VEC
            address = tl.where(early, context + ctx_row, src + row)
            if CTX_WHOLE > 1:  # or Triton 3.9 forgets that it is so
                WIDTH: tl.constexpr = src.dtype.element_ty.primitive_bitwidth // 8
                address = tl.multiple_of(address, [min(CTX_WHOLE * WIDTH, 16), min(CTX_WHOLE * WIDTH, 16)])
            address += c if BOTH_LAST else c * tl.where(early, ctx_sc, src_sc)
            pixels = tl.load(address, mask=valid & valid_d & valid_h & valid_w, other=0.0)  # [BLOCK_K, BLOCK_M]
        else:
            row = (image + d * src_sd + h * src_sh + w * src_sw) * SRC_VEC
            pixels = tl.load(
                src + row + c * src_sc, mask=valid & valid_d & valid_h & valid_w, other=0.0
            )  # [BLOCK_K, BLOCK_M]

        t = first_d + jd * axis_d.tap_step
        r = first_h + jh * axis_h.tap_step
        s = first_w + jw * axis_w.tap_step
        row = t * st + r * sr + s * ss
        if FORWARD:
            offset = (row + wide_channel * sk) * FLT_VEC + c * sc
        else:
            offset = (row + c * sk) * FLT_VEC + wide_channel * sc
        filters = tl.load(flt + offset, mask=k_valid & channel_valid[None, :], other=0.0)  # [BLOCK_K, BLOCK_N]
        if FILTERS_FIRST:
            acc = multiply(filters, pixels, acc, DOT, PRECISION)
        else:
            acc = multiply(pixels, filters, acc, DOT, PRECISION)

    if not FILTERS_FIRST:
        acc = acc.trans()
    scale_group = scale + group * DST_C if SCALED else scale
    bias_group = bias + group * DST_C if HAS_BIAS else bias
    acc = scaled(
        acc, scale_a, scale_b, scale_group, bias_group, channel, channel_valid, HAS_SCALE, SCALED, HAS_BIAS
    )  # [BLOCK_N, BLOCK_M]
    dst_row = (n * dst_sn + od * dst_sd + oh * dst_sh + ow * dst_sw) * DST_VEC
    dst_channel = (group * (DST_C // DST_C_VEC * DST_C_VEC) + channel) * dst_sc
    at, valid = dst_row[None, :] + dst_channel[:, None], channel_valid[:, None] & pixel_valid_row
    store(acc, at, valid, residual, kept, dst, RESIDUAL, ACTIVATION, SLOPE, KEEPS)


def launch(
    role: Role,
    geometry: ConvGeometry,
    strides: Strides,
    config,
    numerics,
    into: str = "",
    context: Context | None = None,
) -> Launch:
    """FPROP: y from x and w; DGRAD: x from y and w. The output may be written `into` another tensor instead.

    With a context (FPROP) the geometry is that of all frames in a row, the strides of x those of its own.
    """
    g, groups = geometry, geometry.groups
    forward = role is Role.FPROP
    src_c, dst_c = (g.C, g.K) if forward else (g.K, g.C)
    src_extents, dst_extents = (g.input, g.output) if forward else (g.output, g.input)
    src_strides, dst_strides = (strides.x, strides.y) if forward else (strides.y, strides.x)
    axes = g.axes(role)
    src_vec, src_strides = in_vectors(src_strides)
    dst_vec, dst_strides = in_vectors(dst_strides)
    flt_vec, flt_strides = filter_vectors(g, strides.w)
    ctx_vec, ctx_strides = in_vectors(context.strides) if context else (1, (None,) * 5)
    of_group = 16 if groups == 1 else power_of_two_in(src_c // groups)  # divides where a group's channels begin
    counted = tiles.gather(role, g, config)
    names = dict(zip(("dst_d", "dst_h", "dst_w", "src_d", "src_h", "src_w"), (*dst_extents, *src_extents), strict=True))
    arguments = dict(
        N=g.N,
        SRC_C=src_c // groups,
        DST_C=dst_c // groups,
        **names,
        **dict(zip(("src_sn", "src_sc", "src_sd", "src_sh", "src_sw"), src_strides, strict=True)),
        **dict(zip(("dst_sn", "dst_sc", "dst_sd", "dst_sh", "dst_sw"), dst_strides, strict=True)),
        flt_strides=flt_strides,
        axis_d=axes[0],
        axis_h=axes[1],
        axis_w=axes[2],
        tiles_m=counted.tiles_m,
        tiles_n=counted.tiles_n,
        ctx_d=context.frames if context else None,
        **dict(zip(("ctx_sn", "ctx_sc", "ctx_sd", "ctx_sh", "ctx_sw"), ctx_strides, strict=True)),
        CONTEXT=context is not None,
        BOTH_LAST=context is not None and ctx_strides[1] == src_strides[1] == 1,
        CTX_VEC=ctx_vec,
        CTX_WHOLE=min(src_vec, ctx_vec, of_group) if context and context.aligned else 1,
        FORWARD=forward,
        HAS_SCALE=numerics.has_scale,
        **epilogue_constants(numerics),
        SRC_VEC=src_vec,
        DST_VEC=dst_vec,
        FLT_VEC=flt_vec,
        SRC_C_VEC=min(power_of_two_in(src_c // groups), config.BLOCK_K),
        DST_C_VEC=min(power_of_two_in(dst_c // groups), config.BLOCK_N),
        FILTERS_FIRST=config.filters_first,
        **constants(g, config, numerics),
    )
    src, dst = ("x", into or "y") if forward else ("y", into or "x")
    programs = launchable(counted.total, g)
    before = None if context is None else "context" if context.held else src
    operands = (src, before, "w", *numerics.operands, dst)
    return Launch("gather", gather_kernel, programs, operands, arguments)
