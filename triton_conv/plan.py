"""Every dispatch decision, as a pure function of numbers: geometry, role, dtype, strides and device in, plan out.

A plan prints itself (`str(plan)`); `triton-conv explain` shows it without a GPU.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator
from dataclasses import replace
from functools import lru_cache
from math import prod

from . import backends, choose, invariance, recovery, stored, tiles, ways
from . import config as configs
from .config import ITEM_BYTES, BandedConfig, BoxConfig, DepthwiseConfig, KernelConfig, Numerics
from .conv_plan import WRITTEN, Fold
from .conv_plan import Plan as Plan
from .epilogue import PLAIN
from .geometry import ConvGeometry, Role, Strides
from .ways import Problem, Way, dense_strides

# Accumulators by dtype; a dtype that is not here has no kernel. Complex runs as real convolutions.
ACCUMULATORS = {
    "float8_e4m3fn": "float32",
    "float16": "float32",
    "bfloat16": "float32",
    "float32": "float32",
    "float64": "float64",
    "uint8": "int32",
    "int8": "int32",
    "int16": "int32",
    "int32": "int32",
    "int64": "int64",
}


def make(problem: Problem) -> Plan:
    """The plan of a problem; the second time it is a look-up."""
    batch = invariance.batch()
    explicit, rivals = configs.chosen(problem.role), batch is None and backends.admits(problem)
    return _make(problem, explicit, rivals, stored.generation(), None if problem.role is Role.WGRAD else batch)


def settings() -> Hashable:
    """What decides beside a problem which plan `make` returns: another value wherever another plan may be.

    How float32 is multiplied is no part of it: problems name their precision.
    """
    return configs.all_chosen(), backends.settings(), stored.generation(), invariance.batch()


@lru_cache(maxsize=4096)
def _make(
    problem: Problem, explicit: KernelConfig | None, rivals: bool, _generation: Hashable, batch: int | None
) -> Plan:
    if explicit is not None:
        return choice(every(problem, explicit))
    if batch is not None:
        alike = _of_batch(problem, batch)
        return recovery.first(problem, (_as_of(problem, model, batch) for model in _candidates(alike, False)))
    return recovery.first(problem, _candidates(problem, rivals))


def _candidates(problem: Problem, rivals: bool) -> Iterator[Plan]:
    """The plans of a problem in the order in which they are tried: each is for where those before it cannot run.

    After the best one come its way with configs from other places, then the other ways, at last gathering without
    copies: each with as many slabs as its config says, then with fewer, and at last with small tiles.
    """
    found = every(problem)
    best = choice(found)
    if rivals:
        yield _or_rival(best, found)
    yield best
    for like in (best, *sorted(found, key=lambda p: p.seconds)):
        for again in recovery.sources(lambda: every(problem)):
            for p in again:
                if (p.kernel, p.packs, p.bundle) == (like.kernel, like.packs, like.bundle):
                    yield p
                    yield from _leaner(problem, p)
    original, strides = _unfolded(problem)
    inner = problem if original is problem.geometry else problem._replace(epilogue=PLAIN)
    way = ways.gathered(inner, original, strides, _bias_on_c(problem, original))
    last = _assembled(problem, original, strides, way)
    yield last
    yield from _leaner(problem, last)


def _leaner(problem: Problem, p: Plan) -> Iterator[Plan]:
    """The same way with fewer slabs, then with the smallest config."""
    small = choose.smallest(p.config, problem.dtype)
    for config in (*choose.fewer_slabs(p.config), small, *choose.fewer_slabs(small)):
        if not ways.misfit(problem, p.kernel, p.layout, config):
            yield with_config(problem, p, config)


def _or_rival(best: Plan, found: list[Plan]) -> Plan:
    """The best plan; where others' kernels were measured to be quicker, by more than a tie, one that they run.

    A way without copies is asked for its rival: one with copies is filed with operands that lie so from the start.
    """
    given = next((p for p in found if p.rival is not None and not p.packs), None)
    ours, theirs = best.measured_seconds, given.rival if given else None
    if given is None or ours is None or theirs is None or theirs * (1 + stored.TIE) >= ours:
        return best
    name = given.rival_name
    reason = f"{name}, {1e6 * theirs:.3g} us measured against {1e6 * ours:.3g} us of {best.kernel}"
    return replace(best, reason=reason, rival_name=name, rival_runs=True)


def _of_batch(problem: Problem, batch: int) -> Problem:
    """The same problem of so many samples, side by side in memory."""
    g, s = problem.geometry, problem.strides
    x, y = ((span((1, *g.shape(name)[1:]), strides), *strides[1:]) for name, strides in (("x", s.x), ("y", s.y)))
    return problem._replace(geometry=replace(g, N=batch), strides=Strides(x, s.w, y))


def _as_of(problem: Problem, model: Plan, batch: int) -> Plan:
    """The plan of a problem that goes the way of that of another batch."""
    original, strides = _unfolded(problem)
    why = f"{model.reason}; chosen for a batch of {batch}"
    inner = model.layout._replace(steps=())
    way = ways.alike(problem, original, strides, _bias_on_c(problem, original), model.kernel, inner, model.config, why)
    return _assembled(problem, original, strides, way)


def choice(found: list[Plan]) -> Plan:
    """Of the plans of all ways the one to run: measured to be quickest where all were, else by predicted times."""
    if len(found) > 1 and all(p.measured is not None for p in found):
        quickest, *slower = sorted(found, key=lambda p: p.measured_seconds or 0.0)
        return _against(quickest, slower[0])
    first, others = found[0], found[1:]
    best = min(others, key=lambda p: p.seconds, default=first)
    if best.seconds < choose.WORTH_LEAVING * first.seconds:
        return _against(best, first)
    return _against(first, best) if others else first


def every(problem: Problem, explicit: KernelConfig | None = None) -> list[Plan]:
    """The plans of all ways to run a problem, the plainest first; `make` chooses among them.

    Raises NotImplementedError for a dtype that the device has no arithmetic of.
    """
    if problem.dtype == "float8_e4m3fn" and problem.device.capability < 89:
        raise NotImplementedError(
            f"{problem.device.name} has no float8_e4m3fn arithmetic, which came with compute capability 8.9: "
            f"{problem.geometry}"
        )
    original, strides = _unfolded(problem)
    # what a fold writes has the epilogue, not what it reads
    inner = problem if original is problem.geometry else problem._replace(epilogue=PLAIN)
    found = ways.of(inner, original, strides, _bias_on_c(problem, original), explicit)
    return [_assembled(problem, original, strides, way) for way in found]


def counted(role: Role, g: ConvGeometry, config: KernelConfig) -> None:
    """Raises NotImplementedError for what kernels would lose count of in 32 bits, whatever the width of offsets."""
    sizes = {
        "channels": max(g.C, g.K),
        "products of a sum": max(g.C, g.K) // g.groups * g.taps,
        "tiles": 0,
        "positions from a residue class of the stride to its first tap": 0,
    }
    if isinstance(config, BoxConfig):
        runs = prod(tiles.blocks((g.N, *g.output), config.box))
        sizes["tiles"] = runs if role is Role.WGRAD else tiles.box(role, g, config).total
    for axis, extent in zip(g.axes(role), g.input, strict=True):
        if axis.phases > 1:
            if extent < 2**31 <= extent + axis.phases:  # longer ones are numbers of 64 bits
                sizes["positions and the residue classes behind them"] = extent + axis.phases
            reach = axis.phases + axis.offset
            found = max(reach // axis.common * axis.inverse, reach - axis.tap_step * axis.src_tap_step * axis.common)
            sizes["positions from a residue class of the stride to its first tap"] = found
            if found >= tiles.COUNTED:
                break
    for what, size in sizes.items():
        if size >= tiles.COUNTED:
            raise NotImplementedError(f"{size} {what} are more than kernels count in 32 bits: {g}")


def _bias_on_c(problem: Problem, original: ConvGeometry) -> bool:
    """Whether the kernel adds a bias, or has a scale, that is indexed by C."""
    indexed = problem.has_bias or problem.epilogue.scale
    return indexed and problem.role is Role.DGRAD and original is problem.geometry


def with_config(problem: Problem, p: Plan, config: KernelConfig) -> Plan:
    """The plan of a problem that goes the way of another one of it, with this config."""
    layout = p.layout._replace(steps=p.steps[len(_own_steps(problem, p.packs, p.fold is not None)) :])
    way = Way(p.kernel, layout, config, "config given for this way")
    return _assembled(problem, *_unfolded(problem), way)


def _unfolded(problem: Problem) -> tuple[ConvGeometry, Strides]:
    """What the kernel computes: the problem's own, or an input gradient on padded extents that are folded after it."""
    geometry, strides = problem.geometry, problem.strides
    if problem.role is not Role.DGRAD or all(mode == "zeros" for mode in geometry.modes):
        return geometry, strides
    original = geometry.padded()
    return original, strides._replace(x=dense_strides(original.shape("x"), channels_last=strides.x[1] == 1))


def _against(chosen: Plan, other: Plan) -> Plan:
    """The chosen plan, with what it was chosen against in its reason."""
    what = other.kernel
    if other.bundle > 1:
        what += f" of {other.bundle} groups in one"
    if other.packs:
        what += " after copies"
    ours, theirs, how = chosen.measured_seconds, other.measured_seconds, "measured"
    if ours is None or theirs is None:
        ours, theirs, how = chosen.seconds, other.seconds, "predicted"
    times = f"{1e6 * ours:.3g} us {how}, against {1e6 * theirs:.3g} us of {what}"
    return replace(chosen, reason=f"{chosen.reason}; {times}")


def _assembled(problem: Problem, original: ConvGeometry, strides: Strides, way: Way) -> Plan:
    """The plan of one way; `original` and `strides` are of the padded input where a border is folded."""
    role, geometry, accumulator = problem.role, problem.geometry, ACCUMULATORS[problem.dtype]
    kernel, (packs, channels_last, bundle, inner, inner_strides, steps), config, why, measured, rival, name = way
    folds = original is not geometry
    counted(role, inner, config)
    bits = 64 if _reach(inner, inner_strides, role, config) >= 2**31 else 32
    rest = (False, problem.has_scale) if folds else (problem.has_bias, problem.has_scale, problem.epilogue)
    numerics = Numerics(bits, accumulator, problem.precision, *rest)
    fold: Fold | None = None
    workspace: tuple[int, ...] = ()
    workspace_dtype = accumulator
    if folds:
        padded_shape = original.shape("x")
        reach = max(span(padded_shape, strides.x), span(geometry.shape("x"), problem.strides.x))
        how = (accumulator, "ieee", problem.has_bias)
        fold_numerics = Numerics(64 if reach >= 2**31 else 32, *how, epilogue=problem.epilogue)
        fold = Fold(geometry, padded_shape, strides.x, problem.strides.x, fold_numerics)
        workspace = padded_shape
    elif kernel == "banded":
        workspace, workspace_dtype = tiles.shifted_shape(inner, ITEM_BYTES[problem.dtype]), problem.dtype
    elif config.splits > 1:
        workspace = (config.splits, *replace(geometry, groups=geometry.groups // bundle).shape("w"))
    return Plan(
        kernel,
        role,
        problem.dtype,
        problem.out_dtype,
        geometry,
        inner,
        inner_strides,
        config,
        numerics,
        problem.device,
        packs,
        channels_last,
        bundle,
        (*_own_steps(problem, packs, folds), *steps),
        fold,
        workspace,
        workspace_dtype,
        why,
        measured,
        rival,
        name,
        moves_residual=problem.moves_residual,
        scale_dtype=problem.scale_dtype,
    )


def _own_steps(problem: Problem, packs: tuple[str, ...], folds: bool) -> tuple[str, ...]:
    """What a plan does beside the steps of its way's layout, in words."""
    written = WRITTEN[problem.role] in packs
    steps = {
        "compute dx on the padded extents, then fold the border": folds,
        "copy the residual to the output's strides": problem.epilogue.residual and (problem.moves_residual or written),
        "copy what is kept from contiguous": problem.epilogue.keep and written,
    }
    return tuple(step for step, there in steps.items() if there)


def _reach(g: ConvGeometry, strides: Strides, role: Role, config: KernelConfig) -> int:
    """The largest offset or index that a launch computes; tails of tiles and of residue classes included."""
    tails = [axis.phases - 1 for axis in g.axes(role)]
    padded = [i + t + sum(pads) for i, t, pads in zip(g.input, tails, g.padding, strict=True)]
    spans = [
        max(padded),
        span((g.N, g.C, *(i + t for i, t in zip(g.input, tails, strict=True))), strides.x),
        span((g.N, g.K, *g.output), strides.y),
        span((g.K, g.C // g.groups, *g.filter), strides.w) * config.splits,
    ]
    if isinstance(config, BandedConfig):
        spans.append(prod(tiles.shifted_shape(g, 1)))  # of bytes; of wider elements there are fewer
    positions = g.N * prod(i + t for i, t in zip(g.input if role is Role.DGRAD else g.output, tails, strict=True))
    if isinstance(config, DepthwiseConfig):
        lanes, beyond = tiles.depthwise_counts(role, g, config)
        positions = max(positions, lanes)
        spans.append(max(padded) + beyond)
    return max(*spans, positions + config.BLOCK_M * config.splits)


def span(shape: tuple[int, ...], strides: tuple[int, ...]) -> int:
    """Elements from the first of a tensor to its last, both included."""
    return 1 + sum((n - 1) * abs(s) for n, s in zip(shape, strides, strict=True))
