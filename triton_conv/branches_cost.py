"""The predicted time of several convolutions in one launch; rates, steps and waves are those of `cost`.

Taps that meet no input from anywhere in a tile are no steps, as in the kernels (`meeting_taps`).
"""

from __future__ import annotations

from math import inf, prod

from . import cost, tiles
from .branches_problem import Problem, Term, fitted
from .config import ITEM_BYTES, BoxConfig, Config
from .cost import Prediction, Roofline
from .epilogue import PLAIN
from .geometry import Axis, Role
from .tiles import Tiles, ceil_div


def roofline(problem: Problem) -> Roofline:
    """The least time of all terms, each tensor moved once."""
    p, item = problem, ITEM_BYTES[problem.dtype]
    alone = [cost.roofline(t.geometry, p.role, p.dtype, p.precision, p.device) for t in p.terms]
    computing = [part.flops / max(rate, 1.0) for part, rate in zip(alone, map(_rate(p), p.terms), strict=True)]
    read, written = ("x", "y") if p.role is Role.FPROP else ("y", "x")
    parts = {t.part: prod(t.geometry.shape(written)) for t in p.terms}
    sources = max(prod(t.geometry.shape(read)) for t in p.terms)
    filters = sum(prod(t.geometry.shape("w")) for t in p.terms)
    moved = (sum(parts.values()) + sources + filters) * item
    moving = moved / p.device.bandwidth
    slowest = sum(computing)
    limit = next((part.limit for part in alone if part.limit != "memory bandwidth"), "matrix rate")
    limit = "memory bandwidth" if moving >= slowest else limit
    return Roofline(sum(part.flops for part in alone), moved, limit, max(moving, slowest))


def _rate(p: Problem):
    """Flops a second that a term can be multiplied at."""
    vector = cost._vector_rate(p.dtype, p.device)
    matrix = cost._matrix_rate(p.dtype, p.precision, p.device)
    return lambda term: max(matrix * cost._fill(term.geometry, p.role), vector)


def steps(problem: Problem, term: Term, config: Config | BoxConfig) -> Tiles:
    """Tiles of a term's part, and the steps that the term takes in them."""
    g, role = term.geometry, problem.role
    config = fitted(role, g, config)
    counted = (tiles.box if isinstance(config, BoxConfig) else tiles.gather)(role, g, config)
    axes = g.axes(role)
    if any(axis.phases > 1 for axis in axes):
        return counted  # every tap of a residue class
    _, _, rows, columns = tiles.positions(role, g)
    if isinstance(config, BoxConfig):
        _, _, bp, bq = config.box
    else:  # tiles of whole rows, as nearly as they are
        bp, bq = max(config.BLOCK_M // max(columns, 1), 1), min(columns, config.BLOCK_M)
    source = g.input if role is Role.FPROP else g.output
    taps_h = _met(axes[1], rows, bp, source[1])
    taps_w = _met(axes[2], columns, bq, source[2])
    reduction = ceil_div((g.C if role is Role.FPROP else g.K) // g.groups, config.BLOCK_K)
    of_an_image = sum(taps_h) * sum(taps_w) / (len(taps_h) * len(taps_w)) * reduction
    whole = max(taps_h) * max(taps_w) * reduction
    return counted._replace(steps=round(counted.total * of_an_image), longest=whole)


def _met(axis: Axis, positions: int, block: int, extent: int) -> list[int]:
    """`kernels.gather_branches.meeting_taps` of each block of positions along an axis."""
    found = []
    for start in range(0, positions, block):
        low = axis.offset + start * axis.src_step
        high = axis.offset + (min(start + block, positions) - 1) * axis.src_step
        moved = (j * axis.src_tap_step for j in range(axis.filter))
        met = [j for j, by in enumerate(moved) if high + by >= 0 and low + by < extent]
        found.append(max(len(met), 1))
    return found or [1]


def predict(problem: Problem, kernel: str, config: Config | BoxConfig) -> Prediction:
    """The predicted time of "gather_branches" or "box_branches"."""
    p, device, item = problem, problem.device, ITEM_BYTES[problem.dtype]
    channels_last = (p.x if p.role is Role.FPROP else p.y)[1] == 1
    tiles_of: dict[int, int] = {}
    longest: dict[int, int] = {}
    every, busy_seconds, multiplying_seconds, fetched, flops = 0, 0.0, 0.0, 0.0, 0
    for term in p.terms:
        found = steps(p, term, config)
        tiles_of[term.part] = found.total
        longest[term.part] = longest.get(term.part, 0) + found.longest
        step = cost._step(
            p.role, term.geometry, fitted(p.role, term.geometry, config), item, item, channels_last, PLAIN
        )
        _, registers = cost._residents(config, step, p.dtype, device)
        multiplying, busy = cost._busy(step, registers, p.dtype, p.precision, device)
        every += found.steps
        busy_seconds += found.steps * busy
        multiplying_seconds += found.steps * multiplying
        fetched += found.steps * step.bytes
        flops += found.steps * step.flops
    widest = max(p.terms, key=lambda term: term.geometry.flops).geometry
    step = cost._step(p.role, widest, config, item, item, channels_last, PLAIN)  # what a program has room for
    resident, registers = cost._residents(config, step, p.dtype, device)
    whole = Tiles(sum(tiles_of.values()), 1, 1, every, max(longest.values()))
    waves, loop = cost._waves(whole, busy_seconds / max(every, 1), step, resident, device) if resident else (0, inf)
    restarts = len(p.terms) - len(tiles_of)  # the pipeline of a sum starts anew with each term
    loop += cost.LATENCY * restarts * max(waves, 1)
    fetching, least = fetched / device.l2_bandwidth, roofline(p)
    again = cost._read_again(p.role, widest, step, item, 1, 1, device)
    memory = (least.bytes + again) / (device.bandwidth * cost.MEMORY_SHARE)
    return Prediction(
        seconds=max(loop, fetching, memory) + cost.LAUNCH,
        tiles=whole.total,
        waves=waves,
        resident=resident,
        useful=least.flops / max(flops, 1),
        loop_seconds=loop,
        compute_seconds=multiplying_seconds,
        l2_seconds=fetching,
        memory_seconds=memory,
        registers=registers,
    )
