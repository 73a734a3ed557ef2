"""Which kernels can compute several convolutions in one launch, with which configs; what keeps them from it, in words.

As in `ways`, for the words of `branches_problem`.
"""

from __future__ import annotations

from dataclasses import replace
from math import prod

from . import branches_cost, choose, config, tiles, ways
from . import key as keys
from .branches_problem import MOST_TERMS, Problem, Term, channels_of, fitted
from .config import ITEM_BYTES, BoxConfig, Config, KernelConfig
from .geometry import ConvGeometry, Role, Strides

DTYPES = ("float16", "bfloat16", "float32", "float64")


def alone(problem: Problem, term: Term) -> ways.Problem:
    """The problem of one term by itself."""
    strides = Strides(problem.x, term.filters, problem.y)
    what = (problem.role, term.geometry, problem.dtype, problem.dtype, strides, problem.precision, term.has_bias)
    return ways.Problem(*what, has_scale=False, aligned=problem.aligned, device=problem.device)


def obstacle(problem: Problem) -> str | None:
    """What keeps terms from one launch, in words; None if nothing does."""
    if problem.dtype not in DTYPES:
        return f"it has no sums of {problem.dtype}"
    if len(problem.terms) > MOST_TERMS:
        return f"it takes at most {MOST_TERMS} branches"
    parts: dict[int, tuple] = {}
    for term in problem.terms:
        g = term.geometry
        alike = (g.groups, g.stride if problem.role is Role.DGRAD else None)
        if parts.setdefault(term.part, alike) != alike:
            return "branches of one sum have other groups or strides"
        if any(mode != "zeros" for mode in g.modes):
            return "it pads with zeros only"
    if problem.role is Role.DGRAD and len({term.geometry.stride for term in problem.terms}) > 1:
        return "branches have other strides"
    if all(prod(channels_of(problem.role, term.geometry)) <= config.WITHOUT_DOT for term in problem.terms):
        return "groups are too narrow for a dot"
    return None


def key_of(problem: Problem) -> tuple[keys.Key, keys.Extents]:
    """Under what the configs of a kernel are filed, for operands as the kernel reads them.

    The variant says which convolutions there are, those that are summed with a plus between them.
    """
    (x, y), parts = problem.channels, dict[int, list[str]]()
    for term in problem.terms:
        parts.setdefault(term.part, []).append(_said(term.geometry))
    variant = f"{x} to {y}: {' | '.join(' + '.join(terms) for terms in parts.values())}"
    channels_last = (problem.x if problem.role is Role.FPROP else problem.y)[1] == 1
    what = (problem.role, problem.dtype, problem.dtype, problem.precision, channels_last, variant)
    return keys.of(problem.geometry, *what)


def _said(g: ConvGeometry) -> str:
    """A convolution without its image: "2048>256 3x3 dilation 6x6"."""
    words = [f"{g.C}>{g.K} {g.filter[1]}x{g.filter[2]}"]
    words += [
        f"{name} {h}x{w}" for name, (_, h, w) in (("stride", g.stride), ("dilation", g.dilation)) if (h, w) != (1, 1)
    ]
    return " ".join([*words, *([f"groups {g.groups}"] if g.groups > 1 else [])])


def misfit(problem: Problem, kernel: str, made: KernelConfig) -> str | None:
    """What is wrong with a config for terms that a kernel can run, in words; None if nothing is."""
    if not isinstance(made, keys.CONFIGS[kernel]):
        return f"it is a {type(made).__name__}"
    if made.splits > 1:
        return f"its {made.splits} splits are for weight gradients"
    if isinstance(made, BoxConfig):
        return _box_misfit(problem, made)
    assert isinstance(made, Config)
    if not made.dot or made.flatten:
        return "branches are summed by dots, tap by tap"
    return ways._too_shallow(made, problem.dtype)


def shapes(problem: Problem) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """(N, C, 1, H, W) of x and y."""
    g = problem.terms[0].geometry
    x, y = problem.channels
    return (g.N, x, *g.input), (g.N, y, *g.output)


def moved(problem: Problem) -> Problem:
    """The problem with x and y channels-last, copied where they are not."""
    x, y = (
        given if given[1] == 1 else ways.dense_strides(shape, channels_last=True)
        for given, shape in zip((problem.x, problem.y), shapes(problem), strict=True)
    )
    return problem if (x, y) == (problem.x, problem.y) else problem._replace(x=x, y=y, aligned=problem.alignable)


def packed(term: Term) -> Term:
    """A term whose filters lie as boxes want them: channels side by side, taps evenly spaced."""
    shape = term.geometry.shape("w")
    if term.filters[1] == 1 or shape[1] == 1:
        return term
    return term._replace(filters=ways.dense_strides(shape, channels_last=True))


# ---------------------------------------------------------------------------------------------------------------------
# Boxes


def box_obstacle(problem: Problem) -> str | None:
    """What keeps terms from the box kernel, in words; None if nothing does."""
    for term in map(packed, problem.terms):
        g, strides = term.geometry, Strides(problem.x, term.filters, problem.y)
        if problem.x[1] != 1 or problem.y[1] != 1:
            return "activations are not channels-last"
        what = alone(problem, term)
        why = ways._box_obstacle(what, ways.Layout((), True, 1, g, strides, ()))
        if why:
            return why
        written = "y" if problem.role is Role.FPROP else "x"
        if ways._uneven_rows(g, strides, written, 16 // ITEM_BYTES[problem.dtype]):
            return "rows are not multiples of 16 bytes apart"
        if problem.role is Role.DGRAD and max(g.stride) > 1:
            return "input gradients of strides are not boxes"
    return None


def _box_misfit(problem: Problem, made: BoxConfig) -> str | None:
    """What is wrong with a box config for terms that the box kernel can run, in words."""
    if made.box[1] > 1:
        return "its box must have a depth of 1"
    for term in problem.terms:
        g, fit = term.geometry, fitted(problem.role, term.geometry, made)
        _, dst = channels_of(problem.role, g)
        why = ways._box_misfit(alone(problem, term), fit, g)
        if why:
            return why
        if g.groups > 1 and dst % fit.BLOCK_N:
            return f"blocks of {fit.BLOCK_N} channels do not divide the {dst} of a group"
    return None


def box_rule(problem: Problem) -> BoxConfig:
    """That of ordinary convolutions, for the widest term, with a reduction that divides what has to be divided."""
    role, geometries = problem.role, [term.geometry for term in problem.terms]
    channels = [channels_of(role, g) for g in geometries]
    counts = tiles.positions(role, geometries[0])
    src, dst = (max(side) for side in zip(*channels, strict=True))
    rule = config.default_box(counts, src, dst, False, problem.dtype, problem.device)
    block_n, block_k = rule.BLOCK_N, rule.BLOCK_K
    for g, (src, dst) in zip(geometries, channels, strict=True):
        while ways._needs_whole_blocks(role, g) and block_k > 16 and src % block_k:
            block_k //= 2
        while g.groups > 1 and block_n > 16 and dst % block_n:
            block_n //= 2
    return replace(rule, BLOCK_N=block_n, BLOCK_K=block_k)


def box_config(problem: Problem, rule: BoxConfig) -> BoxConfig:
    """The rule's, or another box, half as many channels or pixels, where that promises a good deal of the time."""
    counts = tiles.positions(problem.role, problem.terms[0].geometry)
    boxes = [*config.boxes_of_little_waste(counts, rule.BLOCK_M), config.little_waste(counts, rule.BLOCK_M // 2)]
    narrow = sorted({rule.BLOCK_N, min(rule.BLOCK_N, 64)}, reverse=True)
    others = [replace(rule, box=box, BLOCK_N=n) for n in narrow for box in boxes if box[1] == 1]
    return _quickest(problem, "box_branches", rule, [c for c in others if _box_misfit(problem, c) is None])


def _quickest(problem: Problem, kernel: str, rule: BoxConfig, others: list[BoxConfig]) -> BoxConfig:
    def seconds(c: BoxConfig) -> float:
        return branches_cost.predict(problem, kernel, c).seconds

    best = min(others, key=seconds, default=rule)
    return best if seconds(best) < choose.WORTH_LEAVING * seconds(rule) else rule


# ---------------------------------------------------------------------------------------------------------------------
# Gathering


def gather_config(problem: Problem) -> Config:
    """That of the widest term by itself, but for what several terms hold in registers beside their tiles."""
    role, device = problem.role, problem.device
    widest = max(problem.terms, key=lambda term: term.geometry.flops // term.geometry.groups)
    source = problem.x if role is Role.FPROP else problem.y
    vectorised = source[1] == 1 and all(tiles.whole_vectors(term.geometry) for term in problem.terms)
    rule = config.default(widest.geometry, role, problem.dtype, problem.precision, vectorised, device)
    if not rule.dot or rule.flatten:
        least = config.least_reduction(problem.dtype)
        rule = replace(rule, BLOCK_N=max(rule.BLOCK_N, 16), BLOCK_K=least, dot=True, flatten=False, filters_first=False)
    if config._through_registers(problem.dtype, device):
        rule = replace(rule, num_stages=2)
    parts = [term.part for term in problem.terms]
    summed = max(map(parts.count, parts))
    crowded = not vectorised or (ITEM_BYTES[problem.dtype] > 2 and config._through_registers(problem.dtype, device))
    crowded |= problem.dtype == "float64" and device.capability == 100  # which has no matrix instruction for it
    if summed > 1 and crowded:
        rule = replace(rule, BLOCK_M=max(rule.BLOCK_M // 2, 16), BLOCK_K=16 if summed > 4 else rule.BLOCK_K)
    return rule
