"""Index arithmetic shared by the kernels; `geometry.Axis` has the formulas in words."""

from __future__ import annotations

import triton
import triton.language as tl

from ..geometry import PADDING_MODES, ConvGeometry
from ..tiles import power_of_two_in as power_of_two_in

MODE_CODES = {mode: code for code, mode in enumerate(PADDING_MODES)}
REFLECT: tl.constexpr = tl.constexpr(MODE_CODES["reflect"])
REPLICATE: tl.constexpr = tl.constexpr(MODE_CODES["replicate"])
CIRCULAR: tl.constexpr = tl.constexpr(MODE_CODES["circular"])
INTERPRETED: tl.constexpr = tl.constexpr(triton.knobs.runtime.interpret)


@triton.jit
def residue_class(axis, phase):
    """(first source position, taps, first filter tap) of destination positions phase, phase + phases, ..."""
    shifted = phase + axis.offset
    first = shifted // axis.common * axis.inverse % axis.tap_step
    reached = shifted % axis.common == 0
    taps = tl.where(reached, tl.maximum(tl.cdiv(axis.filter - first, axis.tap_step), 0), 0)
    # exact where reached, so that truncation toward zero does not matter
    source = (shifted + first * axis.src_tap_step * axis.common) // axis.phases
    return source, taps, first


@triton.jit
def read_position(position, extent, valid, MODE: tl.constexpr):
    """Where a position on the padded axis reads, and whether it reads at all; 0 where it does not.

    Some targets form the address of a masked load all the same, so that it must not be a wild one.
    """
    if MODE == REFLECT:
        position = tl.abs(position)
        position = extent - 1 - tl.abs(extent - 1 - position)
    elif MODE == REPLICATE:
        position = tl.minimum(tl.maximum(position, 0), extent - 1)
    elif MODE == CIRCULAR:
        position = tl.where(position < 0, position + extent, position)
        position = tl.where(position >= extent, position - extent, position)
    else:
        valid = valid & (position >= 0) & (position < extent)
    return tl.where(valid, position, 0), valid


@triton.jit
def channel_block(start, extent, BLOCK: tl.constexpr, VEC: tl.constexpr):
    """(channels start ... start + BLOCK with those past the extent moved inside it, which are valid).

    VEC, a power of two, divides extent: whole vectors are moved, and the compiler is told that they stay whole.
    """
    lane = tl.arange(0, BLOCK)
    channel = start + lane
    valid = channel < extent // VEC * VEC  # so that the mask is seen to change at whole vectors only
    inside = tl.where(valid, channel, lane % VEC)
    return tl.max_contiguous(tl.multiple_of(inside, VEC), VEC), valid


@triton.jit
def matrix_product(a, b, acc, PRECISION: tl.constexpr):
    """acc [X, Y] + a [X, K] times b [K, Y], on the matrix units."""
    if INTERPRETED and (a.dtype == tl.bfloat16 or a.dtype == tl.float8e4nv):
        # the interpreter would multiply the integers it stores these in; float32 holds the same products exactly
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    # on Hopper the matrix units add 8-bit floats up with fewer bits than float32 has: no longer than a step, then
    return tl.dot(a, b, acc, input_precision=PRECISION, max_num_imprecise_acc=a.shape[1], out_dtype=acc.dtype)


@triton.jit
def multiply(a, b, acc, DOT: tl.constexpr, PRECISION: tl.constexpr):
    """acc [X, Y] + a [K, X] transposed times b [K, Y], on the matrix units or as a sum of products."""
    if DOT:
        return matrix_product(a.trans(), b, acc, PRECISION)
    else:
        return acc + tl.sum(a.to(acc.dtype)[:, :, None] * b.to(acc.dtype)[:, None, :], axis=0)


def in_vectors(strides: tuple[int, ...], channel: int = 1) -> tuple[int, tuple[int, ...]]:
    """(vec, strides in units of vec elements), where the stride of dimension `channel`, which is 1, stays as it is.

    Triton learns that rows of channels start at multiples of vec without the strides being compiled into the kernel.
    Where channels do not lie side by side vec is 1.
    """
    if strides[channel] != 1:
        return 1, strides
    vec = min(power_of_two_in(s) for i, s in enumerate(strides) if i != channel)
    return vec, tuple(s if i == channel else s // vec for i, s in enumerate(strides))


def filter_vectors(geometry: ConvGeometry, strides: tuple[int, ...]) -> tuple[int, tuple[int, ...]]:
    """`in_vectors` of the strides of filters, that of a group in front; that of an axis with one tap never matters.

    vec divides the number of their elements too, by which slabs are apart: the stride of a single filter is anything.
    """
    g = geometry
    taps = (stride if taps > 1 else 0 for stride, taps in zip(strides[2:], g.filter, strict=True))
    numel = g.K * (g.C // g.groups) * g.taps
    vec, (*counted, _) = in_vectors((strides[0] * (g.K // g.groups), *strides[:2], *taps, numel), channel=2)
    return vec, tuple(counted)


@triton.jit
def tap_of(step, taps_d, taps_h, taps_w, INDEX: tl.constexpr):
    """(jd, jh, jw) of a tap counted through the three axes, for any number of taps, none included.

    The compiler computes the first steps' addresses before it knows that there is a step: a class without taps must
    not divide by zero there, which would let it assume that there is no such class.
    """
    per_h = tl.maximum(taps_h, 1)
    per_w = tl.maximum(taps_w, 1)
    jd = tl.minimum(step // (per_h * per_w), tl.maximum(taps_d - 1, 0))  # not beyond the filter when looking ahead
    return jd.to(INDEX), (step // per_w % per_h).to(INDEX), (step % per_w).to(INDEX)


def launchable(programs: int, geometry: object) -> int:
    """The number of programs of a launch; raises RuntimeError where a GPU's grid has no room for them."""
    if programs >= 2**31:
        raise RuntimeError(f"a launch of {programs} programs is more than a grid holds: {geometry}")
    return programs


def constants(geometry: ConvGeometry, config, numerics) -> dict:
    """The compile-time arguments that every implicit GEMM over pointers has, and its launch options."""
    mode_d, mode_h, mode_w = (MODE_CODES[mode] for mode in geometry.modes)
    return {
        "MODE_D": mode_d,
        "MODE_H": mode_h,
        "MODE_W": mode_w,
        "INDEX": getattr(tl, f"int{numerics.index_bits}"),
        "ACC": getattr(tl, numerics.accumulator),
        "PRECISION": numerics.precision,
        "DOT": config.dot,
        "FLATTEN": config.flatten,
        "BLOCK_M": config.BLOCK_M,
        "BLOCK_N": config.BLOCK_N,
        "BLOCK_K": config.BLOCK_K,
        "num_warps": config.num_warps,
        "num_stages": config.num_stages,
    }
