"""fprop and dgrad of depthwise convolutions (C / groups == 1): products summed in registers, no dot.

    K = MULTIPLIER * C; output channel k belongs to input channel k // MULTIPLIER

| role  | src | dst | destination channels | what a destination channel reads                         |
|-------|-----|-----|----------------------|----------------------------------------------------------|
| fprop | x   | y   | K                    | source k // MULTIPLIER, by filter k                      |
| dgrad | dy  | dx  | C                    | sources c * MULTIPLIER + e, each by the filter so called |

A program computes CHANNELS channels x LANES `lanes` of one residue class of the stride. The sums of a lane stay in
registers: a source value is loaded and widened once and multiplied into all of them that it reaches. UNROLL_R x
UNROLL_S taps are unrolled, loops walk over the rest of the filter. An input gradient of stride 1 is the forward kernel
with its taps reversed.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ..geometry import Axis, ConvGeometry, Role, Strides
from .epilogue import constants as epilogue_constants
from .epilogue import store
from .indexing import channel_block, launchable, power_of_two_in, residue_class
from .lanes import CHANNEL_STRIDES, IMAGE_SIZED, divided, lanes_of, tiling
from .launch import Launch, all_registers
from .window import add_taps, read_at, taps_of, together


@triton.jit
def shifted(sums, factor, shift, SCALED: tl.constexpr, HAS_BIAS: tl.constexpr):
    """The sums of a position times factor plus shift, both [CHANNELS, 1]; without a factor they hold shift already."""
    if SCALED:
        sums *= factor
        if HAS_BIAS:
            sums += shift
    return sums


@triton.jit(do_not_specialize=IMAGE_SIZED, do_not_specialize_on_alignment=CHANNEL_STRIDES)
def depthwise_kernel(
    src,
    flt,
    scale,
    bias,
    residual,  # in dst's strides, as is what is kept
    kept,
    dst,
    N,
    DST_C,
    dst_d,
    dst_h,
    dst_w,
    src_d,
    src_h,
    src_w,
    # strides: of the dimension along which vectors run in elements, of the others in units of DST_VEC or SRC_VEC
    dst_sn,
    dst_sc,
    dst_sd,
    dst_sh,
    dst_sw,
    src_sn,
    src_sc,
    src_sd,
    src_sh,
    src_sw,
    flt_strides,  # of k and the three taps
    first_tap,  # offset of the tap that the axes call 0
    axis_d,
    axis_h,
    axis_w,
    spread,
    reach,
    walk,
    tiles,
    FORWARD: tl.constexpr,
    DENSE: tl.constexpr,
    SCALED: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    RESIDUAL: tl.constexpr,
    ACTIVATION: tl.constexpr,
    SLOPE: tl.constexpr,
    KEEPS: tl.constexpr,
    HAS_D: tl.constexpr,
    HAS_H: tl.constexpr,
    TAPS_D: tl.constexpr,
    TAPS_H: tl.constexpr,
    TAPS_W: tl.constexpr,
    MODE_D: tl.constexpr,
    MODE_H: tl.constexpr,
    MODE_W: tl.constexpr,
    SRC_VEC: tl.constexpr,
    DST_VEC: tl.constexpr,
    DST_C_VEC: tl.constexpr,
    DST_W_VEC: tl.constexpr,
    VECTOR: tl.constexpr,
    WHOLE: tl.constexpr,
    FIRST_W: tl.constexpr,
    MULTIPLIER: tl.constexpr,
    INDEX: tl.constexpr,
    ACC: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    ROW_STEP: tl.constexpr,
    COLUMN_STEP: tl.constexpr,
    UNROLL_R: tl.constexpr,
    UNROLL_S: tl.constexpr,
    LANES: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    blocks_c = tl.cdiv(DST_C, CHANNELS)
    tile, block_c = divided(tl.program_id(0), blocks_c)
    phase_d, phase_h, phase_w = 0, 0, 0
    if not DENSE:
        part, tile = divided(tile, tiles)
        phase_w = part % axis_w.phases
        phase_h = part // axis_w.phases % axis_h.phases
        phase_d = part // axis_w.phases // axis_h.phases

    n, ud, uh, block_w = lanes_of(
        tile, dst_d, dst_h, dst_w, axis_d, axis_h, axis_w, spread, walk, HAS_D, HAS_H, ROWS, COLUMNS, LANES, INDEX
    )
    uw = block_w * COLUMNS
    block_w *= COLUMNS * COLUMN_STEP // VECTOR
    od = phase_d + ud * axis_d.phases
    ow = phase_w + uw * axis_w.phases
    lane_valid = (n < N) & (od < dst_d) & (ow < dst_w)
    n = tl.where(lane_valid, n, 0)

    channel, channel_valid = channel_block(block_c * CHANNELS, DST_C, CHANNELS, DST_C_VEC)
    channel = channel.to(INDEX)[:, None]  # [CHANNELS, 1]
    channel_valid = channel_valid[:, None]
    valid = channel_valid & lane_valid

    source_d, taps_d, first_d = residue_class(axis_d, phase_d)
    source_h, taps_h, first_h = residue_class(axis_h, phase_h)
    source_w, taps_w, first_w = residue_class(axis_w, phase_w)
    if DENSE:
        taps_d, taps_h, taps_w = TAPS_D, TAPS_H, TAPS_W
    sk, st, sr, ss = flt_strides
    one = tl.full([], 1, INDEX)  # strides times it are as wide as offsets
    st, sr, ss = st * one, sr * one, ss * one
    row_stride = src_sh * one * SRC_VEC
    column_stride = 1
    if COLUMNS == 1:
        column_stride = src_sw * one * SRC_VEC
    flt += first_tap + first_d * st + first_h * sr + first_w * ss
    st *= axis_d.tap_step
    sr *= axis_h.tap_step
    ss *= axis_w.tap_step
    base_d = source_d + ud * axis_d.src_step
    base_h = source_h + uh * axis_h.src_step
    base_w = source_w + uw * axis_w.src_step
    step_w = axis_w.src_tap_step

    DST_VECTOR: tl.constexpr = min(VECTOR, COLUMNS)
    # taps that are all unrolled are loaded once
    HELD: tl.constexpr = DENSE and UNROLL_R * UNROLL_S == TAPS_D * TAPS_H * TAPS_W and (FORWARD or MULTIPLIER == 1)
    REST: tl.constexpr = TAPS_H % UNROLL_R if DENSE else 0
    held: tl.tuple = ()
    if HELD:
        held = taps_of(flt + channel * sk, channel_valid, sr, ss, UNROLL_R, UNROLL_S, INDEX, ACC)
    start = tl.zeros((CHANNELS, LANES), ACC)
    factor, shift = None, None
    if SCALED:  # the sums alone
        factor = tl.load(scale + channel, mask=channel_valid, other=0).to(ACC)  # [CHANNELS, 1]
    if HAS_BIAS:
        shift = tl.load(bias + channel, mask=channel_valid, other=0).to(ACC)  # [CHANNELS, 1]
        if not SCALED:
            start = tl.broadcast_to(shift, (CHANNELS, LANES))

    for _block in range(walk):
        acc: tl.tuple = ()
        for _ in tl.static_range(ROWS * COLUMNS):
            acc += (start,)
        for e in range(1 if FORWARD else MULTIPLIER):
            if MULTIPLIER == 1:
                source_channel = channel
                k = channel
            elif FORWARD:
                source_channel = channel // MULTIPLIER
                k = channel
            else:
                source_channel = channel * MULTIPLIER + e
                k = source_channel
            filters = flt + k * sk
            if COLUMNS == 1:
                sample = src + source_channel * src_sc + n * src_sn * SRC_VEC
            else:
                sample = src + (source_channel * src_sc + n * src_sn) * SRC_VEC
            for jd in range(taps_d):
                d, valid_d = read_at(base_d + jd * axis_d.src_tap_step, src_d, MODE_D)
                image = sample + d * src_sd * SRC_VEC
                for js in range(0, taps_w, UNROLL_S):
                    column = base_w + js * step_w
                    for TAPS_R in tl.static_range(UNROLL_R, max(REST - 1, 0), REST - UNROLL_R):  # UNROLL_R, then REST
                        first = 0 if TAPS_R > REST else taps_h - REST
                        for jr in range(first, taps_h - REST if TAPS_R > REST else taps_h, TAPS_R):
                            if HELD:
                                taps = held
                            else:
                                tap = filters + (jd * st + jr * sr + js * ss)
                                taps = taps_of(tap, channel_valid, sr, ss, TAPS_R, UNROLL_S, INDEX, ACC)
                            acc = add_taps(
                                acc,
                                taps,
                                image,
                                valid & valid_d,
                                base_h + jr * axis_h.src_tap_step,
                                block_w,
                                column,
                                reach,
                                step_w,
                                src_h,
                                src_w,
                                row_stride,
                                column_stride,
                                TAPS_R,
                                UNROLL_S,
                                ROWS,
                                COLUMNS,
                                ROW_STEP,
                                COLUMN_STEP,
                                FIRST_W,
                                MODE_H,
                                MODE_W,
                                WHOLE,
                                VECTOR,
                                ACC,
                            )

        for p in tl.static_range(ROWS):
            oh = phase_h + (uh + p * spread) * axis_h.phases
            image_at = n * dst_sn + od * dst_sd + oh * dst_sh
            stored = valid & (oh < dst_h)
            if COLUMNS == 1:
                offset = (image_at + ow * dst_sw) * DST_VEC + channel * dst_sc
                sums = shifted(acc[p], factor, shift, SCALED, HAS_BIAS)
                store(sums, offset, stored, residual, kept, dst, RESIDUAL, ACTIVATION, SLOPE, KEEPS)
            else:
                for q in tl.static_range(0, COLUMNS, DST_VECTOR):
                    at = ow[:, :, None] + (q + tl.arange(0, DST_VECTOR))[None, None, :]
                    offset = ((image_at + channel * dst_sc) * DST_VEC)[:, :, None] + at
                    # so that the mask is seen to change at whole vectors only
                    inside = stored[:, :, None] & (at < dst_w // DST_W_VEC * DST_W_VEC)
                    row: tl.tuple = ()
                    for i in tl.static_range(DST_VECTOR):
                        row += (shifted(acc[p * COLUMNS + q + i], factor, shift, SCALED, HAS_BIAS),)
                    sums = together(row, DST_VECTOR)
                    store(sums, offset, inside, residual, kept, dst, RESIDUAL, ACTIVATION, SLOPE, KEEPS)
        uh += ROWS * spread
        base_h += ROWS * spread * axis_h.src_step


def launch(role: Role, geometry: ConvGeometry, strides: Strides, config, numerics, into: str = "") -> Launch:
    """FPROP: y from x and w; DGRAD: x from y and w. The output may be written `into` another tensor instead."""
    g = geometry
    forward = role is Role.FPROP
    first_tap, flt_strides = 0, (strides.w[0], *strides.w[2:])
    axes: tuple[Axis, ...] = g.axes(role)
    dense = all(axis.phases == 1 for axis in axes)
    if dense and not forward:
        first_tap = sum((taps - 1) * s for taps, s in zip(g.filter, flt_strides[1:], strict=True))
        flt_strides = (flt_strides[0], *(-s for s in flt_strides[1:]))
        axes = tuple(map(_reversed, axes))
    unroll_r, unroll_s = (min(config.unroll[0], g.filter[1]), g.filter[2]) if dense else (1, 1)
    if unroll_s > config.unroll[1]:
        unroll_s = 1
    shared = tiling(g, strides, axes, forward, (unroll_r, unroll_s), config, numerics)
    dst_c = g.K if forward else g.C
    arguments = dict(
        DST_C=dst_c,
        flt_strides=flt_strides,
        first_tap=first_tap,
        FORWARD=forward,
        DENSE=dense,
        TAPS_D=g.filter[0],
        TAPS_H=g.filter[1],
        TAPS_W=g.filter[2],
        UNROLL_R=unroll_r,
        UNROLL_S=unroll_s,
        DST_C_VEC=min(power_of_two_in(dst_c), config.channels),
        **epilogue_constants(numerics),
        **shared,
    )
    if dense and (unroll_r, unroll_s) != g.filter[1:]:
        arguments["maxnreg"] = all_registers(config.num_warps)
    classes = axes[0].phases * axes[1].phases * axes[2].phases
    programs = launchable(-(-dst_c // config.channels) * shared["tiles"] * classes, g)
    src, dst = ("x", into or "y") if forward else ("y", into or "x")
    _, _, *more = numerics.operands  # 8-bit operands, which have scales, are for dots
    operands = (src, "w", *more, dst)
    return Launch("depthwise", depthwise_kernel, programs, operands, arguments)


def _reversed(axis: Axis) -> Axis:
    """A dense axis with its taps counted from the last."""
    last = (axis.filter - 1) * axis.src_tap_step
    return axis._replace(offset=axis.offset + last, src_tap_step=-axis.src_tap_step)
