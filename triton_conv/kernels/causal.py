"""Short causal convolutions of each channel along a sequence: y[l] = act(bias + sum over k of w[k] * x[l - W + 1 + k]).

    x, y (B, C, L), w (C, W), bias (C), state (B, C, W - 1): what came before x, zeros where there is none

A thread computes UNIT consecutive outputs of its channels at a time, from inputs that it holds one position to a
register: every input is loaded and converted once, whatever W. Positions lie in memory in one of two ways.

    ROWS      channels lie side by side: a position is a row of BLOCK_C channels, loaded in whole vectors. Each of
              RUNS runs of positions is walked by one row of threads, which keep the last W - 1 rows: [RUNS, BLOCK_C]
    not ROWS  positions lie side by side: UNIT of them are a vector, taken apart in registers, and what lies before or
              behind it is loaded again, as a whole vector too; RUNS vectors side by side a step: [BLOCK_C, RUNS]

In the gradients g[l] is what arrives at the sum, dy[l] times the slope of the activation there, computed anew from x:

    dx[l] = sum over k of w[k] * g[l + W - 1 - k]    dw[k] = sum over l of g[l] * x[l - W + 1 + k]    dbias = sum of g

One kernel reads x and dy once and writes dx and, for each program's positions, partial sums of dw and dbias, which
`wgrad.sum_slabs` adds up in fixed order. Addresses are 64 bits wide: a row costs one addition for 8 outputs or more.
"""

# Tuples grow while a loop is unrolled, which is a change of type.
# mypy: disable-error-code="assignment"

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl

from .indexing import INTERPRETED, channel_block, power_of_two_in
from .launch import Launch
from .wgrad import SUM_BLOCK, sum_slabs

# What changes with the sequence must not be specialised, or every length would be compiled anew.
UNSPECIALISED = ["C", "L", "splits", "steps", "x_sb", "x_s", "y_sb", "y_s", "dx_sb", "dx_s"]
UPDATE_SIZED = ["C", "L", *(f"{tensor}_s{axis}" for tensor in ("x", "state", "y") for axis in "bcl")]


@triton.jit
def sigmoid(a):
    """1 / (1 + exp(-a)), float32 by two instructions that are exact to two units in the last place.

    What Triton makes of a division and an exponential also scales denormal numbers, with seven instructions more.
    """
    if INTERPRETED or a.dtype == tl.float64:
        return 1 / (1 + tl.exp(-a))
    else:
        power = tl.inline_asm_elementwise(
            "ex2.approx.ftz.f32 $0, $1;", "=f,f", [a * -1.4426950408889634], a.dtype, True, 1
        )
        return tl.inline_asm_elementwise("rcp.approx.ftz.f32 $0, $1;", "=f,f", [1 + power], a.dtype, True, 1)


@triton.jit
def taken_apart(vectors, UNIT: tl.constexpr):
    """[X, Y, UNIT], UNIT a power of two, as a tuple of tiles [X, Y]."""
    X: tl.constexpr = vectors.shape[0]
    Y: tl.constexpr = vectors.shape[1]
    parts = (vectors,)
    for level in tl.static_range(UNIT.bit_length() - 1):
        even = ()
        odd = ()
        for i in tl.static_range(1 << level):
            halves = tl.split(parts[i].reshape(X, Y, UNIT >> level + 1, 2))
            even += (halves[0],)
            odd += (halves[1],)
        parts = even + odd
    values = ()
    for i in tl.static_range(UNIT):
        values += (parts[i].reshape(X, Y),)
    return values


@triton.jit
def put_together(values, UNIT: tl.constexpr):
    """A tuple of UNIT tiles [X, Y] as [X, Y, UNIT]."""
    X: tl.constexpr = values[0].shape[0]
    Y: tl.constexpr = values[0].shape[1]
    parts = values
    for level in tl.static_range(UNIT.bit_length() - 1):
        joined = ()
        for i in tl.static_range(UNIT >> level + 1):
            pair = tl.join(parts[i], parts[i + (UNIT >> level + 1)])
            joined += (pair.reshape(X, Y, 2 << level),)
        parts = joined
    return parts[0]


@triton.jit
def tile_of(
    C,
    splits,
    steps,
    UNIT: tl.constexpr,
    C_VEC: tl.constexpr,
    RUNS: tl.constexpr,
    BLOCK_C: tl.constexpr,
    ROWS: tl.constexpr,
):
    """(slab, sample, channels, which of them there are, first positions): what a program computes; all are 2-D tiles.

    A slab is one sample's share of positions, of which there are `splits`.
    """
    blocks = tl.cdiv(C, BLOCK_C)
    slab = tl.program_id(0) // blocks
    channel, valid = channel_block(tl.program_id(0) % blocks * BLOCK_C, C, BLOCK_C, C_VEC)
    start = slab % splits * (RUNS * steps * UNIT)
    run = tl.arange(0, RUNS)
    sample = (slab // splits).to(tl.int64)
    if ROWS:
        return slab, sample, channel[None, :], valid[None, :], start + (run * (steps * UNIT))[:, None]
    else:
        return slab, sample, channel[:, None], valid[:, None], start + (run * UNIT)[None, :]


@triton.jit
def start_of(tensor, sample, channel, position, sb, s, VEC: tl.constexpr, ROWS: tl.constexpr):
    """Pointers to the first positions of a tile; sb and s, of a sample and of a row or channel, are in VEC elements."""
    if ROWS:
        return tensor + (sample * sb + position.to(tl.int64) * s) * VEC + channel
    else:
        return tensor + (sample * sb + channel.to(tl.int64) * s) * VEC + position


@triton.jit
def values_at(
    pointer,
    s,
    position,
    L,
    valid,
    FIRST: tl.constexpr,
    LAST: tl.constexpr,
    VEC: tl.constexpr,
    VECTOR: tl.constexpr,
    ROWS: tl.constexpr,
    ACC: tl.constexpr,
):
    """The values at position + FIRST, position + FIRST + 1, ..., position + LAST - 1, zeros outside of the sequence."""
    values = ()
    if ROWS or VEC == 1:
        for i in tl.static_range(FIRST, LAST):
            inside = valid & (position + i < L)
            if i < 0:
                inside &= position + i >= 0
            values += (tl.load(pointer + (i * s * VEC if ROWS else i), mask=inside, other=0).to(ACC),)
        return values
    else:
        LOWER: tl.constexpr = FIRST // VECTOR * VECTOR
        lane = tl.arange(0, VECTOR)[None, None, :]
        for i in tl.static_range(LOWER, LAST, VECTOR):
            at = position[:, :, None] + i + lane
            # VEC divides the length: written so, the mask is seen to change at whole vectors only
            inside = valid[:, :, None] & (at >= 0) & (at < L // VEC * VEC)
            vectors = tl.load(pointer[:, :, None] + i + lane, mask=inside, other=0)
            values += taken_apart(vectors.to(ACC), VECTOR)
        return values[FIRST - LOWER : LAST - LOWER]


@triton.jit
def store_unit(
    pointer,
    s,
    position,
    L,
    valid,
    values,
    UNIT: tl.constexpr,
    VEC: tl.constexpr,
    VECTOR: tl.constexpr,
    ROWS: tl.constexpr,
):
    """UNIT values from a position on, those of them that are in the sequence."""
    dtype: tl.constexpr = pointer.dtype.element_ty
    if ROWS or VEC == 1:
        for i in tl.static_range(UNIT):
            inside = valid & (position + i < L)
            tl.store(pointer + (i * s * VEC if ROWS else i), values[i].to(dtype), mask=inside)
    else:
        lane = tl.arange(0, VECTOR)[None, None, :]
        for i in tl.static_range(0, UNIT, VECTOR):
            inside = valid[:, :, None] & (position[:, :, None] + i + lane < L // VEC * VEC)
            vectors = put_together(values[i : i + VECTOR], VECTOR).to(dtype)
            tl.store(pointer[:, :, None] + i + lane, vectors, mask=inside)


@triton.jit
def parameters(w, bias, channel, valid, W: tl.constexpr, HAS_BIAS: tl.constexpr, ACC: tl.constexpr):
    """(the taps of each channel, its bias): tiles that broadcast over positions."""
    taps = ()
    for k in tl.static_range(W):
        taps += (tl.load(w + channel * W + k, mask=valid, other=0).to(ACC),)
    if HAS_BIAS:
        return taps, tl.load(bias + channel, mask=valid, other=0).to(ACC)
    else:
        return taps, tl.zeros(channel.shape, ACC)


@triton.jit
def with_state(rows, state, channel, valid, position, W: tl.constexpr):
    """The rows from W - 1 before a position, the first W - 1 of them from the state where the sequence begins.

    `channel` counts through all samples.
    """
    at = state + channel * (W - 1)
    first = ()
    for i in tl.static_range(W - 1):
        value = tl.load(at + i, mask=valid, other=0).to(rows[i].dtype)
        first += (tl.where(position == 0, value, rows[i]),)
    return first + rows[W - 1 :]


@triton.jit
def sums(rows, taps, bias, W: tl.constexpr, COUNT: tl.constexpr):
    """What the activation sees at `COUNT` positions, the first of which is that of rows[W - 1]."""
    out = ()
    for i in tl.static_range(COUNT):
        acc = bias
        for k in tl.static_range(W):
            acc += rows[i + k] * taps[k]
        out += (acc,)
    return out


@triton.jit
def activated(rows, SILU: tl.constexpr, COUNT: tl.constexpr):
    out = ()
    for i in tl.static_range(COUNT):
        out += (rows[i] * sigmoid(rows[i]) if SILU else rows[i],)
    return out


@triton.jit(do_not_specialize=UNSPECIALISED)
def forward_kernel(
    x,
    w,
    bias,
    state,
    y,
    C,
    L,
    splits,
    steps,
    x_sb,
    x_s,
    y_sb,
    y_s,
    W: tl.constexpr,
    SILU: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_STATE: tl.constexpr,
    ROWS: tl.constexpr,
    C_VEC: tl.constexpr,
    X_VEC: tl.constexpr,
    Y_VEC: tl.constexpr,
    ACC: tl.constexpr,
    VECTOR: tl.constexpr,
    UNIT: tl.constexpr,
    RUNS: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    BEFORE: tl.constexpr = W - 1
    STEP: tl.constexpr = UNIT if ROWS else UNIT * RUNS
    x_s = x_s.to(tl.int64)
    y_s = y_s.to(tl.int64)
    _, sample, channel, valid, position = tile_of(C, splits, steps, UNIT, C_VEC, RUNS, BLOCK_C, ROWS)
    taps, b = parameters(w, bias, channel, valid, W, HAS_BIAS, ACC)
    x_at = start_of(x, sample, channel, position, x_sb, x_s, X_VEC, ROWS)
    y_at = start_of(y, sample, channel, position, y_sb, y_s, Y_VEC, ROWS)
    if ROWS:
        before = values_at(x_at, x_s, position, L, valid, -BEFORE, 0, X_VEC, VECTOR, ROWS, ACC)
        if HAS_STATE:
            before = with_state(before, state, sample * C + channel, valid, position, W)
    for _ in range(steps):
        if ROWS:
            rows = before + values_at(x_at, x_s, position, L, valid, 0, UNIT, X_VEC, VECTOR, ROWS, ACC)
            before = rows[UNIT:]
        else:
            rows = values_at(x_at, x_s, position, L, valid, -BEFORE, UNIT, X_VEC, VECTOR, ROWS, ACC)
            if HAS_STATE:
                rows = with_state(rows, state, sample * C + channel, valid, position, W)
        values = activated(sums(rows, taps, b, W, UNIT), SILU, UNIT)
        store_unit(y_at, y_s, position, L, valid, values, UNIT, Y_VEC, VECTOR, ROWS)
        x_at += STEP * x_s * X_VEC if ROWS else STEP
        y_at += STEP * y_s * Y_VEC if ROWS else STEP
        position += STEP


@triton.jit
def slopes(dy, rows, taps, bias, SILU: tl.constexpr, W: tl.constexpr, COUNT: tl.constexpr):
    """g at `COUNT` positions, the first of which is that of dy[0] and rows[W - 1]."""
    if SILU:
        a = sums(rows, taps, bias, W, COUNT)
        out = ()
        for i in tl.static_range(COUNT):
            s = sigmoid(a[i])
            out += (dy[i] * (s * (1 + a[i] * (1 - s))),)
        return out
    else:
        return dy[:COUNT]


@triton.jit
def with_products(totals, g, rows, W: tl.constexpr, HAS_BIAS: tl.constexpr, COUNT: tl.constexpr):
    """`totals`, of dw and dbias, and what `COUNT` positions add to them."""
    out = ()
    for k in tl.static_range(W + HAS_BIAS):
        total = totals[k]
        for i in tl.static_range(COUNT):
            total += g[i] * rows[i + k] if k < W else g[i]
        out += (total,)
    return out


@triton.jit
def store_state_gradient(dstate, channel, valid, position, g, taps, W: tl.constexpr):
    """dx at the W - 1 positions before the sequence, which begins at g[0]; `channel` counts through all samples."""
    at = dstate + channel * (W - 1) + tl.zeros_like(position)
    for i in tl.static_range(W - 1):
        value = g[i] * taps[0]
        for k in tl.static_range(1, i + 1):
            value += g[i - k] * taps[k]
        tl.store(at + i, value.to(dstate.dtype.element_ty), mask=valid & (position == 0))


@triton.jit(do_not_specialize=UNSPECIALISED)
def backward_kernel(
    x,
    w,
    bias,
    state,
    dy,
    dx,
    dstate,
    partial,  # (slabs, W + 1, C), without a bias (slabs, W, C)
    C,
    L,
    splits,
    steps,
    x_sb,
    x_s,
    y_sb,
    y_s,
    dx_sb,
    dx_s,
    W: tl.constexpr,
    SILU: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_STATE: tl.constexpr,
    ROWS: tl.constexpr,
    C_VEC: tl.constexpr,
    X_VEC: tl.constexpr,
    Y_VEC: tl.constexpr,
    DX_VEC: tl.constexpr,
    ACC: tl.constexpr,
    VECTOR: tl.constexpr,
    UNIT: tl.constexpr,
    RUNS: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    BEFORE: tl.constexpr = W - 1
    STEP: tl.constexpr = UNIT if ROWS else UNIT * RUNS
    x_s = x_s.to(tl.int64)
    y_s = y_s.to(tl.int64)
    dx_s = dx_s.to(tl.int64)
    slab, sample, channel, valid, position = tile_of(C, splits, steps, UNIT, C_VEC, RUNS, BLOCK_C, ROWS)
    taps, b = parameters(w, bias, channel, valid, W, HAS_BIAS, ACC)
    x_at = start_of(x, sample, channel, position, x_sb, x_s, X_VEC, ROWS)
    dy_at = start_of(dy, sample, channel, position, y_sb, y_s, Y_VEC, ROWS)
    dx_at = start_of(dx, sample, channel, position, dx_sb, dx_s, DX_VEC, ROWS)
    totals = ()
    for _ in tl.static_range(W + HAS_BIAS):
        totals += (tl.zeros((RUNS, BLOCK_C) if ROWS else (BLOCK_C, RUNS), ACC),)
    if ROWS:  # g runs BEFORE positions ahead of dx; those that belong to the program before it are not added up
        rows = values_at(x_at, x_s, position, L, valid, -BEFORE, BEFORE, X_VEC, VECTOR, ROWS, ACC)
        if HAS_STATE:
            rows = with_state(rows, state, sample * C + channel, valid, position, W)
        arriving = values_at(dy_at, y_s, position, L, valid, 0, BEFORE, Y_VEC, VECTOR, ROWS, ACC)
        g = slopes(arriving, rows, taps, b, SILU, W, BEFORE)
        if HAS_STATE:
            store_state_gradient(dstate, sample * C + channel, valid, position, g, taps, W)
        own = ()
        for i in tl.static_range(BEFORE):
            own += (tl.where(position == 0, g[i], 0),)
        totals = with_products(totals, own, rows, W, HAS_BIAS, BEFORE)
        rows = rows[BEFORE:]
    for _ in range(steps):
        if ROWS:
            rows += values_at(x_at, x_s, position, L, valid, BEFORE, BEFORE + UNIT, X_VEC, VECTOR, ROWS, ACC)
            dys = values_at(dy_at, y_s, position, L, valid, BEFORE, BEFORE + UNIT, Y_VEC, VECTOR, ROWS, ACC)
            found = slopes(dys, rows, taps, b, SILU, W, UNIT)
            totals = with_products(totals, found, rows, W, HAS_BIAS, UNIT)
            now = g + found
            rows = rows[UNIT:]
            g = now[UNIT:]
        else:
            around = values_at(x_at, x_s, position, L, valid, -BEFORE, UNIT + BEFORE, X_VEC, VECTOR, ROWS, ACC)
            if HAS_STATE:
                around = with_state(around, state, sample * C + channel, valid, position, W)
            dys = values_at(dy_at, y_s, position, L, valid, 0, UNIT + BEFORE, Y_VEC, VECTOR, ROWS, ACC)
            now = slopes(dys, around, taps, b, SILU, W, UNIT + BEFORE)
            if HAS_STATE:
                store_state_gradient(dstate, sample * C + channel, valid, position, now, taps, W)
            totals = with_products(totals, now, around, W, HAS_BIAS, UNIT)
        values = ()
        for i in tl.static_range(UNIT):
            value = now[i + BEFORE] * taps[0]
            for k in tl.static_range(1, W):
                value += now[i + BEFORE - k] * taps[k]
            values += (value,)
        store_unit(dx_at, dx_s, position, L, valid, values, UNIT, DX_VEC, VECTOR, ROWS)
        x_at += STEP * x_s * X_VEC if ROWS else STEP
        dy_at += STEP * y_s * Y_VEC if ROWS else STEP
        dx_at += STEP * dx_s * DX_VEC if ROWS else STEP
        position += STEP
    for k in tl.static_range(W + HAS_BIAS):
        total = tl.sum(totals[k], axis=0 if ROWS else 1, keep_dims=True)
        tl.store(partial + (slab.to(tl.int64) * (W + HAS_BIAS) + k) * C + channel, total, mask=valid)


@triton.jit(do_not_specialize=UPDATE_SIZED)
def update_kernel(
    x,
    state,
    w,
    bias,
    y,
    C,
    L,
    x_sb,
    x_sc,
    x_sl,
    state_sb,
    state_sc,
    state_sl,
    y_sb,
    y_sc,
    y_sl,
    W: tl.constexpr,
    SILU: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    ACC: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """L steps of BLOCK_C channels of one sample, a thread for each channel; the state moves along in place."""
    blocks = tl.cdiv(C, BLOCK_C)
    sample = (tl.program_id(0) // blocks).to(tl.int64)
    channel = tl.program_id(0) % blocks * BLOCK_C + tl.arange(0, BLOCK_C)
    valid = channel < C
    taps, b = parameters(w, bias, channel, valid, W, HAS_BIAS, ACC)
    channel = channel.to(tl.int64)
    x_at = x + sample * x_sb + channel * x_sc
    y_at = y + sample * y_sb + channel * y_sc
    state_at = state + sample * state_sb + channel * state_sc
    before = ()
    for i in tl.static_range(W - 1):
        before += (tl.load(state_at + i * state_sl, mask=valid, other=0).to(ACC),)
    for _ in range(L):
        now = (tl.load(x_at, mask=valid, other=0).to(ACC),)
        rows = before + now
        value = activated(sums(rows, taps, b, W, 1), SILU, 1)
        tl.store(y_at, value[0].to(y.dtype.element_ty), mask=valid)
        before = rows[1:]
        x_at += x_sl
        y_at += y_sl
    for i in tl.static_range(W - 1):
        tl.store(state_at + i * state_sl, before[i].to(state.dtype.element_ty), mask=valid)


class Problem(NamedTuple):
    """What a launch depends on.

    x, y and dx have the strides of a sample and of a row, with `rows`, or a channel, without; y is its gradient too.
    """

    B: int
    C: int
    L: int
    W: int
    rows: bool
    silu: bool
    has_bias: bool
    has_state: bool
    item_bytes: int
    x: tuple[int, int]
    y: tuple[int, int]
    dx: tuple[int, int]
    multiprocessors: int


class Tiles(NamedTuple):
    """How a problem is cut: `splits` shares of each sample, `steps` steps of RUNS * UNIT positions each."""

    UNIT: int
    RUNS: int
    BLOCK_C: int
    blocks: int
    splits: int
    steps: int


_WARPS = 4
_PROGRAMS = 16  # for each multiprocessor, so that little of it idles while the last ones end
_STEPS = 64  # after which a program's own expenses no longer count; backward, each program also writes a slab


def tiles(p: Problem, backward: bool) -> Tiles:
    """How many positions and channels a program takes, by rule: few registers, whole vectors, 128 threads."""
    threads = 32 * _WARPS
    if p.rows:
        unit = 4 if p.W <= 5 else 8  # W - 1 or more: only a sequence's first run begins within reach of the state
        # what a thread holds of a row: 16 bytes, if there are registers for so many windows, taps and sums of dw
        room = (64 if not backward else 16 if p.has_state else 32) // (2 if p.item_bytes == 8 else 1)
        held = min(16 // p.item_bytes, room // triton.next_power_of_2(p.W))
        block_c = min(triton.next_power_of_2(p.C), max(power_of_two_in(p.C, threads * held), 32 * held))
        runs = threads * held // block_c
    else:
        # backward, g is computed W - 1 positions further than dx: less often for longer units
        unit = 16 if backward and p.item_bytes < 8 else 8
        runs = min(32, triton.next_power_of_2(triton.cdiv(p.L, unit)))
        block_c = threads // runs
    blocks, steps = triton.cdiv(p.C, block_c), triton.cdiv(p.L, runs * unit)
    longest = max(1, p.B * blocks * steps // (_PROGRAMS * p.multiprocessors))
    splits = triton.cdiv(steps, longest if backward else min(longest, _STEPS))
    return Tiles(unit, runs, block_c, blocks, splits, triton.cdiv(steps, splits))


def slabs(p: Problem) -> tuple[int, int, int]:
    """The shape of the partial sums of dw and dbias: a slab of (W + 1, C), without a bias (W, C)."""
    return p.B * tiles(p, True).splits, p.W + p.has_bias, p.C


def forward(p: Problem) -> Launch:
    """y from x, w, bias and state."""
    t = tiles(p, False)
    operands = ("x", "w", "bias" if p.has_bias else None, "state" if p.has_state else None, "y")
    return Launch("causal", forward_kernel, p.B * t.blocks * t.splits, operands, _arguments(p, t, x=p.x, y=p.y))


def backward(p: Problem) -> tuple[Launch, Launch]:
    """dx, dstate and `sums` of dw and dbias, by way of `slabs` of them, from x, w, bias, state and dy."""
    t = tiles(p, True)
    given = ("x", "w", "bias" if p.has_bias else None, "state" if p.has_state else None, "dy")
    made = ("dx", "dstate" if p.has_state else None, "slabs")
    arguments = _arguments(p, t, x=p.x, y=p.y, dx=p.dx)
    if p.W > 4 and not p.rows:
        arguments["maxnreg"] = 255  # told the limit, the assembler does not aim at fewer registers and then spill
    count, terms, channels = slabs(p)
    numel = terms * channels
    adding = {"count": numel, "slabs": count, "INDEX": tl.int64, "BLOCK": SUM_BLOCK}
    return (
        Launch("causal_backward", backward_kernel, p.B * t.blocks * t.splits, given + made, arguments),
        Launch("sum_slabs", sum_slabs, triton.cdiv(numel, SUM_BLOCK), ("slabs", "sums"), adding),
    )


def _arguments(p: Problem, t: Tiles, **strides: tuple[int, int]) -> dict:
    arguments = {"C": p.C, "L": p.L, "splits": t.splits, "steps": t.steps}
    for name, pair in strides.items():
        if p.rows:
            vec = min(map(power_of_two_in, pair))
        else:
            vec = 8 if not any(n % 8 for n in (*pair, p.L)) else 1
        arguments |= {f"{name}_sb": pair[0] // vec, f"{name}_s": pair[1] // vec, f"{name.upper()}_VEC": vec}
    return arguments | {
        "W": p.W,
        "SILU": p.silu,
        "HAS_BIAS": p.has_bias,
        "HAS_STATE": p.has_state,
        "ROWS": p.rows,
        "C_VEC": min(power_of_two_in(p.C), t.BLOCK_C) if p.rows else 1,
        "ACC": _accumulator(p.item_bytes),
        "VECTOR": 16 // p.item_bytes,
        "UNIT": t.UNIT,
        "RUNS": t.RUNS,
        "BLOCK_C": t.BLOCK_C,
        "num_warps": _WARPS,
    }


def update(
    B: int,
    C: int,
    L: int,
    W: int,
    silu: bool,
    has_bias: bool,
    item_bytes: int,
    x: tuple[int, ...],
    state: tuple[int, ...],
    y: tuple[int, ...],
) -> Launch:
    """y and the next state from x, state, w and bias, where x, state and y are three strides each."""
    arguments = {"C": C, "L": L, "W": W, "SILU": silu, "HAS_BIAS": has_bias, "ACC": _accumulator(item_bytes)}
    for name, strides in (("x", x), ("state", state), ("y", y)):
        arguments |= {f"{name}_s{axis}": stride for axis, stride in zip("bcl", strides, strict=True)}
    block_c = 32 * _WARPS
    arguments |= {"BLOCK_C": block_c, "num_warps": _WARPS}
    operands = ("x", "state", "w", "bias" if has_bias else None, "y")
    return Launch("causal_update", update_kernel, B * triton.cdiv(C, block_c), operands, arguments)


def _accumulator(item_bytes: int):
    return tl.float64 if item_bytes == 8 else tl.float32
