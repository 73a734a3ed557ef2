"""All gradients of a causal convolution: dx, dstate, dw and dbias, from x and dy, each read once.

    dx[l] = sum over k of w[k] * g[l + W - 1 - k]    dw[k] = sum over l of g[l] * x[l - W + 1 + k]    dbias = sum of g

where g[l] is what arrives at the sum: dy[l] times the slope of the activation there, computed anew from x. Each program
also writes the sums of dw and dbias over its positions, a slab; `wgrad.sum_slabs` adds slabs up in fixed order.
Positions and channels lie and are held as `causal` says.
"""

# Tuples grow while a loop is unrolled, which is a change of type.
# mypy: disable-error-code="assignment"

from __future__ import annotations

import triton
import triton.language as tl

from ..causal_config import CausalConfig, CausalProblem, blocks, slabs
from .causal_window import (
    UNSPECIALISED,
    arguments,
    parameters,
    sigmoid,
    start_of,
    store_unit,
    sums,
    tile_of,
    values_at,
    with_state,
)
from .indexing import launchable
from .launch import Launch, all_registers
from .wgrad import SUM_BLOCK, sum_slabs


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
    dx_s = dx_s.to(tl.int64)
    slab, sample, channel, valid, position = tile_of(C, splits, steps, UNIT, C_VEC, RUNS, BLOCK_C, ROWS, INDEX)
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


def launches(p: CausalProblem, config: CausalConfig) -> tuple[Launch, Launch]:
    """dx, dstate and `sums` of dw and dbias, by way of `slabs` of them, from x, w, bias, state and dy."""
    given = ("x", "w", "bias" if p.has_bias else None, "state" if p.has_state else None, "dy")
    made = ("dx", "dstate" if p.has_state else None, "slabs")
    found = arguments(p, config, x=p.x, y=p.y, dx=p.dx)
    many = 4 if p.dtype == "float32" else 5  # taps
    if not p.rows and many <= p.W:
        found["maxnreg"] = all_registers(config.num_warps)
    count, terms, channels = slabs(p, config)
    numel = terms * channels
    adding = {"count": numel, "slabs": count, "INDEX": tl.int64, "BLOCK": SUM_BLOCK}
    programs = launchable(p.N * blocks(p, config) * config.splits, p)
    return (
        Launch("causal_backward", backward_kernel, programs, given + made, found),
        Launch("sum_slabs", sum_slabs, triton.cdiv(numel, SUM_BLOCK), ("slabs", "sums"), adding),
    )
