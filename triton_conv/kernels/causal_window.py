"""What the kernels of causal convolutions share: windows of positions in registers, and how memory becomes them.

`causal` says how positions and channels lie, and what a thread holds.
"""

# Tuples grow while a loop is unrolled, which is a change of type.
# mypy: disable-error-code="assignment"

from __future__ import annotations

import triton
import triton.language as tl

from ..causal_config import CausalConfig, CausalProblem, index_bits, steps
from .indexing import INTERPRETED, channel_block, power_of_two_in

# What changes with the sequence must not be specialised, or every length would be compiled anew.
UNSPECIALISED = ["C", "L", "splits", "steps", "x_sb", "x_s", "y_sb", "y_s", "dx_sb", "dx_s"]


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
    INDEX: tl.constexpr,
):
    """(slab, sample, channels, which of them there are, first positions): what a program computes; all are 2-D tiles.

    A slab is one sample's share of positions, of which there are `splits`. Channels and positions count in INDEX.
    """
    blocks = tl.cdiv(C.to(INDEX), BLOCK_C).to(tl.int32)
    slab = tl.program_id(0) // blocks
    channel, valid = channel_block((tl.program_id(0) % blocks).to(INDEX) * BLOCK_C, C, BLOCK_C, C_VEC)
    start = slab % splits * (steps.to(INDEX) * (RUNS * UNIT))
    run = tl.arange(0, RUNS).to(INDEX)
    sample = (slab // splits).to(tl.int64)
    if ROWS:
        return slab, sample, channel[None, :], valid[None, :], start + (run * (steps.to(INDEX) * UNIT))[:, None]
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


def accumulator(p: CausalProblem):
    return tl.float64 if p.dtype == "float64" else tl.float32


def arguments(p: CausalProblem, config: CausalConfig, **strides: tuple[int, ...]) -> dict:
    """The arguments of a launch over whole sequences; `strides` are those of `CausalProblem`, by the tensor's name."""
    found = {"C": p.C, "L": p.L, "splits": config.splits, "steps": steps(p, config)}
    for name, pair in strides.items():
        if p.rows:
            vec = min(map(power_of_two_in, pair))
        else:
            vec = 8 if not any(n % 8 for n in (*pair, p.L)) else 1
        found |= {f"{name}_sb": pair[0] // vec, f"{name}_s": pair[1] // vec, f"{name.upper()}_VEC": vec}
    return found | {
        "W": p.W,
        "SILU": p.silu,
        "HAS_BIAS": p.has_bias,
        "HAS_STATE": p.has_state,
        "ROWS": p.rows,
        "C_VEC": min(power_of_two_in(p.C), config.channels) if p.rows else 1,
        "INDEX": getattr(tl, f"int{index_bits(p, config)}"),
        "ACC": accumulator(p),
        "VECTOR": 16 // p.item_bytes,
        "UNIT": config.unit,
        "RUNS": config.runs,
        "BLOCK_C": config.channels,
        "num_warps": config.num_warps,
    }
