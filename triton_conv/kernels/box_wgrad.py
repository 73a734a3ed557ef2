"""wgrad on Hopper and newer: both operands come as runs of pixels x channels, by the bulk copy engine.

    GEMM_M = output channels of one group                 (dy: the dot's first operand)
    GEMM_N = filter taps * input channels of one group    (x: its second operand)
    GEMM_K = N * Z * P * Q                                (pixels, a run of them along one axis at a time)

A program computes BLOCK_N output channels x BLOCK_K input channels of one tap from one slab of runs; slabs are summed
as in `wgrad`. Both operands are multiplied from shared memory, because a run is a box with a single side above 1, next
to the channels: the axes of a tensor are described in the order that puts the run's axis there. So 7x7 images of a
batch of 64 are walked in runs of 64 images, and none of the pixels multiplied is idle.

Coordinates outside a tensor read zeros: these are the padding in x and the end of the last run in dy, and nothing is
masked. Where a run of dy has ended, x goes on with its next pixels, and their products with zero are added: an
infinity there makes a NaN also at taps that do not meet it. A strided x is described in steps, as in `box`.
"""

from __future__ import annotations

from math import prod

import triton
import triton.language as tl

from .. import tiles
from ..geometry import ConvGeometry, Role, Strides
from .box import in_steps, stepped
from .indexing import channel_block, filter_vectors, launchable, matrix_product, power_of_two_in, tap_of
from .launch import Box, Launch, all_registers
from .wgrad import sum_launch

# What changes with the image must not be specialised, or every image size would be compiled anew.
IMAGE_SIZED = ["blocks_z", "blocks_p", "blocks_q", "runs", "slabs", "runs_per_slab", "slab_stride"]


@triton.jit
def load_run(tensor, n, d, h, w, channel, AXIS: tl.constexpr):
    """[pixels of the run, channels] of a tensor described with axis AXIS of (n, d, h, w) last, in exchange for w."""
    if AXIS == 0:
        run = tensor.load([w, d, h, n, channel])
    elif AXIS == 1:
        run = tensor.load([n, w, h, d, channel])
    elif AXIS == 2:
        run = tensor.load([n, d, w, h, channel])
    else:
        run = tensor.load([n, d, h, w, channel])
    return run.reshape(run.shape[3], run.shape[4])


@triton.jit
def advance(position, step, end):
    """(the next position, 0 after the last; whether it was the last)."""
    following = position + step
    return tl.where(following == end, 0, following), following == end


@triton.jit(do_not_specialize=IMAGE_SIZED)
def box_wgrad_kernel(
    x,  # (N, D, H, W, C), or (N, H / s, s, W / s, s * C), with the run's axis next to the channels
    dy,  # (N, Z, P, Q, K), likewise
    dw,
    C,
    K,
    groups,
    blocks_z,
    blocks_p,
    blocks_q,
    runs,
    slabs,
    runs_per_slab,
    slab_stride,
    flt_strides,  # of group, k and the three taps in dw or in a slab, in units of FLT_VEC elements
    axis_d,
    axis_h,
    axis_w,
    X_ROWS: tl.constexpr,
    X_AXIS: tl.constexpr,
    Y_AXIS: tl.constexpr,
    BN: tl.constexpr,
    BZ: tl.constexpr,
    BP: tl.constexpr,
    BQ: tl.constexpr,
    FLT_VEC: tl.constexpr,
    SC: tl.constexpr,  # stride of c, which makes offsets of channels part of the stores, not of registers
    C_VEC: tl.constexpr,
    K_VEC: tl.constexpr,
    INDEX: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    # tiles of one slab run side by side, so that they find each other's pixels in L2
    tiles_k = tl.cdiv(K, BLOCK_N)
    blocks_c = tl.cdiv(C, BLOCK_K)
    columns = axis_d.filter * axis_h.filter * axis_w.filter * blocks_c
    pid = tl.program_id(0)
    k0 = pid % tiles_k * BLOCK_N
    column = pid // tiles_k % columns
    slab = pid // tiles_k // columns % slabs
    group = pid // tiles_k // columns // slabs
    c0 = column % blocks_c * BLOCK_K
    jd, jh, jw = tap_of(column // blocks_c, axis_d.filter, axis_h.filter, axis_w.filter, tl.int32)
    tap_d = axis_d.offset + jd * axis_d.src_tap_step
    tap_h, row = in_steps(axis_h.offset + jh * axis_h.src_tap_step, axis_h.src_step)
    tap_w, part = in_steps(axis_w.offset + jw * axis_w.src_tap_step, axis_w.src_step)
    x_channel = (part * groups + group) * C + c0
    y_channel = group * K + k0

    acc = tl.zeros((BLOCK_N, BLOCK_K), tl.float32)
    first = slab * runs_per_slab
    q = first % blocks_q * BQ
    p = first // blocks_q % blocks_p * BP
    z = first // blocks_q // blocks_p % blocks_z * BZ
    n = first // blocks_q // blocks_p // blocks_z * BN
    for _ in tl.range(first, tl.minimum(first + runs_per_slab, runs)):
        grads = load_run(dy, n, z, p, q, y_channel, Y_AXIS)  # [pixels, BLOCK_N]
        if X_ROWS:
            pixels = load_run(x, n, p + tap_h, row, q + tap_w, x_channel, X_AXIS)  # [pixels, BLOCK_K]
        else:
            pixels = load_run(x, n, z + tap_d, p + tap_h, q + tap_w, x_channel, X_AXIS)
        acc = matrix_product(grads.trans(), pixels, acc, PRECISION)
        q, carry = advance(q, BQ, blocks_q * BQ)
        p, carry = advance(p, tl.where(carry, BP, 0), blocks_p * BP)
        z, carry = advance(z, tl.where(carry, BZ, 0), blocks_z * BZ)
        n += tl.where(carry, BN, 0)

    k, k_valid = channel_block(k0, K, BLOCK_N, K_VEC)
    c, c_valid = channel_block(c0, C, BLOCK_K, C_VEC)
    sg, sk, st, sr, ss = flt_strides
    tap = jd.to(INDEX) * st + jh.to(INDEX) * sr + jw.to(INDEX) * ss
    dw += (slab.to(INDEX) * slab_stride + group.to(INDEX) * sg + tap) * FLT_VEC
    offset = k.to(INDEX)[:, None] * sk * FLT_VEC + c.to(INDEX)[None, :] * SC  # [BLOCK_N, BLOCK_K]
    tl.store(dw + offset, acc.to(dw.dtype.element_ty), mask=k_valid[:, None] & c_valid[None, :])


def launches(geometry: ConvGeometry, strides: Strides, config, numerics) -> list[Launch]:
    """w from x and y, by way of slabs in the workspace where config.splits is more than 1."""
    g = geometry
    C, K = g.C // g.groups, g.K // g.groups
    axes = g.axes(Role.WGRAD)
    flt_vec, flt_strides = filter_vectors(g, strides.w)
    numel = g.K * C * g.taps
    counted = tiles.box_wgrad(g, config)
    blocks = tiles.blocks((g.N, *g.output), config.box)
    steps = [axis.src_step for axis in axes]
    x, x_axis = _run(stepped("x", (g.N, *g.input), g.C, strides.x, steps, config.box, config.BLOCK_K))
    dy, y_axis = _run(stepped("y", (g.N, *g.output), g.K, strides.y, [1, 1, 1], config.box, config.BLOCK_N))
    bn, bz, bp, bq = config.box
    arguments = {
        "C": C,
        "K": K,
        "groups": g.groups,
        "blocks_z": blocks[1],
        "blocks_p": blocks[2],
        "blocks_q": blocks[3],
        "runs": prod(blocks),
        "slabs": config.splits,
        "runs_per_slab": counted.longest,
        "slab_stride": numel // flt_vec,  # whole: dw is dense
        "flt_strides": (*flt_strides[:2], *flt_strides[3:]),
        "axis_d": axes[0],
        "axis_h": axes[1],
        "axis_w": axes[2],
        "X_ROWS": axes[1].src_step > 1,
        "X_AXIS": x_axis,
        "Y_AXIS": y_axis,
        "BN": bn,
        "BZ": bz,
        "BP": bp,
        "BQ": bq,
        "FLT_VEC": flt_vec,
        "SC": flt_strides[2],
        "C_VEC": min(power_of_two_in(C), config.BLOCK_K),
        "K_VEC": min(power_of_two_in(K), config.BLOCK_N),
        "INDEX": getattr(tl, f"int{numerics.index_bits}"),
        "PRECISION": numerics.precision,
        "BLOCK_N": config.BLOCK_N,
        "BLOCK_K": config.BLOCK_K,
        "num_warps": config.num_warps,
        "maxnreg": all_registers(config.num_warps),
        "num_stages": config.num_stages,
    }
    programs = launchable(counted.total, g)
    if config.splits == 1:
        return [Launch("box_wgrad", box_wgrad_kernel, programs, (x, dy, "w"), arguments)]
    return [
        Launch("box_wgrad", box_wgrad_kernel, programs, (x, dy, "workspace"), arguments),
        sum_launch(numel, config.splits, arguments["INDEX"]),
    ]


def _run(box: Box) -> tuple[Box, int]:
    """The box with the axis of its run next to the channels, and which axis that was."""
    axis = max(range(4), key=lambda a: box.block[a])

    def exchanged(values: tuple[int, ...]) -> tuple[int, ...]:
        order = list(range(5))
        order[axis], order[3] = 3, axis
        return tuple(values[a] for a in order)

    return Box(box.operand, exchanged(box.shape), exchanged(box.strides), exchanged(box.block)), axis
