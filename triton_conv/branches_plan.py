"""The plan of several convolutions in one launch: numbers in, plan out, as in `plan`.

Words are those of `branches_problem`: a term is a convolution of a slice of channels, a part is a sum over terms.
"""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from math import prod
from typing import TYPE_CHECKING

from . import branches_cost, choose, config, cost, invariance, plan, stored, tiles, ways
from . import key as keys
from .branches_problem import MOST_TERMS, Problem, Term, channels_of, fitted
from .config import ITEM_BYTES, BoxConfig, Config, KernelConfig, Numerics
from .cost import Prediction, Roofline
from .devices import Device
from .frozen import Frozen
from .geometry import ConvGeometry, Role, Strides

if TYPE_CHECKING:
    from .kernels.direct import Direct
    from .kernels.launch import Launch

DTYPES = ("float16", "bfloat16", "float32", "float64")


def alone(problem: Problem, term: Term) -> plan.Problem:
    """The problem of one term by itself."""
    strides = Strides(problem.x, term.filters, problem.y)
    what = (problem.role, term.geometry, problem.dtype, problem.dtype, strides, problem.precision, term.has_bias)
    return plan.Problem(*what, has_scale=False, aligned=problem.aligned, device=problem.device)


@dataclass(frozen=True)
class BranchesPlan(Frozen):
    """One kernel for all terms, and everything it is launched with.

    `asked` is the caller's problem, `problem` the same with strides of x and y as the kernel gets them: those in
    `moves` are copied to channels-last, or back from there. `order` are its terms as the kernel gets them, those of the
    longest tiles first; `packs` the numbers of the filters that are copied to channels-last. `measured` are the
    kernel's seconds where the config was measured at this very size.
    """

    asked: Problem
    problem: Problem
    kernel: str
    config: Config | BoxConfig
    numerics: Numerics
    order: tuple[Term, ...]
    packs: tuple[int, ...]
    why: str
    measured: float | None = None

    @property
    def role(self) -> Role:
        return self.problem.role

    @property
    def dtype(self) -> str:
        return self.problem.dtype

    @property
    def device(self) -> Device:
        return self.problem.device

    @property
    def N(self) -> int:
        return self.order[0].geometry.N

    @property
    def geometry(self) -> ConvGeometry:
        """That of the term with the longest tiles."""
        return self.order[0].geometry

    @property
    def strides(self) -> Strides:
        """Those of x and y, and of the filters of that term."""
        return Strides(self.problem.x, self.order[0].filters, self.problem.y)

    @property
    def dtypes(self) -> dict[str, str]:
        """The dtype of every operand that a launch may name."""
        numbers = {number for term in self.order for number in (term.number, term.part)}
        return dict.fromkeys((f"{name}{i}" for i in sorted(numbers) for name in ("x", "w", "bias", "y")), self.dtype)

    @property
    def moves(self) -> tuple[str, ...]:
        """Which of x and y are copied."""
        return tuple(name for name in ("x", "y") if getattr(self.asked, name) != getattr(self.problem, name))

    @property
    def _copies(self) -> list[int]:
        """The size in bytes of every tensor that stands for another."""
        filters = [prod(term.geometry.shape("w")) for term in self.order if term.number in self.packs]
        whole = dict(zip(("x", "y"), _shapes(self.problem), strict=True))
        return [elements * ITEM_BYTES[self.dtype] for elements in (*filters, *(prod(whole[m]) for m in self.moves))]

    @property
    def workspace_bytes(self) -> int:
        """Device memory beyond inputs and output, in bytes."""
        return sum(self._copies)

    @property
    def steps(self) -> tuple[str, ...]:
        """What is done to operands before they are launched with, and to the output after."""
        written, output = ways._WRITTEN[self.role]
        words = {name: f"copy {words} to channels-last" for name, words in ways._WORDS.items()}
        words[written] = f"copy {output} from channels-last"
        found = [words[name] for name in self.moves]
        numbers = ", ".join(map(str, sorted(self.packs)))
        return (*found, *([f"copy the filters of branches {numbers} to channels-last"] if self.packs else []))

    @cached_property
    def launches(self) -> tuple[Launch, ...]:
        from .kernels import box_branches, gather_branches

        room = box_branches if self.kernel == "box_branches" else gather_branches
        p = self.problem
        strides = (p.x, p.y) if self.role is Role.FPROP else (p.y, p.x)
        prediction = self.prediction
        programs = min(prediction.tiles, max(prediction.resident, 1) * self.device.multiprocessors)
        return (room.launch(self.role, self.order, strides, self.config, self.numerics, programs),)

    @cached_property
    def direct(self) -> tuple[Direct, ...]:
        """The same, launched without Triton's binder from the second time on."""
        from .kernels.direct import Direct

        return tuple(map(Direct, self.launches))

    @cached_property
    def roofline(self) -> Roofline:
        """The least time of all terms, where the tensor that slices are of is moved once."""
        return branches_cost.roofline(self.problem)

    @cached_property
    def prediction(self) -> Prediction:
        """The predicted time of the kernel."""
        return branches_cost.predict(self.problem, self.kernel, self.config)

    @cached_property
    def seconds(self) -> float:
        """The predicted time of everything: copies and kernel."""
        return self.prediction.seconds + self._around

    @property
    def measured_seconds(self) -> float | None:
        """The time of everything where the kernel's was measured; copies around it are predicted."""
        return None if self.measured is None else self.measured + self._around

    @property
    def _around(self) -> float:
        return sum(cost.copy_seconds(size, self.device) for size in self._copies)

    @cached_property
    def apart(self) -> tuple[plan.Plan, ...]:
        """The plans of the same convolutions one after the other, into slices; sums of several come on top."""
        return tuple(plan.make(alone(self.asked, term)) for term in self.asked.terms)

    @cached_property
    def apart_seconds(self) -> float:
        """The predicted time of `apart`, and of adding up what belongs to one part."""
        return sum(part.seconds for part in self.apart) + self._adding

    @property
    def _adding(self) -> float:
        p = self.problem
        parts = {term.part: term.geometry for term in p.terms}
        more = len(p.terms) - len(parts)
        written = "y" if self.role is Role.FPROP else "x"
        size = max(prod(g.shape(written)) for g in parts.values()) * ITEM_BYTES[p.dtype]
        return more * 1.5 * cost.copy_seconds(size, p.device)  # two are read, one is written

    @cached_property
    def _times(self) -> tuple[float, float, str]:
        """(one launch's seconds, those of `apart`, how these are known): measured where all of them are."""
        apart = [part.rival if part.rival_runs else part.measured_seconds for part in self.apart]
        measured = [seconds for seconds in apart if seconds is not None]
        if self.measured_seconds is None or len(measured) < len(apart):
            return self.seconds, self.apart_seconds, "predicted"
        return self.measured_seconds, sum(measured) + self._adding, "measured"

    @property
    def worth_it(self) -> bool:
        """Whether one launch takes no longer than one for each term: measured where all are, else predicted."""
        together, apart, _ = self._times
        return together <= apart

    @property
    def reason(self) -> str:
        together, apart, how = self._times
        times = f"{1e6 * together:.3g} us {how}, against {1e6 * apart:.3g} us of {len(self.order)}"
        return f"{self.why}; {times} launches, one for each branch"

    def __str__(self) -> str:
        p, numerics = self.problem, self.numerics
        copied = " (the copies)" if self._copies else ""
        parts = len({term.part for term in p.terms})
        lines = [
            f"kernel     {self.kernel} ({self.role.value} of {len(p.terms)} branches, {parts} sums)",
            *(f"geometry   {term.geometry}" for term in self.order),
            f"config     {self.config}",
            f"numbers    {p.dtype} products, {numerics.accumulator} accumulator, {numerics.index_bits}-bit offsets",
            f"layout     {'; '.join(self.steps) if self.steps else 'as given, no copies'}",
            f"workspace  {self.workspace_bytes} bytes{copied}",
            f"reason     {self.reason}",
        ]
        return "\n".join(lines)


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


def make(problem: Problem) -> BranchesPlan:
    """The plan of a problem without an obstacle; the second time it is a look-up."""
    return _make(problem, stored.generation(), invariance.batch())


@lru_cache(maxsize=4096)
def _make(problem: Problem, _generation: Hashable, batch: int | None) -> BranchesPlan:
    if batch is None:
        return choice(every(problem))
    terms = tuple(t._replace(geometry=replace(t.geometry, N=batch)) for t in problem.terms)
    model = choice(every(problem._replace(terms=terms)))
    inner = _moved(problem) if model.moves else problem
    return _assembled(problem, inner, model.kernel, model.config, f"{model.why}; chosen for a batch of {batch}")


def every(problem: Problem) -> list[BranchesPlan]:
    """The plans of all ways to run a problem in one launch, the plainest first; `make` chooses among them."""
    boxes = _boxed(problem, problem)
    if isinstance(boxes, BranchesPlan):
        return [boxes]
    given = _looked_up(problem, problem, "gather_branches", _config(problem), f"pointer gather, since {boxes}")
    moved = _moved(problem)
    copied = "copies would not be aligned" if moved == problem or not problem.alignable else _boxed(problem, moved)
    return [given, copied] if isinstance(copied, BranchesPlan) else [given]


def choice(found: list[BranchesPlan]) -> BranchesPlan:
    """Of the plans of all ways the one to run: measured to be quickest where all were, else by predicted times."""
    if all(p.measured is not None for p in found):
        return min(found, key=lambda p: p.measured_seconds or 0.0)
    first, others = found[0], found[1:]
    best = min(others, key=lambda p: p.seconds, default=first)
    return best if best.seconds < choose.WORTH_LEAVING * first.seconds else first


def with_config(p: BranchesPlan, made: Config | BoxConfig) -> BranchesPlan:
    """The plan that goes the way of another one with this config."""
    return _assembled(p.asked, p.problem, p.kernel, made, "config given for this way")


def of_kernel(problem: Problem, kernel: str, made: KernelConfig) -> BranchesPlan:
    """The plan of a problem as it lies by one kernel, with this config. Raises ValueError where that cannot run it."""
    why = obstacle(problem) or (box_obstacle(problem) if kernel == "box_branches" else None)
    why = why or misfit(problem, kernel, made)
    if why:
        raise ValueError(why)
    assert isinstance(made, (Config, BoxConfig))
    return _assembled(problem, problem, kernel, made, "config given explicitly")


def _boxed(asked: Problem, problem: Problem) -> BranchesPlan | str:
    """The way by boxes, or what keeps a problem from it, in words."""
    why = box_obstacle(problem)
    if why:
        return why
    rule = _box_rule(problem)
    why = misfit(problem, "box_branches", rule)
    return why or _looked_up(
        asked, problem, "box_branches", _box_config(problem, rule), "boxes of the bulk tensor copy engine"
    )


def _looked_up(asked: Problem, problem: Problem, kernel: str, rule: Config | BoxConfig, why: str) -> BranchesPlan:
    """The plan with the config that was stored for it, if there is one that fits, else with the rule's."""
    by_rule = _assembled(asked, problem, kernel, rule, why)
    found = stored.find(problem.device, kernel, *key_of(problem))
    if found is None or misfit(problem, kernel, found.config):
        return by_rule
    assert isinstance(found.config, (Config, BoxConfig))
    p = _assembled(asked, problem, kernel, found.config, f"{why}; config of {found.where}", found.seconds)
    return p if found.exact or p.prediction.seconds <= ways.MOST_OF_RULE * by_rule.prediction.seconds else by_rule


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


def _shapes(problem: Problem) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """(N, C, 1, H, W) of x and y."""
    g = problem.terms[0].geometry
    x, y = problem.channels
    return (g.N, x, *g.input), (g.N, y, *g.output)


def _moved(problem: Problem) -> Problem:
    """The problem with x and y channels-last, copied where they are not."""
    x, y = (
        given if given[1] == 1 else ways.dense_strides(shape, channels_last=True)
        for given, shape in zip((problem.x, problem.y), _shapes(problem), strict=True)
    )
    return problem if (x, y) == (problem.x, problem.y) else problem._replace(x=x, y=y, aligned=problem.alignable)


def _assembled(
    asked: Problem,
    problem: Problem,
    kernel: str,
    made: Config | BoxConfig,
    why: str,
    measured: float | None = None,
) -> BranchesPlan:
    boxed = isinstance(made, BoxConfig)
    terms = tuple(_packed(term) for term in problem.terms) if boxed else problem.terms
    packs = tuple(new.number for new, old in zip(terms, problem.terms, strict=True) if new != old)
    packed = problem._replace(terms=terms)
    longest: dict[int, float] = {}
    for term in terms:
        counted = branches_cost.steps(packed, term, made)
        longest[term.part] = longest.get(term.part, 0) + counted.steps / max(counted.total, 1)
    order = tuple(sorted(terms, key=lambda term: (-longest[term.part], term.part, term.number)))
    bits = 64 if _reach(packed, made) >= 2**31 else 32
    has_bias = any(term.has_bias for term in terms)
    numerics = Numerics(bits, plan.ACCUMULATORS[problem.dtype], problem.precision, has_bias)
    return BranchesPlan(asked, problem, kernel, made, numerics, order, packs, why, measured)


def _reach(problem: Problem, made: Config | BoxConfig) -> int:
    what = [(t.geometry, Strides(problem.x, t.filters, problem.y)) for t in problem.terms]
    return max(plan._reach(g, strides, problem.role, made) for g, strides in what)


def _packed(term: Term) -> Term:
    """A term whose filters lie as boxes want them: channels side by side, taps evenly spaced."""
    shape = term.geometry.shape("w")
    if term.filters[1] == 1 or shape[1] == 1:
        return term
    return term._replace(filters=ways.dense_strides(shape, channels_last=True))


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


# ---------------------------------------------------------------------------------------------------------------------
# Boxes


def box_obstacle(problem: Problem) -> str | None:
    """What keeps terms from the box kernel, in words; None if nothing does."""
    for term in map(_packed, problem.terms):
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


def _box_rule(problem: Problem) -> BoxConfig:
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


def _box_config(problem: Problem, rule: BoxConfig) -> BoxConfig:
    """The rule's, or another box, half as many channels or pixels, where that promises a good deal of the time."""
    counts = tiles.positions(problem.role, problem.terms[0].geometry)
    boxes = [*config.boxes_of_little_waste(counts, rule.BLOCK_M), config.little_waste(counts, rule.BLOCK_M // 2)]
    narrow = sorted({rule.BLOCK_N, min(rule.BLOCK_N, 64)}, reverse=True)
    others = [replace(rule, box=box, BLOCK_N=n) for n in narrow for box in boxes if box[1] == 1]
    return _quickest(problem, "box_branches", rule, [c for c in others if _box_misfit(problem, c) is None])


# ---------------------------------------------------------------------------------------------------------------------
# Gathering


def _config(problem: Problem) -> Config:
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


def _quickest(problem: Problem, kernel: str, rule: BoxConfig, others: list[BoxConfig]) -> BoxConfig:
    def seconds(c: BoxConfig) -> float:
        return branches_cost.predict(problem, kernel, c).seconds

    best = min(others, key=seconds, default=rule)
    return best if seconds(best) < choose.WORTH_LEAVING * seconds(rule) else rule
