"""Short causal convolutions of each channel along a sequence: y[l] = act(bias + sum over k of w[k] * x[l - W + 1 + k]).

    x, y (B, C, L), w (C, W), bias (C), state (B, C, W - 1): what came before x, zeros where there is none

A thread computes UNIT consecutive outputs of its channels at a time, from inputs that it holds one position to a
register: every input is loaded and converted once, whatever W. Positions lie in memory in one of two ways.

    ROWS      channels lie side by side: a position is a row of BLOCK_C channels, loaded in whole vectors. Each of
              RUNS runs of positions is walked by one row of threads, which keep the last W - 1 rows: [RUNS, BLOCK_C]
    not ROWS  positions lie side by side: UNIT of them are a vector, taken apart in registers, and what lies before or
              behind it is loaded again, as a whole vector too; RUNS vectors side by side a step: [BLOCK_C, RUNS]

Addresses are 64 bits wide: a row costs one addition for the channels of a vector. Positions and channels are counted in
32 bits where these count them all. Gradients are those of
`causal_backward`.
"""

# Tuples grow while a loop is unrolled, which is a change of type.
# mypy: disable-error-code="assignment"

from __future__ import annotations

import triton
import triton.language as tl

from ..causal_config import CausalConfig, CausalProblem, blocks
from .causal_window import (
    UNSPECIALISED,
    accumulator,
    activated,
    arguments,
    parameters,
    start_of,
    store_unit,
    sums,
    tile_of,
    values_at,
    with_state,
)
from .indexing import launchable
from .launch import Launch

UPDATE_SIZED = ["C", "L", *(f"{tensor}_s{axis}" for tensor in ("x", "state", "y") for axis in "bcl")]


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
    INDEX: tl.constexpr,
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
    _, sample, channel, valid, position = tile_of(C, splits, steps, UNIT, C_VEC, RUNS, BLOCK_C, ROWS, INDEX)
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


def launch(p: CausalProblem, config: CausalConfig) -> Launch:
    """y from x, w, bias and state."""
    operands = ("x", "w", "bias" if p.has_bias else None, "state" if p.has_state else None, "y")
    programs = launchable(p.N * blocks(p, config) * config.splits, p)
    return Launch("causal", forward_kernel, programs, operands, arguments(p, config, x=p.x, y=p.y))


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
    blocks = tl.cdiv(C.to(tl.int64), BLOCK_C).to(tl.int32)
    sample = (tl.program_id(0) // blocks).to(tl.int64)
    channel = (tl.program_id(0) % blocks).to(tl.int64) * BLOCK_C + tl.arange(0, BLOCK_C)
    valid = channel < C
    taps, b = parameters(w, bias, channel, valid, W, HAS_BIAS, ACC)
    x_at = x + sample * x_sb + channel * x_sc
    y_at = y + sample * y_sb + channel * y_sc
    state_at = state + sample * state_sb + channel * state_sc
    state_sl = state_sl.to(tl.int64)
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


def update_launch(p: CausalProblem, config: CausalConfig) -> Launch:
    """y and the next state from x, state, w and bias."""
    given = {"C": p.C, "L": p.L, "W": p.W, "SILU": p.silu, "HAS_BIAS": p.has_bias, "ACC": accumulator(p)}
    for name, strides in (("x", p.x), ("state", p.state), ("y", p.y)):
        given |= {f"{name}_s{axis}": stride for axis, stride in zip("bcl", strides, strict=True)}
    given |= {"BLOCK_C": config.channels, "num_warps": config.num_warps}
    operands = ("x", "state", "w", "bias" if p.has_bias else None, "y")
    return Launch("causal_update", update_kernel, launchable(p.N * blocks(p, config), p), operands, given)
