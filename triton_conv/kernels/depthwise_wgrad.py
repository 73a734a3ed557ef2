"""wgrad of depthwise convolutions (C / groups == 1): products summed in registers, then over slabs in fixed order.

    dw[k, tap] = sum over positions of y of x[k // MULTIPLIER, where the tap reads] * dy[k]

Tiles and `lanes` are as in `depthwise`, over positions of y. A program sums up UNROLL_R x UNROLL_S taps of CHANNELS
channels over one slab of tiles: every value of dy and x is loaded and widened once, then multiplied by all that it
meets within a lane. Sums of lanes are added up at the end. Each slab writes a copy of dw of its own; `sum_slabs` adds
them up, always in the same order, so that no atomics are needed and every run gives the same bits.
"""

from __future__ import annotations

from dataclasses import replace

import triton
import triton.language as tl

from ..geometry import ConvGeometry, Role, Strides
from .indexing import channel_block, launchable, power_of_two_in
from .lanes import CHANNEL_STRIDES, IMAGE_SIZED, divided, lanes_of, tiling
from .launch import Launch, all_registers
from .wgrad import sum_launch
from .window import apart, multiply_add, read_at, together, widen, window_of


@triton.jit(
    do_not_specialize=[*IMAGE_SIZED, "tiles_per_slab", "slab_stride"], do_not_specialize_on_alignment=CHANNEL_STRIDES
)
def depthwise_wgrad_kernel(
    src,  # x
    dst,  # dy
    dw,
    N,
    K,
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
    flt_strides,  # of k and the three taps, in dw or in a slab
    axis_d,
    axis_h,
    axis_w,
    spread,
    reach,
    walk,
    tiles,
    tiles_per_slab,
    slab_stride,
    RAGGED: tl.constexpr,
    HAS_D: tl.constexpr,
    HAS_H: tl.constexpr,
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
    chunks_s: tl.constexpr = (TAPS_W + UNROLL_S - 1) // UNROLL_S
    chunks_r: tl.constexpr = (TAPS_H + UNROLL_R - 1) // UNROLL_R
    rest, block_c = divided(tl.program_id(0), tl.cdiv(K, CHANNELS))
    s0 = rest % chunks_s * UNROLL_S
    r0 = rest // chunks_s % chunks_r * UNROLL_R
    jd = rest // (chunks_s * chunks_r) % axis_d.filter
    slab = (rest // (chunks_s * chunks_r) // axis_d.filter).to(INDEX)

    channel, channel_valid = channel_block(block_c * CHANNELS, K, CHANNELS, DST_C_VEC)
    channel = channel.to(INDEX)[:, None]  # [CHANNELS, 1]
    channel_valid = channel_valid[:, None]
    source_channel = channel if MULTIPLIER == 1 else channel // MULTIPLIER
    DST_VECTOR: tl.constexpr = min(VECTOR, COLUMNS)

    acc: tl.tuple = ()
    for _ in tl.static_range(UNROLL_R * UNROLL_S):
        acc += (tl.zeros((CHANNELS, LANES), ACC),)
    for step in range(tiles_per_slab):
        tile = slab * tiles_per_slab + step
        n, z, p, block_w = lanes_of(
            tile, dst_d, dst_h, dst_w, axis_d, axis_h, axis_w, spread, walk, HAS_D, HAS_H, ROWS, COLUMNS, LANES, INDEX
        )
        q = block_w * COLUMNS
        block_w *= COLUMNS * COLUMN_STEP // VECTOR
        lane_valid = n < N
        n = tl.where(lane_valid, n, 0)
        d, valid_d = read_at(z * axis_d.src_step + axis_d.offset + jd * axis_d.src_tap_step, src_d, MODE_D)
        valid = channel_valid & lane_valid
        if COLUMNS == 1:
            image = src + source_channel * src_sc + (n * src_sn + d * src_sd) * SRC_VEC
            grads = dst + channel * dst_sc + (n * dst_sn + z * dst_sd + q * dst_sw) * DST_VEC
            column_stride = tl.full([], SRC_VEC, INDEX) * src_sw  # as wide as offsets
        else:
            image = src + (source_channel * src_sc + n * src_sn + d * src_sd) * SRC_VEC
            grads = dst + (channel * dst_sc + n * dst_sn + z * dst_sd) * DST_VEC + q
            column_stride = 1
        column = q * axis_w.src_step + axis_w.offset + s0 * axis_w.src_tap_step
        row = p * axis_h.src_step + axis_h.offset + r0 * axis_h.src_tap_step
        for _block in range(walk):
            dy: tl.tuple = ()
            for i in tl.static_range(ROWS):
                at = p + i * spread
                inside = valid & (at < dst_h)
                grad = grads + tl.where(at < dst_h, at, 0) * dst_sh * DST_VEC
                if COLUMNS == 1:
                    dy += (widen(tl.load(grad, mask=inside, other=0), ACC),)
                else:
                    for first in tl.static_range(0, COLUMNS, DST_VECTOR):
                        columns = (first + tl.arange(0, DST_VECTOR))[None, None, :]
                        # so that the mask is seen to change at whole vectors only
                        wide = inside[:, :, None] & (q[:, :, None] + columns < dst_w // DST_W_VEC * DST_W_VEC)
                        vector = apart(tl.load(grad[:, :, None] + columns, mask=wide, other=0), DST_VECTOR)
                        for j in tl.static_range(DST_VECTOR):
                            dy += (widen(vector[j], ACC),)
            for h in tl.static_range((ROWS - 1) * ROW_STEP + UNROLL_R):
                if h % ROW_STEP < UNROLL_R:
                    at, inside = read_at(row + h * reach, src_h, MODE_H)
                    window = window_of(
                        image + at * src_sh * SRC_VEC,
                        valid & valid_d & inside,
                        block_w,
                        column,
                        axis_w.src_tap_step,
                        src_w,
                        column_stride,
                        (COLUMNS - 1) * COLUMN_STEP + UNROLL_S,
                        FIRST_W,
                        MODE_W,
                        WHOLE,
                        COLUMNS * COLUMN_STEP,
                        VECTOR,
                        ACC,
                    )
                    sums: tl.tuple = ()
                    for r in tl.static_range(UNROLL_R):
                        for s in tl.static_range(UNROLL_S):
                            total = acc[r * UNROLL_S + s]
                            for i in tl.static_range(ROWS):
                                if h == i * ROW_STEP + r:
                                    for j in tl.static_range(COLUMNS):
                                        more = multiply_add(window[j * COLUMN_STEP + s], dy[i * COLUMNS + j], total)
                                        # the product of a row that is not there might be infinity times zero
                                        total = tl.where(p + i * spread < dst_h, more, total) if RAGGED else more
                            sums += (total,)
                    acc = sums
            p += ROWS * spread
            row += ROWS * spread * axis_h.src_step

    COUNT: tl.constexpr = triton.next_power_of_2(UNROLL_R * UNROLL_S)
    for _ in tl.static_range(COUNT - UNROLL_R * UNROLL_S):
        acc += (tl.zeros((CHANNELS, LANES), ACC),)
    sums = tl.sum(together(acc, COUNT), axis=1)  # [CHANNELS, COUNT]
    sk, st, sr, ss = flt_strides
    tap = tl.arange(0, COUNT).to(INDEX)[None, :]
    r = r0 + tap // UNROLL_S
    s = s0 + tap % UNROLL_S
    dw += slab * slab_stride
    valid = channel_valid & (tap < UNROLL_R * UNROLL_S) & (r < TAPS_H) & (s < TAPS_W)
    tl.store(dw + channel * sk + jd.to(INDEX) * st + r * sr + s * ss, sums.to(dw.dtype.element_ty), mask=valid)


def launches(geometry: ConvGeometry, strides: Strides, config, numerics) -> list[Launch]:
    """w from x and y, by way of slabs in the workspace where config.splits is more than 1."""
    g = geometry
    T, R, S = g.filter
    unroll_r, unroll_s = min(config.unroll[0], R), min(config.unroll[1], S)
    axes = g.axes(Role.WGRAD)
    columns = min(config.columns, power_of_two_in(g.output[2], limit=config.columns))  # so that lanes end where rows do
    config = replace(config, columns=columns)
    shared = tiling(g, strides, axes, True, (unroll_r, unroll_s), config, numerics)
    numel = g.K * g.taps
    arguments = dict(
        K=g.K,
        flt_strides=(strides.w[0], *strides.w[2:]),
        tiles_per_slab=-(-shared["tiles"] // config.splits),
        slab_stride=numel,
        RAGGED=g.output[1] % (shared["spread"] * config.rows * shared["walk"]) > 0,
        TAPS_H=R,
        TAPS_W=S,
        UNROLL_R=unroll_r,
        UNROLL_S=unroll_s,
        DST_C_VEC=min(power_of_two_in(g.K), config.channels),
        **shared,
    )
    if arguments["COLUMNS"] > 1 or (unroll_r, unroll_s) != (R, S):
        arguments["maxnreg"] = all_registers(config.num_warps)
    chunks = T * -(-R // unroll_r) * -(-S // unroll_s)
    programs = launchable(config.splits * chunks * -(-g.K // config.channels), g)
    if config.splits == 1:
        return [Launch("depthwise_wgrad", depthwise_wgrad_kernel, programs, ("x", "y", "w"), arguments)]
    return [
        Launch("depthwise_wgrad", depthwise_wgrad_kernel, programs, ("x", "y", "workspace"), arguments),
        sum_launch(numel, config.splits, arguments["INDEX"]),
    ]
