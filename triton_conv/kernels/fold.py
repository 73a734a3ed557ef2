"""Gives the border of a padded gradient back to the positions it was read from.

The input gradient of a convolution padded by reflect, replicate or circular is computed on the padded extents; each
position of dx then sums, in fixed order, the padded positions that show it. Memory-bound: one read of the padded
gradient, one write of dx.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ..geometry import ConvGeometry
from .epilogue import constants as epilogue_constants
from .epilogue import store
from .indexing import CIRCULAR, MODE_CODES, REFLECT, REPLICATE
from .launch import Launch

BLOCK = 256


IMAGE_SIZED = [
    "total",
    "x_d",
    "x_h",
    "x_w",
    "padded_sn",
    "padded_sc",
    "padded_sd",
    "padded_sh",
    "padded_sw",
    "x_sn",
    "x_sc",
    "x_sd",
    "x_sh",
    "x_sw",
]


@triton.jit
def copies(border, MODE: tl.constexpr):
    """In how many places, itself included, a padded axis may show a position."""
    if MODE == REFLECT or MODE == CIRCULAR:
        return 3
    elif MODE == REPLICATE:
        return 1 + border[0] + border[1]
    else:
        return 1


@triton.jit
def shown_at(position, copy, extent, lower, upper, MODE: tl.constexpr):
    """(padded position, valid) of the copy-th place where the border shows an input position; copy 0 is itself."""
    at = position
    valid = copy == 0
    if MODE == REFLECT:
        at = tl.where(copy == 1, -position, tl.where(copy == 2, extent - 1 - position + (extent - 1), position))
        valid = (copy == 0) | (at != position)
    elif MODE == CIRCULAR:
        at = tl.where(copy == 1, position - extent, tl.where(copy == 2, position + extent, position))
        valid = copy >= 0
    elif MODE == REPLICATE:
        before = copy <= lower
        at = tl.where(copy == 0, position, tl.where(before, -copy, extent - 1 + copy - lower))
        valid = (copy == 0) | (before & (position == 0)) | ((copy > lower) & (position == extent - 1))
    valid = valid & (at >= -lower) & (at < extent + upper)
    return tl.where(valid, at, 0) + lower, valid


@triton.jit(do_not_specialize=IMAGE_SIZED)
def fold_kernel(
    padded,
    scale,
    bias,
    residual,  # in dx's strides, as is what is kept
    kept,
    dx,
    total,
    C,
    x_d,
    x_h,
    x_w,
    padded_sn,
    padded_sc,
    padded_sd,
    padded_sh,
    padded_sw,
    x_sn,
    x_sc,
    x_sd,
    x_sh,
    x_sw,
    # (lower, upper) of each axis
    border_d,
    border_h,
    border_w,
    SCALED: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    RESIDUAL: tl.constexpr,
    ACTIVATION: tl.constexpr,
    SLOPE: tl.constexpr,
    KEEPS: tl.constexpr,
    MODE_D: tl.constexpr,
    MODE_H: tl.constexpr,
    MODE_W: tl.constexpr,
    INDEX: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    BLOCK: tl.constexpr,
):
    i = tl.program_id(0).to(INDEX) * BLOCK + tl.arange(0, BLOCK)  # [BLOCK]
    valid = i < total
    i = tl.where(valid, i, 0)
    if CHANNELS_LAST:
        c = i % C
        i = i // C
        n = i // x_w // x_h // x_d
    else:
        c = i // x_w // x_h // x_d % C
        n = i // x_w // x_h // x_d // C
    w = i % x_w
    h = i // x_w % x_h
    d = i // x_w // x_h % x_d
    source = padded + n * padded_sn + c * padded_sc
    acc = tl.zeros((BLOCK,), padded.dtype.element_ty)
    for copy_d in range(copies(border_d, MODE_D)):
        at_d, valid_d = shown_at(d, copy_d, x_d, border_d[0], border_d[1], MODE_D)
        for copy_h in range(copies(border_h, MODE_H)):
            at_h, valid_h = shown_at(h, copy_h, x_h, border_h[0], border_h[1], MODE_H)
            for copy_w in range(copies(border_w, MODE_W)):
                at_w, valid_w = shown_at(w, copy_w, x_w, border_w[0], border_w[1], MODE_W)
                offset = at_d * padded_sd + at_h * padded_sh + at_w * padded_sw
                acc += tl.load(source + offset, mask=valid & valid_d & valid_h & valid_w, other=0)
    if SCALED:
        acc *= tl.load(scale + c, mask=valid, other=0).to(acc.dtype)
    if HAS_BIAS:
        acc += tl.load(bias + c, mask=valid, other=0).to(acc.dtype)
    offset = n * x_sn + c * x_sc + d * x_sd + h * x_sh + w * x_sw
    store(acc, offset, valid, residual, kept, dx, RESIDUAL, ACTIVATION, SLOPE, KEEPS)


def launch(geometry: ConvGeometry, numerics, padded_strides, dx_strides) -> Launch:
    """x (N, C, D, H, W) from its padded form in the workspace, and the epilogue of numerics, indexed by C."""
    g = geometry
    borders = [pad if mode != "zeros" else (0, 0) for pad, mode in zip(g.padding, g.modes, strict=True)]
    strides = (*padded_strides, *dx_strides)
    names = ["padded_sn", "padded_sc", "padded_sd", "padded_sh", "padded_sw", "x_sn", "x_sc", "x_sd", "x_sh", "x_sw"]
    total = g.N * g.C * g.input[0] * g.input[1] * g.input[2]
    arguments = dict(
        total=total,
        C=g.C,
        x_d=g.input[0],
        x_h=g.input[1],
        x_w=g.input[2],
        **dict(zip(names, strides, strict=True)),
        border_d=borders[0],
        border_h=borders[1],
        border_w=borders[2],
        **epilogue_constants(numerics),
        MODE_D=MODE_CODES[g.modes[0]],
        MODE_H=MODE_CODES[g.modes[1]],
        MODE_W=MODE_CODES[g.modes[2]],
        INDEX=getattr(tl, f"int{numerics.index_bits}"),
        CHANNELS_LAST=dx_strides[1] == 1,
        BLOCK=BLOCK,
    )
    _, _, *more = numerics.operands
    operands = ("workspace", *more, "x")
    return Launch("fold", fold_kernel, triton.cdiv(total, BLOCK), operands, arguments)
