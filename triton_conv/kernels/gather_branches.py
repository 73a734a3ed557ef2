"""Several convolutions in one launch, by gathering: pointer arithmetic, for any strides, dtype and stride.

    term   a convolution of a slice of the source's channels with filters of its own
    part   a slice of the destination's channels: a sum over terms, which agree on groups, stride and extents

Concatenated branches are parts of one term each; summed branches are terms of one part; the input gradient of branches
has a part for each slice of the input, and a term for each branch that reads it. Forward or not, terms are what
`gather` computes, in its words. A slice is an operand of its own, which starts at its first channel.

Programs are persistent: the tiles of all parts make up one list, in which a program takes every num_programs-th.
Filter rows and columns none of whose taps meets the input from within a tile are left out.
"""

from __future__ import annotations

from itertools import chain, pairwise
from typing import Any

import triton
import triton.language as tl

from .. import tiles
from ..branches_problem import MOST_TERMS, channels_of, fitted
from ..geometry import Role
from .epilogue import finish
from .indexing import (
    channel_block,
    filter_vectors,
    in_vectors,
    matrix_product,
    power_of_two_in,
    read_position,
    residue_class,
)
from .launch import Launch, all_registers

# What changes with the image must not be specialised, or every image size would be compiled anew.
IMAGE_SIZED = ["N", "src_h", "src_w", "dst_h", "dst_w", "src_sn", "src_sh", "dst_sn", "dst_sh", "tiles_m"]
UNALIGNED = ["src_sc", "dst_sc"]


@triton.constexpr_function
def of(values, place):
    """An entry of a tuple of constants, as a shape can have it."""
    return values[place]


@triton.constexpr_function
def terms_before(terms, part):
    """The number of the first term of a part."""
    return sum(terms[:part])


@triton.jit
def first_tile(begin):
    """The first of the tiles begin, begin + 1, ... that is this program's."""
    programs = tl.num_programs(0)
    return begin + (tl.program_id(0) + programs - begin % programs) % programs


@triton.jit
def meeting_taps(step, lowest, highest, taps, extent):
    """(first, count) of the taps j at which one of the positions lowest ... highest, plus j * step, is in [0, extent).

    Of several taps at least one, so that every tile has a step of its main loop.
    """
    up = step > 0
    size = tl.where(up, step, -step)
    least = tl.where(up, -highest, lowest - extent + 1)  # a tap has to move the positions so far, and no farther than:
    most = tl.where(up, extent - 1 - lowest, highest)
    first = tl.minimum(tl.cdiv(tl.maximum(least, 0), size), tl.maximum(taps - 1, 0))
    last = tl.minimum(tl.maximum(most, 0) // size, taps - 1)
    return first, tl.minimum(tl.maximum(last - first + 1, 1), taps)


@triton.jit(do_not_specialize=IMAGE_SIZED, do_not_specialize_on_alignment=UNALIGNED)
def gather_branches_kernel(
    src0,
    src1,
    src2,
    src3,
    src4,
    src5,
    src6,
    src7,
    flt0,
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
    dst0,
    dst1,
    dst2,
    dst3,
    dst4,
    dst5,
    dst6,
    dst7,
    N,
    # extents of source and destination, and strides, all but the channel's in units of SRC_VEC or DST_VEC elements
    src_h,
    src_w,
    dst_h,
    dst_w,
    src_sn,
    src_sc,
    src_sh,
    src_sw,
    dst_sn,
    dst_sc,
    dst_sh,
    dst_sw,
    tiles_m,
    part_channels,  # of each part: destination channels of a group
    part_groups,
    term_channels,  # of each term: source channels of a group
    flt_strides,  # of each term: of group, k, c and the two taps, all but c's in units of FLT_VEC elements
    axes_h,  # of each term
    axes_w,
    TERMS: tl.constexpr,  # how many, of each part
    FORWARD: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    SRC_VEC: tl.constexpr,
    DST_VEC: tl.constexpr,
    FLT_VEC: tl.constexpr,  # of each term
    SRC_C_VEC: tl.constexpr,  # of each term
    DST_C_VEC: tl.constexpr,  # of each part
    INDEX: tl.constexpr,
    ACC: tl.constexpr,
    PRECISION: tl.constexpr,
    FILTERS_FIRST: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,  # of each part
    BLOCK_K: tl.constexpr,  # of each term
):
    sources = (src0, src1, src2, src3, src4, src5, src6, src7)
    filters_of = (flt0, flt1, flt2, flt3, flt4, flt5, flt6, flt7)
    biases = (bias0, bias1, bias2, bias3, bias4, bias5, bias6, bias7)
    destinations = (dst0, dst1, dst2, dst3, dst4, dst5, dst6, dst7)
    phases_h = axes_h[0].phases
    phases_w = axes_w[0].phases
    u_h = tl.cdiv(dst_h, phases_h)
    u_w = tl.cdiv(dst_w, phases_w)
    begin = 0
    for part in tl.static_range(len(TERMS)):
        dst_c = part_channels[part]
        tiles_n = tl.cdiv(dst_c, of(BLOCK_N, part))
        end = begin + tiles_n * tiles_m * part_groups[part] * phases_h * phases_w
        for tile in range(first_tile(begin), end, tl.num_programs(0)):
            index = tile - begin
            tile_n = index % tiles_n
            tile_m = index // tiles_n % tiles_m
            rest = index // tiles_n // tiles_m
            phase_w = rest % phases_w
            phase_h = rest // phases_w % phases_h
            group = (rest // phases_w // phases_h).to(INDEX)

            # the tile's pixels: positions u within the residue class, then where they lie in the destination
            m0 = tile_m.to(INDEX) * BLOCK_M
            m = m0 + tl.arange(0, BLOCK_M)  # [BLOCK_M]
            uw = m % u_w
            uh = m // u_w % u_h
            n = m // u_w // u_h
            oh = phase_h + uh * phases_h
            ow = phase_w + uw * phases_w
            pixel_valid = (n < N) & (oh < dst_h) & (ow < dst_w)
            n = tl.where(pixel_valid, n, 0)
            image = (n * src_sn)[None, :]
            pixel_valid_row = pixel_valid[None, :]
            # its rows, and its columns if that is one row: all, if it runs on into the next image, or row
            last = m0 + BLOCK_M - 1
            one_image = m0 // u_w // u_h == last // u_w // u_h
            one_row = m0 // u_w == last // u_w
            first_h = tl.where(one_image, m0 // u_w % u_h, 0)
            last_h = tl.where(one_image, last // u_w % u_h, u_h - 1)
            first_w = tl.where(one_row, m0 % u_w, 0)
            last_w = tl.where(one_row, last % u_w, u_w - 1)

            channel, channel_valid = channel_block(
                tile_n * of(BLOCK_N, part), dst_c, of(BLOCK_N, part), DST_C_VEC[part]
            )  # [BLOCK_N]
            wide_channel = channel.to(INDEX)[None, :]
            if FILTERS_FIRST:
                acc = tl.zeros((of(BLOCK_N, part), BLOCK_M), ACC)
            else:
                acc = tl.zeros((BLOCK_M, of(BLOCK_N, part)), ACC)
            for term in tl.static_range(terms_before(TERMS, part), terms_before(TERMS, part + 1)):
                axis_h = axes_h[term]
                axis_w = axes_w[term]
                src_c = term_channels[term]
                sg, sk, sc, sr, ss = flt_strides[term]
                src = sources[term] + group * (src_c // SRC_C_VEC[term] * SRC_C_VEC[term]) * src_sc
                flt = filters_of[term] + group * sg * FLT_VEC[term]
                source_h, taps_h, tap_h = residue_class(axis_h, phase_h)
                source_w, taps_w, tap_w = residue_class(axis_w, phase_w)
                low_h = source_h + first_h * axis_h.src_step
                low_w = source_w + first_w * axis_w.src_step
                high_h = source_h + last_h * axis_h.src_step
                high_w = source_w + last_w * axis_w.src_step
                from_h, taps_h = meeting_taps(axis_h.src_tap_step, low_h, high_h, taps_h, src_h)
                from_w, taps_w = meeting_taps(axis_w.src_tap_step, low_w, high_w, taps_w, src_w)
                base_h = (source_h + from_h * axis_h.src_tap_step + uh * axis_h.src_step)[None, :]  # [1, BLOCK_M]
                base_w = (source_w + from_w * axis_w.src_tap_step + uw * axis_w.src_step)[None, :]
                tap_h += from_h * axis_h.tap_step
                tap_w += from_w * axis_w.tap_step
                per_w = tl.maximum(taps_w, 1)  # a class without taps must not divide by zero
                blocks_c = tl.cdiv(src_c, of(BLOCK_K, term))
                for step in range(taps_h * taps_w * blocks_c):
                    tap = step // blocks_c
                    jh = (tap // per_w).to(INDEX)
                    jw = (tap % per_w).to(INDEX)
                    c, k_valid = channel_block(
                        step % blocks_c * of(BLOCK_K, term), src_c, of(BLOCK_K, term), SRC_C_VEC[term]
                    )
                    c = c.to(INDEX)[:, None]  # [BLOCK_K, 1]
                    k_valid = k_valid[:, None]
                    h, valid_h = read_position(base_h + jh * axis_h.src_tap_step, src_h, pixel_valid_row, 0)
                    w, valid_w = read_position(base_w + jw * axis_w.src_tap_step, src_w, pixel_valid_row, 0)
                    row = (image + h * src_sh + w * src_sw) * SRC_VEC
                    # tails in pixels and in channels, and zeros around the image
                    valid = k_valid & valid_h & valid_w
                    pixels = tl.load(src + row + c * src_sc, mask=valid, other=0.0)  # [BLOCK_K, BLOCK_M]
                    taps = (tap_h + jh * axis_h.tap_step) * sr + (tap_w + jw * axis_w.tap_step) * ss
                    if FORWARD:
                        offset = (taps + wide_channel * sk) * FLT_VEC[term] + c * sc
                    else:
                        offset = (taps + c * sk) * FLT_VEC[term] + wide_channel * sc
                    filters = tl.load(flt + offset, mask=k_valid & channel_valid[None, :], other=0.0)
                    if FILTERS_FIRST:
                        acc = matrix_product(filters.trans(), pixels, acc, PRECISION)
                    else:
                        acc = matrix_product(pixels.trans(), filters, acc, PRECISION)
            if not FILTERS_FIRST:
                acc = acc.trans()
            for term in tl.static_range(terms_before(TERMS, part), terms_before(TERMS, part + 1)):
                if HAS_BIAS[term]:
                    bias = biases[term] + group * dst_c
                    acc = finish(acc, bias, bias, bias, channel, channel_valid, False, True, ACC)
            dst = destinations[part]
            out = acc.to(dst.dtype.element_ty)  # [BLOCK_N, BLOCK_M]
            row = (n * dst_sn + oh * dst_sh + ow * dst_sw) * DST_VEC
            column = (group * (dst_c // DST_C_VEC[part] * DST_C_VEC[part]) + channel) * dst_sc
            tl.store(dst + row[None, :] + column[:, None], out, mask=channel_valid[:, None] & pixel_valid_row)
        begin = end


def launch(role: Role, terms, strides, config, numerics, programs: int) -> Launch:
    """FPROP or DGRAD of `terms` (`branches_problem.Term`), those of a part one after the other.

    `strides` are those of the tensors that slices are of: (source's, destination's).
    """
    src_vec, (src_sn, src_sc, _, src_sh, src_sw) = in_vectors(strides[0])
    dst_vec, (dst_sn, dst_sc, _, dst_sh, dst_sw) = in_vectors(strides[1])
    vectors = [filter_vectors(term.geometry, term.filters) for term in terms]
    shared = described(role, terms, config)
    arguments: dict[str, Any] = dict(
        N=terms[0].geometry.N,
        src_sn=src_sn,
        src_sc=src_sc,
        src_sh=src_sh,
        src_sw=src_sw,
        dst_sn=dst_sn,
        dst_sc=dst_sc,
        dst_sh=dst_sh,
        dst_sw=dst_sw,
        **shared,
        tiles_m=tiles.gather(role, terms[0].geometry, config).tiles_m,
        flt_strides=tuple((sg, sk, sc, sr, ss) for _, (sg, sk, sc, _, sr, ss) in vectors),
        SRC_VEC=src_vec,
        DST_VEC=dst_vec,
        FLT_VEC=tuple(vec for vec, _ in vectors),
        SRC_C_VEC=tuple(map(power_of_two_in, shared["term_channels"])),  # at most 16, which no block is below
        DST_C_VEC=tuple(map(power_of_two_in, shared["part_channels"])),
        INDEX=getattr(tl, f"int{numerics.index_bits}"),
        ACC=getattr(tl, numerics.accumulator),
        PRECISION=numerics.precision,
        FILTERS_FIRST=config.filters_first,
        BLOCK_M=config.BLOCK_M,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        maxnreg=all_registers(config.num_warps),
    )
    return Launch("gather_branches", gather_branches_kernel, programs, operands(role, terms), arguments)


def described(role: Role, terms, config) -> dict[str, Any]:
    """The arguments of both kernels that say what terms and parts are, and their blocks of channels."""
    g = terms[0].geometry
    (_, src_h, src_w), (_, dst_h, dst_w) = (g.input, g.output) if role is Role.FPROP else (g.output, g.input)
    channels = [channels_of(role, term.geometry) for term in terms]
    axes = [term.geometry.axes(role) for term in terms]
    first = first_terms(terms)
    blocks = [fitted(role, term.geometry, config) for term in terms]
    return {
        "src_h": src_h,
        "src_w": src_w,
        "dst_h": dst_h,
        "dst_w": dst_w,
        "part_channels": tuple(channels[term][1] for term in first),
        "part_groups": tuple(terms[term].geometry.groups for term in first),
        "term_channels": tuple(src for src, _ in channels),
        "axes_h": tuple(axis_h for _, axis_h, _ in axes),
        "axes_w": tuple(axis_w for _, _, axis_w in axes),
        "TERMS": tuple(end - begin for begin, end in pairwise((*first, len(terms)))),
        "FORWARD": role is Role.FPROP,
        "HAS_BIAS": tuple(term.has_bias for term in terms),
        "BLOCK_N": tuple(blocks[term].BLOCK_N for term in first),
        "BLOCK_K": tuple(block.BLOCK_K for block in blocks),
    }


def first_terms(terms) -> list[int]:
    """The place of each part's first term."""
    parts = [term.part for term in terms]
    return [place for place, part in enumerate(parts) if part not in parts[:place]]


def operands(role: Role, terms) -> tuple[str | None, ...]:
    """The names of sources, filters, biases and destinations, MOST_TERMS of each, None for those that are not there."""
    src, dst = ("x", "y") if role is Role.FPROP else ("y", "x")
    columns = (
        [f"{src}{term.number}" for term in terms],
        [f"w{term.number}" for term in terms],
        [f"bias{term.number}" if term.has_bias else None for term in terms],
        [f"{dst}{terms[place].part}" for place in first_terms(terms)],
    )
    return tuple(chain.from_iterable((*names, *(None,) * (MOST_TERMS - len(names))) for names in columns))
