"""fprop and dgrad of depthwise convolutions (C / groups == 1): products summed in registers, no dot.

    K = MULTIPLIER * C; output channel k belongs to input channel k // MULTIPLIER

| role  | src | dst | destination channels | what a destination channel reads                         |
|-------|-----|-----|----------------------|----------------------------------------------------------|
| fprop | x   | y   | K                    | source k // MULTIPLIER, by filter k                      |
| dgrad | dy  | dx  | C                    | sources c * MULTIPLIER + e, each by the filter so called |

A program computes CHANNELS channels x LANES lanes of one residue class of the stride. A lane is ROWS x COLUMNS
positions whose sums stay in registers: a source value is loaded and widened once and multiplied into all of them that
it reaches. Where channels lie side by side vectors run along them and COLUMNS is 1; else they run along W.

The rows of a lane lie `spread` apart, so that its taps fall on the same source rows whatever the dilation: tap r of
row p reads row p * ROW_STEP + r of the lane, in units of `reach` source rows. UNROLL_R x UNROLL_S taps are unrolled,
loops walk over the rest of the filter. An input gradient of stride 1 is the forward kernel with its taps reversed.
"""

from __future__ import annotations

from math import gcd

import triton
import triton.language as tl

from ..geometry import Axis, ConvGeometry, Role, Strides
from .indexing import (
    MODE_CODES,
    channel_block,
    in_vectors,
    launchable,
    power_of_two_in,
    read_position,
    residue_class,
)
from .launch import Launch

ZEROS: tl.constexpr = tl.constexpr(MODE_CODES["zeros"])
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
    "src_sw",
    "dst_sn",
    "dst_sd",
    "dst_sh",
    "dst_sw",
    "walk",
    "tiles",
]
CHANNEL_STRIDES = ["src_sc", "dst_sc"]


@triton.jit
def widen(v, ACC: tl.constexpr):
    """v in the accumulator's type. A bfloat16 is the upper half of a float32: a shift takes less than a cast."""
    if v.dtype == tl.bfloat16:
        return (v.to(tl.uint16, bitcast=True).to(tl.uint32) << 16).to(tl.float32, bitcast=True)
    else:
        return v.to(ACC)


@triton.jit
def multiply_add(a, b, acc):
    if acc.dtype.is_floating():
        return tl.fma(a, b, acc)
    else:
        return acc + a * b


@triton.jit
def read_at(position, extent, MODE: tl.constexpr):
    """(where a position on the padded axis reads, whether it reads at all); 0 where it does not.

    As `read_position`, but with one comparison, for a negative position is a large unsigned one, and for positions past
    the padding too, which the last rows of a lane may have.
    """
    if MODE != ZEROS:
        position, _ = read_position(position, extent, position == position, MODE)
    unsigned: tl.constexpr = tl.uint64 if position.dtype == tl.int64 else tl.uint32
    valid = position.to(unsigned, bitcast=True) < extent.to(position.dtype).to(unsigned, bitcast=True)
    return tl.where(valid, position, 0), valid


@triton.jit
def apart(block, COUNT: tl.constexpr):
    """A tensor [X, Y, COUNT], COUNT a power of two, as a tuple of COUNT tensors [X, Y]."""
    X: tl.constexpr = block.shape[0]
    Y: tl.constexpr = block.shape[1]
    parts = (block,)
    for i in tl.static_range(COUNT.bit_length() - 1):
        even: tl.tuple = ()
        odd: tl.tuple = ()
        for j in tl.static_range(len(parts)):
            a, b = tl.split(tl.reshape(parts[j], (X, Y, COUNT >> (i + 1), 2)))
            even += (a,)
            odd += (b,)
        parts = even + odd
    tensors: tl.tuple = ()
    for j in tl.static_range(COUNT):
        tensors += (tl.reshape(parts[j], (X, Y)),)
    return tensors


@triton.jit
def together(parts, COUNT: tl.constexpr):
    """COUNT tensors [X, Y] as one of [X, Y, COUNT], COUNT a power of two."""
    X: tl.constexpr = parts[0].shape[0]
    Y: tl.constexpr = parts[0].shape[1]
    for i in tl.static_range(COUNT.bit_length() - 1):
        joined: tl.tuple = ()
        for j in tl.static_range(COUNT >> (i + 1)):
            joined += (tl.reshape(tl.join(parts[j], parts[j + (COUNT >> (i + 1))]), (X, Y, 2 << i)),)
        parts = joined
    return tl.reshape(parts[0], (X, Y, COUNT))


@triton.jit
def divided(index, extent):
    """(index // extent, index % extent); neither is negative, and unsigned division takes fewer instructions."""
    unsigned: tl.constexpr = tl.uint64 if index.dtype == tl.int64 else tl.uint32
    quotient = index.to(unsigned, bitcast=True) // extent.to(index.dtype).to(unsigned, bitcast=True)
    quotient = quotient.to(index.dtype, bitcast=True)
    return quotient, index - quotient * extent


@triton.constexpr_function
def in_a_vector(j, count, first, columns, vector, whole, mode):
    """Whether the j-th of `count` positions from `first` on is loaded as part of an aligned vector.

    It is where more than two of them share the vector, and where the vector does not lie on a border by index map: not
    beyond the lane's own `columns`.
    """
    start = (first + j) // vector * vector
    shared = min(start + vector, first + count) - max(start, first)
    return whole and (mode == ZEROS or 0 <= start < columns) and shared > 2


@triton.jit
def window_of(
    row,  # pointers to column 0 of a source row [CHANNELS, LANES]
    valid,
    block_w,  # the lane's first position in vectors
    column,  # source column of the window's first position
    step,  # from one to the next
    src_w,
    src_sw,
    COUNT: tl.constexpr,
    FIRST: tl.constexpr,  # column is this much past that position
    MODE: tl.constexpr,
    WHOLE: tl.constexpr,
    COLUMNS: tl.constexpr,  # of the source, that the lane has for its own
    VECTOR: tl.constexpr,
    ACC: tl.constexpr,
):
    """COUNT positions of a source row, widened: tensors [CHANNELS, LANES]. Where rows are WHOLE vectors, in vectors."""
    window: tl.tuple = ()
    block: tl.tuple = ()
    for j in tl.static_range(COUNT):
        if in_a_vector(j, COUNT, FIRST, COLUMNS, VECTOR, WHOLE, MODE):
            if j == 0 or (FIRST + j) % VECTOR == 0:
                start, inside = read_at(block_w + (FIRST + j) // VECTOR, src_w // VECTOR, ZEROS)
                vector = (row + start * VECTOR)[:, :, None] + tl.arange(0, VECTOR)[None, None, :]
                block = apart(tl.load(vector, mask=(valid & inside)[:, :, None], other=0), VECTOR)
            window += (widen(block[(FIRST + j) % VECTOR], ACC),)
        else:
            at, inside = read_at(column + j * step, src_w, MODE)
            window += (widen(tl.load(row + at * src_sw, mask=valid & inside, other=0), ACC),)
    return window


@triton.jit
def taps_of(
    filters,  # pointers to a tap [CHANNELS, 1]
    valid,
    sr,
    ss,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    INDEX: tl.constexpr,
    ACC: tl.constexpr,
):
    """The ROWS x COLUMNS taps of a filter from one on, each [CHANNELS, 1].

    They are loaded in one go and handed out through shared memory: what the channels of a thread need lies a filter
    apart, and would else be loaded one by one.
    """
    COUNT: tl.constexpr = triton.next_power_of_2(ROWS * COLUMNS)
    tap = tl.arange(0, COUNT).to(INDEX)[None, None, :]
    offset = tap // COLUMNS * sr + tap % COLUMNS * ss
    block = tl.load(filters[:, :, None] + offset, mask=valid[:, :, None] & (tap < ROWS * COLUMNS), other=0)
    return apart(widen(block, ACC), COUNT)


@triton.jit
def add_taps(
    acc,  # ROWS * COLUMNS tensors [CHANNELS, LANES]
    taps,  # TAPS_R * TAPS_S tensors [CHANNELS, 1]
    image,  # pointers to row 0, column 0 [CHANNELS, LANES]
    valid,
    row,  # [1, LANES]
    block_w,
    column,
    reach,
    step_w,
    src_h,
    src_w,
    src_sh,
    src_sw,
    TAPS_R: tl.constexpr,
    TAPS_S: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    ROW_STEP: tl.constexpr,
    COLUMN_STEP: tl.constexpr,
    FIRST_W: tl.constexpr,
    MODE_H: tl.constexpr,
    MODE_W: tl.constexpr,
    WHOLE: tl.constexpr,
    VECTOR: tl.constexpr,
    ACC: tl.constexpr,
):
    """acc with TAPS_R x TAPS_S taps added to it."""
    for h in tl.static_range((ROWS - 1) * ROW_STEP + TAPS_R):
        if h % ROW_STEP < TAPS_R:
            at, inside = read_at(row + h * reach, src_h, MODE_H)
            window = window_of(
                image + at * src_sh,
                valid & inside,
                block_w,
                column,
                step_w,
                src_w,
                src_sw,
                (COLUMNS - 1) * COLUMN_STEP + TAPS_S,
                FIRST_W,
                MODE_W,
                WHOLE,
                COLUMNS * COLUMN_STEP,
                VECTOR,
                ACC,
            )
            sums: tl.tuple = ()
            for p in tl.static_range(ROWS):
                for q in tl.static_range(COLUMNS):
                    total = acc[p * COLUMNS + q]
                    if h >= p * ROW_STEP and h - p * ROW_STEP < TAPS_R:
                        for s in tl.static_range(TAPS_S):
                            total = multiply_add(
                                window[q * COLUMN_STEP + s], taps[(h - p * ROW_STEP) * TAPS_S + s], total
                            )
                    sums += (total,)
            acc = sums
    return acc


@triton.jit(do_not_specialize=IMAGE_SIZED, do_not_specialize_on_alignment=CHANNEL_STRIDES)
def depthwise_kernel(
    src,
    flt,
    bias,
    dst,
    N,
    DST_C,
    # extents of destination and source, and strides: of the dimension along which vectors run in elements, of the
    # others in units of SRC_VEC or DST_VEC
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
    HAS_BIAS: tl.constexpr,
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

    # the tile's lanes, and the positions of the first row and column of each
    lanes_w = tl.cdiv(dst_w, axis_w.phases * COLUMNS)
    lanes_h = tl.cdiv(dst_h, axis_h.phases * spread * ROWS * walk) * spread
    lane = (tile.to(INDEX) * LANES + tl.arange(0, LANES))[None, :]  # [1, LANES]
    n, block_w = divided(lane, lanes_w)
    uw = block_w * COLUMNS
    block_w *= COLUMNS * COLUMN_STEP // VECTOR
    uh = tl.zeros_like(n)
    if HAS_H:
        n, uh = divided(n, lanes_h)
    uh = uh // spread * (spread * ROWS * walk) + uh % spread
    ud = tl.zeros_like(n)
    if HAS_D:
        n, ud = divided(n, tl.cdiv(dst_d, axis_d.phases))
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
    held: tl.tuple = ()
    if HELD:
        held = taps_of(flt + channel * sk, channel_valid, sr, ss, UNROLL_R, UNROLL_S, INDEX, ACC)
    start = tl.zeros((CHANNELS, LANES), ACC)
    if HAS_BIAS:
        start = tl.broadcast_to(tl.load(bias + channel, mask=channel_valid, other=0).to(ACC), (CHANNELS, LANES))

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
                column_stride = src_sw * SRC_VEC
            else:
                sample = src + (source_channel * src_sc + n * src_sn) * SRC_VEC
                column_stride = 1
            for jd in range(taps_d):
                d, valid_d = read_at(base_d + jd * axis_d.src_tap_step, src_d, MODE_D)
                image = sample + d * src_sd * SRC_VEC
                for js in range(0, taps_w, UNROLL_S):
                    column = base_w + js * step_w
                    for jr in range(0, taps_h // UNROLL_R * UNROLL_R, UNROLL_R):
                        if HELD:
                            taps = held
                        else:
                            tap = filters + (jd * st + jr * sr + js * ss)
                            taps = taps_of(tap, channel_valid, sr, ss, UNROLL_R, UNROLL_S, INDEX, ACC)
                        row = base_h + jr * axis_h.src_tap_step
                        acc = add_taps(
                            acc,
                            taps,
                            image,
                            valid & valid_d,
                            row,
                            block_w,
                            column,
                            reach,
                            step_w,
                            src_h,
                            src_w,
                            src_sh * SRC_VEC,
                            column_stride,
                            UNROLL_R,
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
                    REST: tl.constexpr = TAPS_H % UNROLL_R if DENSE else 0
                    if REST > 0:
                        tap = filters + (jd * st + (TAPS_H - REST) * sr + js * ss)
                        row = base_h + (TAPS_H - REST) * axis_h.src_tap_step
                        acc = add_taps(
                            acc,
                            taps_of(tap, channel_valid, sr, ss, REST, UNROLL_S, INDEX, ACC),
                            image,
                            valid & valid_d,
                            row,
                            block_w,
                            column,
                            reach,
                            step_w,
                            src_h,
                            src_w,
                            src_sh * SRC_VEC,
                            column_stride,
                            REST,
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
                tl.store(dst + offset, acc[p].to(dst.dtype.element_ty), mask=stored)
            else:
                for q in tl.static_range(0, COLUMNS, DST_VECTOR):
                    at = ow[:, :, None] + (q + tl.arange(0, DST_VECTOR))[None, None, :]
                    offset = ((image_at + channel * dst_sc) * DST_VEC)[:, :, None] + at
                    # so that the mask is seen to change at whole vectors only
                    inside = at < dst_w // DST_W_VEC * DST_W_VEC
                    sums = acc[p * COLUMNS + q : p * COLUMNS + q + DST_VECTOR]
                    out = together(sums, DST_VECTOR).to(dst.dtype.element_ty)
                    tl.store(dst + offset, out, mask=stored[:, :, None] & inside)
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
        HAS_BIAS=numerics.has_bias,
        TAPS_D=g.filter[0],
        TAPS_H=g.filter[1],
        TAPS_W=g.filter[2],
        UNROLL_R=unroll_r,
        UNROLL_S=unroll_s,
        DST_C_VEC=min(power_of_two_in(dst_c), config.channels),
        **shared,
    )
    classes = axes[0].phases * axes[1].phases * axes[2].phases
    programs = launchable(-(-dst_c // config.channels) * shared["tiles"] * classes, g)
    src, dst = ("x", into or "y") if forward else ("y", into or "x")
    operands = (src, "w", "bias" if numerics.has_bias else None, dst)
    return Launch("depthwise", depthwise_kernel, programs, operands, arguments)


def tiling(g: ConvGeometry, strides: Strides, axes, forward: bool, unroll: tuple[int, int], config, numerics) -> dict:
    """The arguments that kernels have for walking over positions of the destination: y if `forward`, else x."""
    src_extents, dst_extents = (g.input, g.output) if forward else (g.output, g.input)
    src_strides, dst_strides = (strides.x, strides.y) if forward else (strides.y, strides.x)
    column_step = axes[2].src_step
    along_w = src_strides[4] == dst_strides[4] == axes[2].src_tap_step == 1 and column_step in (1, 2, 4)
    columns = config.columns if along_w and unroll[1] == g.filter[2] else 1
    vector = min(config.vector, columns * column_step)
    inside = g.modes[2] == "zeros" or dst_extents[2] * column_step <= src_extents[2]
    if columns == 1:
        whole, dst_w_vec = False, 1
        src_vec, src_strides = in_vectors(src_strides)
        dst_vec, dst_strides = in_vectors(dst_strides)
    else:
        src_vec, src_strides = _rows_in_vectors(src_strides, src_extents[2], vector)
        dst_vec, dst_strides = _rows_in_vectors(dst_strides, dst_extents[2], min(vector, columns))
        whole, dst_w_vec = src_vec == vector and inside, dst_vec
    spread, row_step, reach = 1, 1, axes[1].src_step
    if unroll[0] > 1:
        reach = axes[1].src_tap_step
        common = gcd(axes[1].src_step, reach)
        spread, row_step = reach // common, axes[1].src_step // common
    blocks = -(-dst_extents[1] // (axes[1].phases * spread * config.rows))
    walk = -(-blocks // -(-blocks // config.walk))
    lanes = g.N * -(-dst_extents[0] // axes[0].phases) * -(-blocks // walk) * spread
    lanes *= -(-dst_extents[2] // (axes[2].phases * columns))
    mode_d, mode_h, mode_w = (MODE_CODES[mode] for mode in g.modes)
    return dict(
        N=g.N,
        **dict(zip(("dst_d", "dst_h", "dst_w", "src_d", "src_h", "src_w"), (*dst_extents, *src_extents), strict=True)),
        **dict(zip(("src_sn", "src_sc", "src_sd", "src_sh", "src_sw"), src_strides, strict=True)),
        **dict(zip(("dst_sn", "dst_sc", "dst_sd", "dst_sh", "dst_sw"), dst_strides, strict=True)),
        axis_d=axes[0],
        axis_h=axes[1],
        axis_w=axes[2],
        spread=spread,
        reach=reach,
        walk=walk,
        tiles=-(-lanes // config.lanes),
        HAS_D=dst_extents[0] > 1,
        HAS_H=dst_extents[1] > 1,
        MODE_D=mode_d,
        MODE_H=mode_h,
        MODE_W=mode_w,
        SRC_VEC=src_vec,
        DST_VEC=dst_vec,
        DST_W_VEC=dst_w_vec,
        VECTOR=vector,
        WHOLE=whole,
        FIRST_W=axes[2].offset if columns > 1 else 0,
        MULTIPLIER=g.K // g.C,
        INDEX=getattr(tl, f"int{numerics.index_bits}"),
        ACC=getattr(tl, numerics.accumulator),
        ROWS=config.rows,
        COLUMNS=columns,
        ROW_STEP=row_step,
        COLUMN_STEP=column_step if columns > 1 else 1,
        LANES=config.lanes,
        CHANNELS=config.channels,
        num_warps=config.num_warps,
    )


def _rows_in_vectors(strides: tuple[int, ...], extent: int, vector: int) -> tuple[int, tuple[int, ...]]:
    """`in_vectors` of rows along W: all of `vector` or none, or every width would be another compilation."""
    if any(n % vector for n in (extent, *strides[:4])):
        return 1, strides
    return vector, (*(s // vector for s in strides[:4]), strides[4])


def _reversed(axis: Axis) -> Axis:
    """A dense axis with its taps counted from the last."""
    last = (axis.filter - 1) * axis.src_tap_step
    return axis._replace(offset=axis.offset + last, src_tap_step=-axis.src_tap_step)
