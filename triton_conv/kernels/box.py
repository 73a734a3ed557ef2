"""fprop and dgrad on Hopper and newer: activations come as boxes of pixels x channels, by the bulk copy engine.

    GEMM_M = destination channels of one group                          (filters: the dot's first operand)
    GEMM_N = N * destination positions of one residue class of the stride  (pixels: its second operand)
    GEMM_K = filter taps * source channels of one group

In this order both operands are multiplied from shared memory. Coordinates outside a tensor read zeros, so that zero
padding, dilation and residue classes are coordinates and nothing is masked. A tensor that is walked in steps (the
source of a strided fprop, the destination of a strided dgrad) is described with its step as an axis of its own:

    W in steps of s   is  W / s positions of s * C channels                       (W a multiple of s)
    H in steps of s   is  H / s positions of s rows, in the place of D            (H a multiple of s, D = 1)

With CONTEXT the first ctx_d source frames (D) are in another tensor, and a box is of one frame: the taps of a tile that
lie in the context come first, in a loop of their own.

Programs are persistent: each takes every num_programs-th tile, so that one tile is stored while the next is loaded.
"""

from __future__ import annotations

from math import prod

import triton
import triton.language as tl

from .. import tiles
from ..epilogue import PLAIN
from ..geometry import Context, ConvGeometry, Role, Strides, describable, tap_step
from .epilogue import activate, scaled
from .epilogue import constants as epilogue_constants
from .indexing import matrix_product, residue_class, tap_of
from .launch import Box, Launch, all_registers

# What changes with the image must not be specialised, or every image size would be compiled anew.
IMAGE_SIZED = ["N", "dst_d", "dst_h", "dst_w", "dst_sn", "dst_sd", "dst_sh", "tiles_n", "tiles_m", "tiles"]
IMAGE_SIZED += ["ctx_d"]
# Positions are divided by steps after this many steps are added: integer division rounds toward zero.
BIAS: tl.constexpr = tl.constexpr(1 << 16)


@triton.jit
def in_steps(position, step):
    """(quotient, remainder) of a position that may be negative, the quotient rounded down."""
    shifted = position + BIAS * step
    return shifted // step - BIAS, shifted % step


@triton.jit
def read_tile(
    tensor,
    at,
    valid,
    BLOCK_N: tl.constexpr,
    PIXELS: tl.constexpr,
    STORE_BOX: tl.constexpr,
    STORE_PLANES: tl.constexpr,
):
    """[BLOCK_N, PIXELS] of a tensor like the destination: at coordinates of a descriptor, or offsets from a pointer."""
    if STORE_BOX:
        return tensor.load(at).reshape(PIXELS, BLOCK_N).trans()
    elif STORE_PLANES:
        return tensor.load(at).permute(1, 0, 2, 3, 4).reshape(BLOCK_N, PIXELS)
    else:
        return tl.load(tensor + at, mask=valid, other=0)


@triton.jit
def write_tile(tensor, at, valid, values, BN, BZ, BP, BQ, STORE_BOX: tl.constexpr, STORE_PLANES: tl.constexpr):
    """Writes values [BLOCK_N, PIXELS] to where `read_tile` would read them."""
    if STORE_BOX:
        tensor.store(at, values.trans().reshape(tensor.block_shape))
    elif STORE_PLANES:
        tensor.store(at, values.reshape(values.shape[0], BN, BZ, BP, BQ).permute(1, 0, 2, 3, 4))
    else:
        tl.store(tensor + at, values, mask=valid)


@triton.jit
def halves(tile):
    """Of the pixels of [channels, pixels]: the first and the second."""
    return tile.reshape(tile.shape[0], 2, tile.shape[1] // 2).permute(0, 2, 1).split()


@triton.jit(do_not_specialize=IMAGE_SIZED, do_not_specialize_on_alignment=["scale_a", "scale_b", "dst_sc"])
def box_kernel(
    src,  # (N, D, H, W, channels), or (N, H / s, s, W / s, s * channels)
    context,  # as src, or None
    flt,  # (taps, K, C / groups)
    dst,  # as src, or None
    scale_a,
    scale_b,
    scale,
    bias,
    residual,  # as dst where that is not None, else a pointer, with dst's strides; so is what is kept
    kept,
    dst_pointer,
    N,
    SRC_C,
    DST_C,
    groups,
    dst_d,
    dst_h,
    dst_w,
    dst_sn,
    dst_sc,
    dst_sd,
    dst_sh,
    dst_sw,
    axis_d,
    axis_h,
    axis_w,
    tiles_n,
    tiles_m,
    tiles,
    ctx_d,
    CONTEXT: tl.constexpr,
    ONE_FRAME: tl.constexpr,
    FORWARD: tl.constexpr,
    SRC_ROWS: tl.constexpr,
    DST_ROWS: tl.constexpr,
    STORE_BOX: tl.constexpr,
    STORE_PLANES: tl.constexpr,
    HAS_SCALE: tl.constexpr,
    SCALED: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    RESIDUAL: tl.constexpr,
    ACTIVATION: tl.constexpr,
    SLOPE: tl.constexpr,
    KEEPS: tl.constexpr,
    INDEX: tl.constexpr,
    ACC: tl.constexpr,
    PRECISION: tl.constexpr,
    BN: tl.constexpr,
    BZ: tl.constexpr,
    BP: tl.constexpr,
    BQ: tl.constexpr,
    PARTS: tl.constexpr,
    PART_N: tl.constexpr,
    PART_Z: tl.constexpr,
    PART_P: tl.constexpr,
    PART_Q: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr,
    FLATTEN: tl.constexpr,
):
    PIXELS: tl.constexpr = BN * BZ * BP * BQ
    u_d = tl.cdiv(dst_d, axis_d.phases)
    u_h = tl.cdiv(dst_h, axis_h.phases)
    u_w = tl.cdiv(dst_w, axis_w.phases)
    boxes_z = tl.cdiv(u_d, BZ)
    boxes_p = tl.cdiv(u_h, BP)
    boxes_q = tl.cdiv(u_w, BQ)
    blocks_c = tl.cdiv(SRC_C, BLOCK_K)
    per_part = tiles_n * tiles_m
    for tile in tl.range(tl.program_id(0), tiles, tl.num_programs(0), flatten=FLATTEN):
        # parts are groups and residue classes; within one, GROUP pixel tiles take turns over all filters (for L2)
        part = tile // per_part
        in_part = tile % per_part
        band = in_part // (GROUP * tiles_n)
        band_size = tl.minimum(tiles_m - band * GROUP, GROUP)
        tile_m = band * GROUP + in_part % (GROUP * tiles_n) % band_size
        channel0 = in_part % (GROUP * tiles_n) // band_size * BLOCK_N
        phase_w = part % axis_w.phases
        phase_h = part // axis_w.phases % axis_h.phases
        phase_d = part // axis_w.phases // axis_h.phases % axis_d.phases
        group = part // axis_w.phases // axis_h.phases // axis_d.phases
        q0 = tile_m % boxes_q * BQ
        p0 = tile_m // boxes_q % boxes_p * BP
        z0 = tile_m // boxes_q // boxes_p % boxes_z * BZ
        n0 = tile_m // boxes_q // boxes_p // boxes_z * BN

        source_d, taps_d, first_d = residue_class(axis_d, phase_d)
        source_h, taps_h, first_h = residue_class(axis_h, phase_h)
        source_w, taps_w, first_w = residue_class(axis_w, phase_w)
        acc = tl.zeros((BLOCK_N, PIXELS), ACC)
        step0 = 0
        steps = taps_d * taps_h * taps_w * blocks_c
        for PART in tl.static_range(0 if CONTEXT else 1, 2):  # of the context, of the source
            end = steps
            source = src
            if PART == 0:
                frames = tl.maximum(ctx_d - z0 - source_d, 0)
                end = tl.minimum(tl.cdiv(frames, axis_d.src_tap_step), taps_d) * (taps_h * taps_w * blocks_c)
                source = context
            for step in tl.range(step0, end):
                tap = step // blocks_c
                c0 = step % blocks_c * BLOCK_K
                jd, jh, jw = tap_of(tap, taps_d, taps_h, taps_w, tl.int32)
                d = z0 + source_d + jd * axis_d.src_tap_step
                h, row = in_steps(source_h + jh * axis_h.src_tap_step, axis_h.src_step)
                w, column = in_steps(source_w + jw * axis_w.src_tap_step, axis_w.src_step)
                channel = (column * groups + group) * SRC_C + c0
                if PART == 0 and ONE_FRAME:
                    d *= 0
                elif PART == 1 and CONTEXT:
                    d -= ctx_d
                if SRC_ROWS:
                    pixels = source.load([n0, p0 + h, row, q0 + w, channel])
                else:
                    pixels = source.load([n0, d, p0 + h, q0 + w, channel])
                pixels = pixels.reshape(PIXELS, BLOCK_K)
                t = first_d + jd * axis_d.tap_step
                r = first_h + jh * axis_h.tap_step
                s = first_w + jw * axis_w.tap_step
                filter_tap = (t * axis_h.filter + r) * axis_w.filter + s
                if FORWARD:
                    filters = flt.load([filter_tap, group * DST_C + channel0, c0]).reshape(BLOCK_N, BLOCK_K)
                else:
                    filters = flt.load([filter_tap, group * SRC_C + c0, channel0]).reshape(BLOCK_K, BLOCK_N).trans()
                acc = matrix_product(filters, pixels.trans(), acc, PRECISION)
            step0 = end

        channels = channel0 + tl.arange(0, BLOCK_N)
        channel_valid = channels < DST_C
        scale_group = scale + group * DST_C if SCALED else scale
        bias_group = bias + group * DST_C if HAS_BIAS else bias
        dtype: tl.constexpr = dst_pointer.dtype.element_ty
        parts: tl.tuple = (acc,)
        if PARTS == 2:
            parts = halves(acc)
        elif PARTS == 4:
            upper, lower = halves(acc)
            upper = halves(upper)
            lower = halves(lower)
            parts = (upper[0], upper[1], lower[0], lower[1])
        for part in tl.static_range(PARTS):
            sums = scaled(
                parts[part],
                scale_a,
                scale_b,
                scale_group,
                bias_group,
                channels,
                channel_valid,
                HAS_SCALE,
                SCALED,
                HAS_BIAS,
            )
            # the part's first pixel
            n1 = n0 + part * (PIXELS // PARTS) // (BQ * BP * BZ)
            z1 = z0 + part * (PIXELS // PARTS) // (BQ * BP) % BZ
            p1 = p0 + part * (PIXELS // PARTS) // BQ % BP
            q1 = q0 + part * (PIXELS // PARTS) % BQ
            at: tl.tuple = ()
            valid = None
            if STORE_BOX:
                channel = (phase_w * groups + group) * DST_C + channel0
                if DST_ROWS:
                    at = (n1, p1, phase_h, q1, channel)
                else:
                    at = (n1, z1, p1, q1, channel)
            elif STORE_PLANES:
                at = (n1, group * DST_C + channel0, z1, p1, q1)
            else:
                pixel = tl.arange(0, PIXELS // PARTS)
                ow = phase_w + (q1 + pixel % PART_Q) * axis_w.phases
                oh = phase_h + (p1 + pixel // PART_Q % PART_P) * axis_h.phases
                od = phase_d + (z1 + pixel // (PART_Q * PART_P) % PART_Z) * axis_d.phases
                n = n1 + pixel // (PART_Q * PART_P * PART_Z)
                pixel_valid = (n < N) & (od < dst_d) & (oh < dst_h) & (ow < dst_w)
                valid = channel_valid[:, None] & pixel_valid[None, :]
                offset = n.to(INDEX) * dst_sn + od.to(INDEX) * dst_sd + oh.to(INDEX) * dst_sh + ow.to(INDEX) * dst_sw
                at = offset[None, :] + ((group * DST_C + channels).to(INDEX) * dst_sc)[:, None]

            # as `epilogue.store`, in the same order
            if RESIDUAL == "before":
                sums += read_tile(residual, at, valid, BLOCK_N, PIXELS // PARTS, STORE_BOX, STORE_PLANES).to(ACC)
            if KEEPS:
                unactivated = sums.to(dtype)
                write_tile(kept, at, valid, unactivated, PART_N, PART_Z, PART_P, PART_Q, STORE_BOX, STORE_PLANES)
            sums = activate(sums, SLOPE, ACTIVATION)
            if RESIDUAL == "after":
                sums += read_tile(residual, at, valid, BLOCK_N, PIXELS // PARTS, STORE_BOX, STORE_PLANES).to(ACC)
            out = sums.to(dtype)
            if STORE_BOX or STORE_PLANES:
                write_tile(dst, at, valid, out, PART_N, PART_Z, PART_P, PART_Q, STORE_BOX, STORE_PLANES)
            else:
                write_tile(dst_pointer, at, valid, out, PART_N, PART_Z, PART_P, PART_Q, STORE_BOX, STORE_PLANES)


def launch(
    role: Role,
    geometry: ConvGeometry,
    strides: Strides,
    config,
    numerics,
    device,
    vector: int,
    into: str = "",
    context: Context | None = None,
) -> Launch:
    """FPROP: y from x and w; DGRAD: x from y and w. The output may be written `into` another tensor instead.

    `vector` counts the output's elements in 16 bytes. With a context (FPROP, a box of one frame) the geometry is that
    of all frames in a row, the strides of x those of its own.
    """
    g = geometry
    forward = role is Role.FPROP
    src_c, dst_c = (g.C, g.K) if forward else (g.K, g.C)
    extents = g.output if forward else g.input
    dst_strides = strides.y if forward else strides.x
    axes = g.axes(role)
    counted = tiles.box(role, g, config)
    bn, bz, bp, bq = config.box
    part = tiles.box_part(config, numerics.epilogue, role, g)
    arguments = {
        "N": g.N,
        "SRC_C": src_c // g.groups,
        "DST_C": dst_c // g.groups,
        "groups": g.groups,
        "dst_d": extents[0],
        "dst_h": extents[1],
        "dst_w": extents[2],
        "dst_sn": dst_strides[0],
        "dst_sc": dst_strides[1],
        "dst_sd": dst_strides[2],
        "dst_sh": dst_strides[3],
        "dst_sw": dst_strides[4],
        "axis_d": axes[0],
        "axis_h": axes[1],
        "axis_w": axes[2],
        "tiles_n": counted.tiles_n,
        "tiles_m": counted.tiles_m,
        "tiles": counted.total,
        "ctx_d": context.frames if context else None,
        "CONTEXT": context is not None,
        "ONE_FRAME": context is not None and context.held < context.frames,
        "FORWARD": forward,
        "SRC_ROWS": axes[1].src_step > 1,
        "DST_ROWS": axes[1].phases > 1,
        "STORE_BOX": stores_box(role, g, strides, config.BLOCK_N),
        "STORE_PLANES": stores_planes(role, g, strides, config, vector),
        "HAS_SCALE": numerics.has_scale,
        **epilogue_constants(numerics),
        "INDEX": getattr(tl, f"int{numerics.index_bits}"),
        "ACC": getattr(tl, numerics.accumulator),
        "PRECISION": numerics.precision,
        "BN": bn,
        "BZ": bz,
        "BP": bp,
        "BQ": bq,
        "PARTS": config.BLOCK_M // prod(part),
        **dict(zip(("PART_N", "PART_Z", "PART_P", "PART_Q"), part, strict=True)),
        "BLOCK_N": config.BLOCK_N,
        "BLOCK_K": config.BLOCK_K,
        "GROUP": 8,
        # loops are only flattened where every tile has a step: a residue class may have no tap, nor a context
        "FLATTEN": all(axis.phases == 1 for axis in axes) and context is None,
        "num_warps": config.num_warps,
        "num_stages": config.num_stages,
    }
    src, dst = ("x", into or "y") if forward else ("y", into or "x")
    if numerics.epilogue != PLAIN:
        arguments["maxnreg"] = all_registers(config.num_warps)
    source, filters, stored = _boxes(role, g, strides, config, part, src, dst, vector)
    before = None
    if context:
        before, source = _boxes_in_time(g, strides, context, config)
    *scales_and_bias, residual, kept = numerics.operands
    if stored is not None:
        residual, kept = (name and stored._replace(operand=name) for name in (residual, kept))
    programs = min(counted.total, device.multiprocessors * config.programs)
    operands = (source, before, filters, stored, *scales_and_bias, residual, kept, dst)
    return Launch("box", box_kernel, programs, operands, arguments)


def _boxes_in_time(g: ConvGeometry, strides: Strides, context: Context, config) -> tuple[Box, Box]:
    """(context, x) as the kernel's tensor descriptors; without a context x stands in its place."""
    steps, parts = [axis.src_step for axis in g.axes(Role.FPROP)], []
    held = {"context": (context.held, context.strides), "x": (g.input[0] - context.frames, strides.x)}
    for name, (frames, of_frames) in held.items():
        sizes = (g.N, frames, *g.input[1:])
        parts.append(stepped(name, sizes, g.C, of_frames, steps, config.box, config.BLOCK_K))
    before, x = parts
    return (before if context.held else x), x


def _boxes(
    role: Role, geometry: ConvGeometry, strides: Strides, config, part: tuple[int, ...], src: str, dst: str, vector: int
) -> tuple:
    """(source, filters, destination or None) as the kernel's tensor descriptors."""
    g = geometry
    forward = role is Role.FPROP
    axes = g.axes(role)
    taps = g.taps
    tap_stride = tap_step(g, strides) or strides.w[0]
    filter_box = (config.BLOCK_N, config.BLOCK_K) if forward else (config.BLOCK_K, config.BLOCK_N)
    filters = Box("w", (taps, g.K, g.C // g.groups), (tap_stride, strides.w[0], 1), (1, *filter_box))
    src_sides = ((g.N, *g.input), g.C, strides.x) if forward else ((g.N, *g.output), g.K, strides.y)
    dst_sides = ((g.N, *g.output), g.K, strides.y) if forward else ((g.N, *g.input), g.C, strides.x)
    source = stepped(src, *src_sides, [a.src_step for a in axes], config.box, config.BLOCK_K)
    if stores_box(role, g, strides, config.BLOCK_N):
        return source, filters, stepped(dst, *dst_sides, [a.phases for a in axes], part, config.BLOCK_N)
    if stores_planes(role, g, strides, config, vector):
        (n, *sizes), channels, (sn, sc, sd, sh, _) = dst_sides
        shape = (n, channels, *sizes)
        # strides of axes of extent 1 are free, and a descriptor wants them to be multiples of 16 bytes
        free = (stride if extent > 1 else sc for stride, extent in zip((sn, sc, sd, sh), shape, strict=False))
        bn, *sides = part
        return source, filters, Box(dst, shape, (*free, 1), (bn, config.BLOCK_N, *sides))
    return source, filters, None


def stores_box(role: Role, geometry: ConvGeometry, strides: Strides, block_n: int) -> bool:
    """Whether tiles of the destination are boxes of it: channels-last, extents whole steps, blocks whole groups.

    Steps along W fold into channels: then these are all that lie there, not a slice.
    """
    g = geometry
    forward = role is Role.FPROP
    extents, channels, dst = (g.output, g.K, strides.y) if forward else (g.input, g.C, strides.x)
    phases = [axis.phases for axis in g.axes(role)]
    whole_groups = g.groups == 1 or (channels // g.groups) % block_n == 0
    whole_channels = phases[2] == 1 or (channels % block_n == 0 and dst[4] == channels)
    return dst[1] == 1 and whole_groups and whole_channels and describable(extents, phases)


def stores_planes(role: Role, geometry: ConvGeometry, strides: Strides, config, vector: int) -> bool:
    """Whether tiles of the destination are boxes of a contiguous tensor, whose rows and planes are whole vectors."""
    g = geometry
    forward = role is Role.FPROP
    sizes, channels, dst = (g.output, g.K, strides.y) if forward else (g.input, g.C, strides.x)
    dense = all(axis.phases == 1 for axis in g.axes(role)) and dst[4] == 1 and dst[1] != 1 and config.box[3] >= vector
    whole_groups = g.groups == 1 or (channels // g.groups) % config.BLOCK_N == 0
    outer = zip(dst[:4], (g.N, channels, *sizes[:2]), strict=True)
    return dense and whole_groups and all(stride % vector == 0 for stride, extent in outer if extent > 1)


def stepped(operand, sizes, channels, strides, steps, box, block) -> Box:
    """The descriptor of an activation of `sizes` (n, d, h, w) that is walked in `steps` of (d, h, w)."""
    n, d, h, w = sizes
    sn, _, sd, sh, sw = strides
    _, step_h, step_w = steps
    bn, bz, bp, bq = box
    # strides of axes of extent 1 are free, and a descriptor wants them to be multiples of 16 bytes
    sw = sw if w > 1 else channels
    sh = sh if h > 1 else w * sw
    sd = sd if d > 1 else h * sh
    sn = sn if n > 1 else d * sd
    if step_h > 1:
        shape, stride = [n, h // step_h, step_h, w // step_w], [sn, step_h * sh, sh, step_w * sw]
        sides = [bn, bp, 1, bq]
    else:
        shape, stride, sides = [n, d, h, w // step_w], [sn, sd, sh, step_w * sw], [bn, bz, bp, bq]
    return Box(operand, (*shape, step_w * channels), (*stride, 1), (*sides, block))
