"""The predicted time of a deformable convolution, and the least; as `cost`, whose constants hold here too.

Beside its dot a kernel interpolates: a sample takes four products and their conversions, and a vector of them the
address of each corner. A multiprocessor issues these and dots at the same time; corners come through L1, which hands
out a line a clock. Nobody has measured any of it.
"""

from __future__ import annotations

from math import prod

from .config import ITEM_BYTES, Config
from .cost import (
    ISSUED,
    LANES,
    LATENCY,
    LAUNCH,
    MATRIX_SHARE,
    MEMORY_SHARE,
    MOST_REGISTERS,
    REGISTERS,
    TILE,
    VECTOR_SHARE,
    Prediction,
    Roofline,
    _matrix_rate,
    _vector_rate,
)
from .deform_config import DeformProblem, DeformRole, lists_shape, tiles
from .tiles import ceil_div

# Assumed, as read from compiled main loops where there are such.
SAMPLE = 9  # instructions for four products of a sample, the conversions of its corners and its rounding
CORNER = 8  # instructions for the address, the mask and the load of one corner of a vector of channels
PLACE = 60  # instructions for the offsets of a pixel, its corners and weights
LISTED = 5  # entries of a pixel's list that a tile goes on to: the longest of the tile's, of four on average
LINE = 128  # bytes that L1 hands out in a clock
MISSED = 1.5  # times that a value of x is fetched from L2 for a tap: corners of neighbouring pixels are mostly the same
SORTED = 2e9  # keys a second that a device of 132 multiprocessors sorts
SORTS = 4  # launches between the two of an input gradient


def roofline(p: DeformProblem) -> Roofline:
    """The least time on the device: products of all samples, every tensor moved once, uncached."""
    g, device = p.geometry, p.device
    samples = g.N * prod(g.output) * g.taps * g.C
    flops = 2 * samples * (g.K // g.groups)
    item, of_offset = p.item_bytes, ITEM_BYTES[p.offset_dtype]
    lists, pixels, _ = lists_shape(p)
    placed = lists * pixels * (3 if p.has_mask else 2) * of_offset
    sizes = {name: prod(g.shape(name)) * item for name in ("x", "w", "y")}
    moved = sum(sizes.values()) + placed * (2 if p.role is DeformRole.OFFSET else 1)
    matrix = _matrix_rate(p.dtype, p.precision, device)
    rate = max(matrix, _vector_rate(p.dtype, device))
    times = {
        "matrix rate" if rate == matrix else "vector rate": flops / rate,
        "vector rate": 8 * samples / _vector_rate(p.dtype, device),
        "memory bandwidth": moved / device.bandwidth,
    }
    if rate != matrix:
        times["vector rate"] = (flops + 8 * samples) / rate
    limit = max(times, key=times.__getitem__)
    return Roofline(flops, moved, limit, times[limit])


def predict(p: DeformProblem, config: Config) -> Prediction:
    """The predicted time of the kernels of `p.role`, and of the sort between them."""
    g, device, least, counted = p.geometry, p.device, roofline(p), tiles(p, config)
    item, slots = p.item_bytes, LANES * p.device.clock * p.device.multiprocessors
    K = g.K // g.groups
    read = (p.strides.y if p.role is DeformRole.INPUT else p.strides.x)[1] == 1
    channels = K if p.role is DeformRole.INPUT else p.segment
    vector = max(min(16 // item, channels & -channels), 1) if read else 1

    # how often each sample, and each place, is computed by different programs or steps
    samples = g.N * prod(g.output) * g.taps * g.C
    if p.role is DeformRole.FORWARD:
        again, steps_of_place = counted.tiles_n, ceil_div(p.segment, config.BLOCK_K)
    elif p.role is DeformRole.WEIGHT:
        again, steps_of_place = counted.tiles_n, 1
    elif p.role is DeformRole.OFFSET:
        again, steps_of_place = 1, ceil_div(g.C // p.offset_groups, config.BLOCK_N)
    else:
        samples = g.N * prod(g.input) * g.taps * g.K * (g.C // g.groups // p.segment)
        again, steps_of_place = counted.tiles_n, max(config.BLOCK_K * item // 64, 1)
    corners = LISTED if p.role is DeformRole.INPUT else 4
    each = SAMPLE * corners / 4 + corners * CORNER / vector
    each += PLACE * (LISTED if p.role is DeformRole.INPUT else 1) / (vector * steps_of_place)
    sampling = samples * again * each / (slots * ISSUED)
    lines = samples * again * corners * max(item, 32 / vector if vector > 1 else item)
    fetching = lines / (LINE * device.clock * device.multiprocessors)

    flops = 2 * counted.steps * config.BLOCK_M * config.BLOCK_N * config.BLOCK_K
    matrix = _matrix_rate(p.dtype, p.precision, device) * MATRIX_SHARE if config.dot else 0.0
    multiplying = flops / (matrix or _vector_rate(p.dtype, device) * VECTOR_SHARE)

    registers = min(REGISTERS + held(p, config), MOST_REGISTERS)
    resident = max(min(device.registers // (registers * 32 * config.num_warps), 32), 1)
    waves = ceil_div(counted.total, resident * device.multiprocessors)
    full = counted.total / (ceil_div(counted.total, device.multiprocessors) * device.multiprocessors)
    busy = max(sampling, fetching, multiplying) if matrix else max(sampling + multiplying, fetching)
    loop = max(busy / max(full, 1e-9), waves * counted.longest * LATENCY) + TILE * waves
    bandwidth = device.bandwidth * MEMORY_SHARE
    split, launches = 0.0, 1
    if p.role is DeformRole.INPUT:
        lists, pixels, cells = lists_shape(p)
        split = lists * pixels / (SORTED * device.multiprocessors / 132) + lists * cells * 8 / bandwidth
        launches = 2 + SORTS
    elif config.splits > 1:
        split, launches = prod(g.shape("w")) * 2 * config.splits * max(item, 4) / bandwidth, 2
    l2 = (samples * again * item * MISSED + flops / config.BLOCK_M / 2 * item) / device.l2_bandwidth
    memory = least.bytes / bandwidth
    return Prediction(
        seconds=max(loop, l2, memory) + split + launches * LAUNCH,
        tiles=counted.total,
        waves=waves,
        resident=resident,
        useful=least.flops / max(flops, 1),
        loop_seconds=loop,
        compute_seconds=multiplying,
        l2_seconds=l2,
        memory_seconds=memory,
        split_seconds=split,
        launch_seconds=launches * LAUNCH,
        registers=registers,
    )


def held(p: DeformProblem, config: Config) -> int:
    """Registers of a thread for its accumulator and its samples."""
    rows = {DeformRole.FORWARD: config.BLOCK_K, DeformRole.INPUT: config.BLOCK_K, DeformRole.WEIGHT: config.BLOCK_K}
    sampled = rows.get(p.role, config.BLOCK_N) * config.BLOCK_M
    summed = config.BLOCK_N * (config.BLOCK_K if p.role is DeformRole.WEIGHT else config.BLOCK_M)
    return (summed + 2 * sampled) * max(p.item_bytes, 4) // (4 * 32 * config.num_warps)
