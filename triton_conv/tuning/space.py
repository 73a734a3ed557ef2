"""The configs worth measuring for a plan: what a kernel can be tiled into, within hard limits, likely winners first.

A space is a product of a few sides. What it spans, and why:

* tiles: powers of two from the least side of a dot to the one that covers the problem; past it all is padding;
* stages: more hide more latency, and take shared memory from resident blocks;
* warps: four, which every default has; eight where a tile is at least as large as four warps' largest default. Triton
  has miscompiled loops over taps at eight (pytorch#173068): they may win, once their values have been compared;
* filters_first: where destination channels fill the 64 rows of a warp group's dot;
* splits: slabs that fill the device once, twice and four times, or none; they change no code, so that they cost no
  compilation;
* boxes and runs: those of little waste, which differ in how much neighbours overlap;
* lanes, rows, walk and unroll of depthwise kernels: what a thread holds against how many threads there are.

`cost` knows what shared memory and registers a config wants: those that exceed either are left out.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import fields, replace
from functools import partial
from itertools import product
from math import prod
from typing import Any

from .. import config as configs
from .. import cost, key, tiles, ways
from ..config import ITEM_BYTES, BandedConfig, BoxConfig, Config, DepthwiseConfig, KernelConfig
from ..cost import Prediction
from ..geometry import Role
from ..plan import Plan, with_config
from ..tiles import ceil_div
from ..ways import Problem

MOST = 96  # configs of a way
_PER_TILE = 6  # of these: variants of one tile, whose predicted times hardly differ
_HOPELESS = 4  # times the least predicted time: predictions are not that wrong


def candidates(problem: Problem, p: Plan) -> list[KernelConfig]:
    """The config of a plan, then others of the way that it goes, by predicted time; the same ones for the same plan.

    >>> tried = candidates(problem, plan.make(problem))  # doctest: +SKIP
    """
    return likely(p.config, _SPACES[p.kernel](problem, p), partial(fault, problem, p), partial(_prediction, p))


def fitting(problem: Problem, p: Plan) -> list[KernelConfig]:
    """Every config of the way of a plan that breaks no hard limit, the same list for the same plan."""
    return sorted({c for c in _SPACES[p.kernel](problem, p) if fault(problem, p, c) is None}, key=repr)


def likely(
    rule: KernelConfig,
    others: Iterable[KernelConfig],
    fault: Callable[[Any], str | None],
    predicted: Callable[[Any], Prediction],
) -> list[Any]:
    """A rule's config, then others by predicted time: those without a fault that a multiprocessor has room for."""
    own = predicted(rule)
    fitting = []
    for config in {c for c in others if c != rule}:
        if fault(config) is None:
            prediction = predicted(config)
            # what is kept in registers is an estimate: of the plan's own config compilers have shown that it fits
            if prediction.resident and prediction.registers <= max(cost.MOST_REGISTERS, own.registers):
                fitting.append((prediction.seconds, _differences(config, rule), key.simplicity(config), config))
    fitting.sort(key=lambda one: one[:3])
    chosen: list[KernelConfig] = [rule]
    seen: Counter[tuple] = Counter([_tile(rule)])
    for seconds, _, _, config in fitting:
        kinds = [_tile(config), _WIDE] if config.num_warps > 4 else [_tile(config)]
        room = seen[_tile(config)] < _PER_TILE and (config.num_warps <= 4 or seen[_WIDE] < MOST // 2)
        if len(chosen) < MOST and room and seconds <= _HOPELESS * fitting[0][0]:
            chosen.append(config)
            seen.update(kinds)
    return chosen


def fault(problem: Problem, p: Plan, config: KernelConfig) -> str | None:
    """Which hard limit a config breaks for the kernel of a plan, in words, before anything is compiled."""
    misfit = ways.misfit(problem, p.kernel, p.layout, config)
    if misfit or config.splits == 1:
        return misfit
    steps = cost.TILES[p.kernel](p.role, p.geometry, replace(config, splits=1)).longest
    most = configs.most_splits(p.geometry, steps)
    if config.splits <= most:
        return None
    return f"its {config.splits} slabs are more than the {most} that are worth their workspace"


def _prediction(p: Plan, config: KernelConfig) -> Prediction:
    channels_last = ways.reads_channels_last(p.role, p.strides)
    what = (p.geometry, p.role, p.kernel, config, p.dtype, p.numerics.precision, p.device)
    return cost.predict(*what, channels_last, p.out_dtype, p.numerics.epilogue)


_WIDE = ("eight warps",)
_VARIANTS = {"num_warps", "num_stages", "splits", "programs", "filters_first", "walk", "box"}


def _tile(config: KernelConfig) -> tuple:
    return (config.BLOCK_M, *(getattr(config, f.name) for f in fields(config) if f.name not in _VARIANTS))


def _differences(one: Any, other: Any) -> int:
    """Of equals by prediction, those nearest to what has proved itself come first."""
    return sum(getattr(one, f.name) != getattr(other, f.name) for f in fields(one) if hasattr(other, f.name))


# ---------------------------------------------------------------------------------------------------------------------
# Spaces; some of what they yield breaks a limit


def gather(problem: Any, p: Any) -> Iterator[Config]:
    src, dst = _channels(p)
    pixels, item = prod(tiles.positions(p.role, p.geometry)), ITEM_BYTES[p.dtype]
    if not p.config.dot or src * dst <= _NARROW:
        for m, n, k in product((64, 128, 256, 512), _powers(1, 8, dst), _powers(1, 8, src)):
            for warps in _warps(m * n, 1024):
                yield Config(m, n, k, warps, 2, dot=False)
    if not configs.multiplies_matrices(p.dtype, p.role):
        return
    for flatten in _flattens(src, p.geometry.taps):
        depths = _powers(configs.least_reduction(p.dtype), 256 // item, src * p.geometry.taps if flatten else src)
        for m, n, k in product(_powers(16, 256, pixels), _powers(16, 256, dst), depths):
            for warps, stages, first in product(_warps(m * n), _stages(p), (False, True) if n >= 64 else (False,)):
                yield Config(m, n, k, warps, stages, True, flatten, first)


def _wgrad(problem: Problem, p: Plan) -> Iterator[Config]:
    g = p.geometry
    C, K = g.C // g.groups, g.K // g.groups
    pixels = g.N * prod(g.output)
    if not p.config.dot or C * K <= _NARROW:  # type: ignore[union-attr]
        flat = C < 16
        for m, n, k in product((32, 64, 128, 256), _powers(1, 8, K), _powers(1, 32, C * g.taps if flat else C)):
            for warps in _warps(m * n * k, 8192):
                yield from _sliced(p, Config(m, n, k, warps, 2, dot=False, flatten=flat))
    if not configs.multiplies_matrices(p.dtype, p.role):
        return
    for flatten in _flattens(C, g.taps):
        columns = _powers(16, 256, C * g.taps if flatten else C)
        for m, n, k in product(_powers(16, 128, pixels), _powers(16, 256, K), columns):
            for warps, stages in product(_warps(n * k), _stages(p)):
                yield from _sliced(p, Config(m, n, k, warps, stages, True, flatten))


def box(problem: Any, p: Any) -> Iterator[BoxConfig]:
    (src, dst), counts = _channels(p), tiles.positions(p.role, p.geometry)
    row = 128 // ITEM_BYTES[p.dtype]  # of shared memory, as the copy engine swizzles it
    depths = _powers(max(configs.least_reduction(p.dtype), row // 4), 2 * row, src)
    boxes = [box for size in (32, 64, 128, 256) for box in configs.boxes_of_little_waste(counts, size)[:3]]
    for box, n, k in product(boxes, _powers(16, 256, dst), depths):
        for warps, stages, programs in product(_warps(prod(box) * n), (2, 3, 4, 5, 6), (1, 2)):
            if max(box) <= 256:
                yield BoxConfig(box, n, k, warps, stages, programs)


def _box_wgrad(problem: Problem, p: Plan) -> Iterator[BoxConfig]:
    g = p.geometry
    runs = configs.runs_of_little_waste((g.N, *g.output), longest=128)
    for run, n, k in product(runs, _powers(16, 256, g.K // g.groups), _powers(16, 256, g.C // g.groups)):
        for warps, stages in product(_warps(n * k), (2, 3, 4, 5, 6)):
            yield from _sliced(p, BoxConfig(run, n, k, warps, stages))


def _depthwise(problem: Problem, p: Plan) -> Iterator[DepthwiseConfig]:
    g, (_, R, S) = p.geometry, p.geometry.filter
    side_by_side = p.strides.x[1] == p.strides.y[1] == 1
    rule = configs.default_depthwise(g, p.role, p.dtype, side_by_side, p.device)
    wgrad = p.role is Role.WGRAD
    _, _, rows_there, columns_there = tiles.positions(Role.FPROP if wgrad else p.role, g)
    dst = g.C if p.role is Role.DGRAD else g.K
    rows = [r for r in sorted({rule.rows, 1, 2, 4, 8}) if r <= rows_there]
    unrolls = {rule.unroll, (R, S), (1, S), (R, 1), (1, 1)}
    if side_by_side:
        channels, vectors, columns = _around(rule.channels, dst), {rule.vector, max(rule.vector // 2, 1)}, [1]
    else:
        channels, vectors = _around(rule.channels, dst), {rule.vector}
        columns = _around(rule.columns, columns_there) if rule.columns > 1 else [1]
    for row, column, vector, channel, unroll in product(rows, columns, sorted(vectors), channels, sorted(unrolls)):
        if row * column * prod(unroll) > configs.UNROLLED:
            continue
        for walk, times, warps in product(sorted({rule.walk, 1, 2, 4}), (1, 2), (4, 8)):
            values = times * (configs.THREADS * warps // 4) * (vector if side_by_side else 1)
            if values < channel or (walk > 1 and walk * row >= 2 * rows_there):
                continue
            config = DepthwiseConfig(row, column, values // channel, channel, vector, unroll, walk, warps)
            yield from _sliced(p, config) if wgrad else (config,)


def _banded(problem: Problem, p: Plan) -> Iterator[BandedConfig]:
    g, wgrad = p.geometry, p.role is Role.WGRAD
    source, (_, P, Q) = (g.output, g.input) if p.role is Role.DGRAD else (g.input, g.output)
    heights, chunks = _powers(1, 8, g.filter[1] if wgrad else P), _powers(16, 128, source[2])
    taps = min(_powers(16, tiles.BANDED_TAPS, g.filter[2])[-1], tiles.BANDED_TAPS)
    for height, columns, chunk, size in product(heights, _powers(16, 128, Q), chunks, (16, 32, 64, 128)):
        if wgrad and height * taps > 256:  # sums that a program gathers, in registers
            continue
        blocks = configs.most_images((g.N, P if wgrad else ceil_div(P, height), ceil_div(Q, columns)), size)
        for warps, stages in product(_warps(height * columns * (chunk if wgrad else size)), (2, 3, 4)):
            config = BandedConfig(blocks, height, columns, chunk, warps, stages)
            yield from _sliced(p, config) if wgrad else (config,)


_SPACES: dict[str, Callable[[Problem, Plan], Iterable[KernelConfig]]] = {
    "gather": gather,
    "wgrad": _wgrad,
    "box": box,
    "box_wgrad": _box_wgrad,
    "depthwise": _depthwise,
    "depthwise_wgrad": _depthwise,
    "banded": _banded,
    "banded_wgrad": _banded,
}

# Products of a group's input and output channels up to which sums without a dot may be quicker than a dot of padding.
_NARROW = 32


def _channels(p: Plan) -> tuple[int, int]:
    """(source, destination) channels of a group, of fprop or dgrad."""
    sides = p.geometry.C // p.geometry.groups, p.geometry.K // p.geometry.groups
    return sides if p.role is Role.FPROP else sides[::-1]


def _powers(least: int, most: int, extent: int) -> list[int]:
    """Powers of two from `least` to the one that covers extent, or `most`."""
    found = [least]
    while found[-1] < min(extent, most):
        found.append(2 * found[-1])
    return found


def _around(side: int, extent: int) -> list[int]:
    """Half of a power of two, itself, and twice it while the extent is not covered."""
    return sorted({max(side // 2, 1), side, 2 * side if side < extent else side})


def _warps(elements: int, enough: int = configs.LARGEST_TILE) -> tuple[int, ...]:
    return (4, 8) if elements >= enough else (4,)


def _stages(p: Plan) -> tuple[int, ...]:
    """Of loads by pointer, of which only whole vectors are copied ahead."""
    whole = ways.reads_channels_last(p.role, p.strides) and tiles.whole_vectors(p.geometry)
    return (2, 3, 4, 5) if whole else (2, 3)


def _flattens(reduction: int, taps: int) -> tuple[bool, ...]:
    """Pairs of tap and channel are worth walking where a tap's channels leave a step of 32 idle."""
    return (False, True) if taps > 1 and reduction < 32 else (False,)


def _sliced(p: Plan, config: Any) -> Iterator[Any]:
    """A weight gradient's config in one slab, and in so many that programs fill the device once, twice, four times."""
    whole = cost.TILES[p.kernel](Role.WGRAD, p.geometry, config)
    most = configs.most_splits(p.geometry, whole.longest)
    for splits in {1, *(min(ceil_div(n * p.device.multiprocessors, max(whole.total, 1)), most) for n in (1, 2, 4))}:
        yield replace(config, splits=splits)


def plans(problem: Problem, ways_of_it: Iterable[Plan]) -> list[Plan]:
    """The plans to measure: of every way its own first, then those of all candidates, by predicted time of everything.

    Plans are of the problem; copies and folds around a kernel count.
    """
    first, others = [], []
    for p in ways_of_it:
        first.append(p)
        others += [with_config(problem, p, config) for config in candidates(problem, p)[1:]]
    return [*first, *sorted(others, key=lambda p: p.seconds)]
