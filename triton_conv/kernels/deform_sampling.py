"""Where the taps of a deformable convolution sample, and what they find there; shared by its kernels.

A tap of an output pixel samples x at a position (h, w) between pixels: the tap's own place plus an offset that is read
from memory. The value is bilinear in the four pixels around it, its *corners*, of which those outside the image count
as zeros. Corners are ordered (low, low), (low, high), (high, low), (high, high).
"""

from __future__ import annotations

import triton
import triton.language as tl

from ..deform_config import DeformProblem
from .indexing import filter_vectors, in_vectors, power_of_two_in


@triton.jit
def tile_pixels(tile, N, height, width, INDEX: tl.constexpr, BLOCK: tl.constexpr):
    """(n, row, column, valid) of the pixels of a tile [BLOCK]; n is 0 for those past the last."""
    m = tile.to(INDEX) * BLOCK + tl.arange(0, BLOCK)
    n = m // width // height
    valid = n < N
    return tl.where(valid, n, 0), m // width % height, m % width, valid


@triton.jit
def near(position, extent):
    """The position, moved so near the image that integers hold it, and no nearer; not a number stays so."""
    position = tl.where(position < -2, -2, position)
    return tl.where(position > extent, extent, position)


@triton.jit
def tap_position(offset, o_sc, index, tap, p, q, valid, H, W, window, ACC: tl.constexpr):
    """(h, w) that a tap of output pixels (p, q) samples; `index` counts offset groups and taps, `offset` is pixels'."""
    columns, stride_h, stride_w, lower_h, lower_w, dilation_h, dilation_w = window
    at = 2 * index * o_sc
    dh = tl.load(offset + at, mask=valid, other=0).to(ACC)
    dw = tl.load(offset + at + o_sc, mask=valid, other=0).to(ACC)
    h = (p * stride_h + (tap // columns * dilation_h - lower_h)).to(ACC) + dh
    w = (q * stride_w + (tap % columns * dilation_w - lower_w)).to(ACC) + dw
    return near(h, H), near(w, W)


@triton.jit
def inside(position, extent):
    """(the nearest position in the image, whether it is the one asked for)."""
    return tl.minimum(tl.maximum(position, 0), extent - 1), (position >= 0) & (position < extent)


@triton.jit
def corners(h, w, image, valid, H, W, x_sh, x_sw, X_VEC: tl.constexpr, INDEX: tl.constexpr):
    """(offsets of the rows of channels of four corners, whether these are there, h and w past the low ones)."""
    low_h, low_w = tl.floor(h), tl.floor(w)
    at_h, at_w = low_h.to(tl.int32), low_w.to(tl.int32)
    h0, has_h0 = inside(at_h, H)
    h1, has_h1 = inside(at_h + 1, H)
    w0, has_w0 = inside(at_w, W)
    w1, has_w1 = inside(at_w + 1, W)
    has_h0, has_h1 = valid & has_h0, valid & has_h1
    upper, lower = image + h0.to(INDEX) * x_sh, image + h1.to(INDEX) * x_sh
    left, right = w0.to(INDEX) * x_sw, w1.to(INDEX) * x_sw
    rows = ((upper + left) * X_VEC, (upper + right) * X_VEC, (lower + left) * X_VEC, (lower + right) * X_VEC)
    there = (has_h0 & has_w0, has_h0 & has_w1, has_h1 & has_w0, has_h1 & has_w1)
    return rows, there, h - low_h, w - low_w


@triton.jit
def corner_values(channels, channel_valid, rows, there, ACC: tl.constexpr):
    """The four corners [channels, pixels] at pointers to channels [channels, 1]."""
    a = tl.load(channels + rows[0][None, :], mask=channel_valid & there[0][None, :], other=0).to(ACC)
    b = tl.load(channels + rows[1][None, :], mask=channel_valid & there[1][None, :], other=0).to(ACC)
    c = tl.load(channels + rows[2][None, :], mask=channel_valid & there[2][None, :], other=0).to(ACC)
    d = tl.load(channels + rows[3][None, :], mask=channel_valid & there[3][None, :], other=0).to(ACC)
    return a, b, c, d


@triton.jit
def corner_weights(past_h, past_w, modulation):
    """The weights of the four corners [pixels]."""
    high, low = past_h * modulation, (1 - past_h) * modulation
    return low * (1 - past_w), low * past_w, high * (1 - past_w), high * past_w


@triton.jit
def interpolate(channels, channel_valid, rows, there, weights, ACC: tl.constexpr):
    """The sampled values [channels, pixels]."""
    a, b, c, d = corner_values(channels, channel_valid, rows, there, ACC)
    total = a * weights[0][None, :] + b * weights[1][None, :]
    return total + c * weights[2][None, :] + d * weights[3][None, :]


@triton.jit
def modulation_of(mask, m_sc, index, valid, like, HAS_MASK: tl.constexpr):
    """What the sampled values of a tap are multiplied by [pixels]: mask, a pointer to pixels, or ones."""
    if HAS_MASK:
        return tl.load(mask + index * m_sc, mask=valid, other=0).to(like.dtype)
    else:
        return tl.full(like.shape, 1, like.dtype)


# What changes with the image must not be specialised, or every image size would be compiled anew.
IMAGE_SIZED = ["N", "H", "W", "P", "Q", "x_sn", "x_sh", "y_sn", "y_sh", "o_sn", "o_sc", "o_sp", "m_sn", "m_sc", "m_sp"]
CHANNEL_STRIDES = ["x_sc", "y_sc"]


def arguments(kernel, problem: DeformProblem, of_c: int, of_k: int) -> dict:
    """Those arguments of a kernel that say where its tensors lie and how x is sampled.

    C_VEC and K_VEC, powers of two up to the blocks `of_c` and `of_k`, divide the channels of a segment and those of a
    group of y.
    Strides of x, y and w but the channel's are in units of X_VEC, Y_VEC and FLT_VEC elements.
    """
    p, g = problem, problem.geometry
    x_vec, x_strides = in_vectors(p.strides.x)
    y_vec, y_strides = in_vectors(p.strides.y)
    flt_vec, flt_strides = filter_vectors(g, p.strides.w)
    counted = dict(zip(("x_sn", "x_sc", "", "x_sh", "x_sw"), x_strides, strict=True))
    counted |= dict(zip(("y_sn", "y_sc", "", "y_sh", "y_sw"), y_strides, strict=True))
    counted |= dict(zip(("o_sn", "o_sc", "", "o_sp", "o_sq"), p.offset, strict=True))
    counted |= dict(zip(("m_sn", "m_sc", "", "m_sp", "m_sq"), p.mask or (0,) * 5, strict=True))
    del counted[""]
    (_, H, W), (_, P, Q), (lower_h, _), (lower_w, _) = g.input, g.output, *g.padding[1:]
    K = g.K // g.groups
    values = dict(
        N=g.N,
        H=H,
        W=W,
        P=P,
        Q=Q,
        L=p.segment,
        K=K,
        taps=g.taps,
        offset_groups=p.offset_groups,
        group_segments=g.C // g.groups // p.segment,
        offset_segments=g.C // p.offset_groups // p.segment,
        **counted,
        flt_strides=flt_strides,
        window=(g.filter[2], *g.stride[1:], lower_h, lower_w, *g.dilation[1:]),
        HAS_MASK=p.has_mask,
        X_VEC=x_vec,
        Y_VEC=y_vec,
        FLT_VEC=flt_vec,
        C_VEC=min(power_of_two_in(p.segment), of_c),
        K_VEC=min(power_of_two_in(K), of_k),
    )
    return {name: value for name, value in values.items() if name in kernel.arg_names}


def options(config, numerics) -> dict:
    """The compile-time arguments that every launch has, and its launch options."""
    return {
        "INDEX": getattr(tl, f"int{numerics.index_bits}"),
        "ACC": getattr(tl, numerics.accumulator),
        "PRECISION": numerics.precision,
        "DOT": config.dot,
        "BLOCK_M": config.BLOCK_M,
        "BLOCK_N": config.BLOCK_N,
        "BLOCK_K": config.BLOCK_K,
        "num_warps": config.num_warps,
        "num_stages": config.num_stages,
    }
