"""What `gather_branches` computes on Hopper and newer, as `box` does it: activations as boxes, by the bulk copy engine.

Sources, filters and destinations are each described for every term or part, so that what lies beyond a slice of the
channels is neither read nor written. Destinations are stored as boxes; a residue class of a stride is not.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl

from .. import tiles
from ..branches_problem import MOST_TERMS, fitted
from ..geometry import Role, Strides, tap_step
from .box import in_steps, stepped
from .epilogue import finish
from .gather_branches import described, first_terms, first_tile, meeting_taps, of, operands, terms_before
from .indexing import matrix_product
from .launch import Box, Launch, all_registers

# What changes with the image must not be specialised, or every image size would be compiled anew.
IMAGE_SIZED = ["src_h", "src_w", "dst_h", "dst_w", "tiles_m"]


@triton.jit(do_not_specialize=IMAGE_SIZED)
def box_branches_kernel(
    src0,  # (N, 1, H, W, channels), or (N, H / s, s, W / s, s * channels)
    src1,
    src2,
    src3,
    src4,
    src5,
    src6,
    src7,
    flt0,  # (taps, K, C / groups)
    flt1,
    flt2,
    flt3,
    flt4,
    flt5,
    flt6,
    flt7,
    bias0,
    bias1,
    bias2,
    bias3,
    bias4,
    bias5,
    bias6,
    bias7,
    dst0,  # (N, 1, H, W, channels)
    dst1,
    dst2,
    dst3,
    dst4,
    dst5,
    dst6,
    dst7,
    src_h,
    src_w,
    dst_h,
    dst_w,
    tiles_m,
    part_channels,  # of each part: destination channels of a group
    part_groups,
    term_channels,  # of each term: source channels of a group
    axes_h,  # of each term
    axes_w,
    TERMS: tl.constexpr,  # how many, of each part
    FORWARD: tl.constexpr,
    HAS_BIAS: tl.constexpr,  # of each term
    SRC_ROWS: tl.constexpr,  # of each term
    ACC: tl.constexpr,
    PRECISION: tl.constexpr,
    BN: tl.constexpr,
    BP: tl.constexpr,
    BQ: tl.constexpr,
    BLOCK_N: tl.constexpr,  # of each part
    BLOCK_K: tl.constexpr,  # of each term
    GROUP: tl.constexpr,
):
    sources = (src0, src1, src2, src3, src4, src5, src6, src7)
    filters_of = (flt0, flt1, flt2, flt3, flt4, flt5, flt6, flt7)
    biases = (bias0, bias1, bias2, bias3, bias4, bias5, bias6, bias7)
    destinations = (dst0, dst1, dst2, dst3, dst4, dst5, dst6, dst7)
    PIXELS: tl.constexpr = BN * BP * BQ
    boxes_p = tl.cdiv(dst_h, BP)
    boxes_q = tl.cdiv(dst_w, BQ)
    begin = 0
    for part in tl.static_range(len(TERMS)):
        dst_c = part_channels[part]
        tiles_n = tl.cdiv(dst_c, of(BLOCK_N, part))
        per_group = tiles_n * tiles_m
        end = begin + per_group * part_groups[part]
        # loops are only flattened where there are two of them
        for tile in tl.range(first_tile(begin), end, tl.num_programs(0), flatten=TERMS[part] == 1):
            # within a group, GROUP pixel tiles take turns over all filters (for L2)
            group = (tile - begin) // per_group
            index = (tile - begin) % per_group
            band = index // (GROUP * tiles_n)
            band_size = tl.minimum(tiles_m - band * GROUP, GROUP)
            tile_m = band * GROUP + index % (GROUP * tiles_n) % band_size
            channel0 = index % (GROUP * tiles_n) // band_size * of(BLOCK_N, part)
            q0 = tile_m % boxes_q * BQ
            p0 = tile_m // boxes_q % boxes_p * BP
            n0 = tile_m // boxes_q // boxes_p * BN
            last_p = tl.minimum(p0 + BP, dst_h) - 1
            last_q = tl.minimum(q0 + BQ, dst_w) - 1

            acc = tl.zeros((of(BLOCK_N, part), PIXELS), ACC)
            for term in tl.static_range(terms_before(TERMS, part), terms_before(TERMS, part + 1)):
                axis_h = axes_h[term]
                axis_w = axes_w[term]
                src_c = term_channels[term]
                move_h = axis_h.src_tap_step
                move_w = axis_w.src_tap_step
                low_h = axis_h.offset + p0 * axis_h.src_step
                low_w = axis_w.offset + q0 * axis_w.src_step
                high_h = axis_h.offset + last_p * axis_h.src_step
                high_w = axis_w.offset + last_q * axis_w.src_step
                from_h, taps_h = meeting_taps(move_h, low_h, high_h, axis_h.filter, src_h)
                from_w, taps_w = meeting_taps(move_w, low_w, high_w, axis_w.filter, src_w)
                blocks_c = tl.cdiv(src_c, of(BLOCK_K, term))
                for step in tl.range(taps_h * taps_w * blocks_c):
                    tap = step // blocks_c
                    c0 = step % blocks_c * of(BLOCK_K, term)
                    r = from_h + tap // taps_w
                    s = from_w + tap % taps_w
                    h, row = in_steps(axis_h.offset + r * move_h, axis_h.src_step)
                    w, column = in_steps(axis_w.offset + s * move_w, axis_w.src_step)
                    channel = (column * part_groups[part] + group) * src_c + c0
                    if SRC_ROWS[term]:
                        pixels = sources[term].load([n0, p0 + h, row, q0 + w, channel])
                    else:
                        pixels = sources[term].load([n0, 0, p0 + h, q0 + w, channel])
                    pixels = pixels.reshape(PIXELS, of(BLOCK_K, term))
                    filter_tap = r * axis_w.filter + s
                    flt = filters_of[term]
                    if FORWARD:
                        filters = flt.load([filter_tap, group * dst_c + channel0, c0]).reshape(
                            of(BLOCK_N, part), of(BLOCK_K, term)
                        )
                    else:
                        filters = (
                            flt.load([filter_tap, group * src_c + c0, channel0])
                            .reshape(of(BLOCK_K, term), of(BLOCK_N, part))
                            .trans()
                        )
                    acc = matrix_product(filters, pixels.trans(), acc, PRECISION)

            channels = channel0 + tl.arange(0, of(BLOCK_N, part))
            for term in tl.static_range(terms_before(TERMS, part), terms_before(TERMS, part + 1)):
                if HAS_BIAS[term]:
                    bias = biases[term] + group * dst_c
                    acc = finish(acc, bias, bias, bias, channels, channels < dst_c, False, True, ACC)
            dst = destinations[part]
            out = acc.to(dst.dtype).trans().reshape(BN, 1, BP, BQ, of(BLOCK_N, part))
            dst.store([n0, 0, p0, q0, group * dst_c + channel0], out)
        begin = end


def launch(role: Role, terms, strides, config, numerics, programs: int) -> Launch:
    """As `gather_branches.launch`."""
    boxes = [_boxes(role, term, strides, fitted(role, term.geometry, config)) for term in terms]
    first = first_terms(terms)

    def named(name: str | None, place: int) -> str | Box | None:
        """What stands at a place of the kernel's arguments: sources, filters, biases and destinations in turn."""
        which, number = divmod(place, MOST_TERMS)
        if name is None or which == 2:
            return name
        return boxes[first[number] if which == 3 else number][min(which, 2)]._replace(operand=name)

    bn, _, bp, bq = config.box
    arguments: dict[str, Any] = dict(
        **described(role, terms, config),
        tiles_m=tiles.box(role, terms[0].geometry, config).tiles_m,
        SRC_ROWS=tuple(term.geometry.axes(role)[1].src_step > 1 for term in terms),
        ACC=getattr(tl, numerics.accumulator),
        PRECISION=numerics.precision,
        BN=bn,
        BP=bp,
        BQ=bq,
        GROUP=8,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        maxnreg=all_registers(config.num_warps),
    )
    every = tuple(named(name, place) for place, name in enumerate(operands(role, terms)))
    return Launch("box_branches", box_branches_kernel, programs, every, arguments)


def _boxes(role: Role, term, strides, config) -> tuple[Box, Box, Box]:
    """Source, filters and destination of a term as tensor descriptors, of no operand yet."""
    g, forward = term.geometry, role is Role.FPROP
    (src_c, src), (dst_c, dst) = ((g.C, g.input), (g.K, g.output)) if forward else ((g.K, g.output), (g.C, g.input))
    block = (config.BLOCK_N, config.BLOCK_K) if forward else (config.BLOCK_K, config.BLOCK_N)
    x, y = strides if forward else reversed(strides)
    tap = tap_step(g, Strides(x, term.filters, y)) or term.filters[0]
    steps = [axis.src_step for axis in g.axes(role)]
    return (
        stepped("", (g.N, *src), src_c, strides[0], steps, config.box, config.BLOCK_K),
        Box("", (g.taps, g.K, g.C // g.groups), (tap, term.filters[0], 1), (1, *block)),
        stepped("", (g.N, *dst), dst_c, strides[1], (1, 1, 1), config.box, config.BLOCK_N),
    )
