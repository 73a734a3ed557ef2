"""Source values in registers, for kernels that sum products up without a dot.

A window is a run of positions of a source row, each a tensor [CHANNELS, LANES]; taps are tensors [CHANNELS, 1].
"""

from __future__ import annotations

import triton
import triton.language as tl

from .indexing import MODE_CODES, read_position

ZEROS: tl.constexpr = tl.constexpr(MODE_CODES["zeros"])


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
