"""The plan of several convolutions in one launch: numbers in, plan out, as in `plan`.

Words are those of `branches_problem`: a term is a convolution of a slice of channels, a part is a sum over terms.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator
from dataclasses import dataclass, replace
from functools import lru_cache
from math import prod
from typing import TYPE_CHECKING

from . import branches_cost, branches_ways, choose, cost, invariance, plan, recovery, stored, tiles, ways
from .branches_problem import Problem, Term
from .config import ITEM_BYTES, BoxConfig, Config, KernelConfig, Numerics
from .cost import Prediction, Roofline, absurd
from .forks import cached_property
from .frozen import PlanOfProblem
from .geometry import ConvGeometry, Role, Strides

if TYPE_CHECKING:
    from .kernels.launch import Launch


@dataclass(frozen=True)
class BranchesPlan(PlanOfProblem):
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
    def compiled_for(self) -> Hashable:
        """All that its kernel's code depends on beside its config."""
        return branches_ways.key_of(self.problem)[0], self.numerics

    @property
    def moves(self) -> tuple[str, ...]:
        """Which of x and y are copied."""
        return tuple(name for name in ("x", "y") if getattr(self.asked, name) != getattr(self.problem, name))

    @property
    def _copies(self) -> dict[str, int]:
        whole = dict(zip(("x", "y"), branches_ways.shapes(self.problem), strict=True))
        copied = {f"w{term.number}": term.geometry.shape("w") for term in self.order if term.number in self.packs}
        copied |= {name: whole[name] for name in self.moves}
        return {name: prod(shape) * ITEM_BYTES[self.dtype] for name, shape in copied.items()}

    @property
    def workspace_bytes(self) -> int:
        """Device memory beyond inputs and output, in bytes."""
        return sum(self._copies.values())

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
    def roofline(self) -> Roofline:
        """The least time of all terms, where the tensor that slices are of is moved once."""
        return branches_cost.roofline(self.problem)

    @cached_property
    def prediction(self) -> Prediction:
        """The predicted time of the kernel."""
        return branches_cost.predict(self.problem, self.kernel, self.config)

    @cached_property
    def apart(self) -> tuple[plan.Plan, ...]:
        """The plans of the same convolutions one after the other, into slices; sums of several come on top."""
        return tuple(plan.make(branches_ways.alone(self.asked, term)) for term in self.asked.terms)

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
    def comparison(self) -> str:
        """Both times in words."""
        together, apart, how = self._times
        times = f"{1e6 * together:.3g} us {how}, against {1e6 * apart:.3g} us of {len(self.order)}"
        return f"{times} launches, one for each branch"

    @property
    def reason(self) -> str:
        return f"{self.why}; {self.comparison}"

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


def make(problem: Problem) -> BranchesPlan:
    """The plan of a problem without an obstacle; the second time it is a look-up."""
    return _make(problem, stored.generation(), invariance.batch())


def worth_it(problem: Problem) -> bool:
    """Whether one launch computes it unless the caller says otherwise; with `batch_invariant`, whatever its batch."""
    batch = invariance.batch()
    return make(problem if batch is None else _of_batch(problem, batch)).worth_it


def _of_batch(problem: Problem, batch: int) -> Problem:
    return problem._replace(terms=tuple(t._replace(geometry=replace(t.geometry, N=batch)) for t in problem.terms))


@lru_cache(maxsize=4096)
def _make(problem: Problem, _generation: Hashable, batch: int | None) -> BranchesPlan:
    if batch is None:
        return recovery.first(problem, _candidates(problem))
    alike = _candidates(_of_batch(problem, batch))
    return recovery.first(problem, (_as_of(problem, model, batch) for model in alike))


def _as_of(problem: Problem, model: BranchesPlan, batch: int) -> BranchesPlan:
    inner = branches_ways.moved(problem) if model.moves else problem
    return _assembled(problem, inner, model.kernel, model.config, f"{model.why}; chosen for a batch of {batch}")


def _candidates(problem: Problem) -> Iterator[BranchesPlan]:
    """The plans of a problem in the order in which they are tried: each is for where those before it cannot run."""
    found = every(problem)
    best = choice(found)
    yield best
    for like in (best, *found):
        for again in recovery.sources(lambda: every(problem)):
            for p in again:
                if (p.kernel, p.moves) == (like.kernel, like.moves):
                    yield p
                    yield from _smallest(p)
    config = branches_ways.gather_config(problem)
    last = _assembled(problem, problem, "gather_branches", config, "pointer gather, since nothing else could run")
    yield last
    yield from _smallest(last)


def _smallest(p: BranchesPlan) -> Iterator[BranchesPlan]:
    config = choose.smallest(p.config, p.dtype)
    if not branches_ways.misfit(p.problem, p.kernel, config):
        yield with_config(p, config)


def every(problem: Problem) -> list[BranchesPlan]:
    """The plans of all ways to run a problem in one launch, the plainest first; `make` chooses among them."""
    boxes = _boxed(problem, problem)
    if isinstance(boxes, BranchesPlan):
        return [boxes]
    given = _looked_up(
        problem, problem, "gather_branches", branches_ways.gather_config(problem), f"pointer gather, since {boxes}"
    )
    moved = branches_ways.moved(problem)
    copied = _boxed(problem, moved) if moved != problem and problem.alignable else None
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
    why = branches_ways.obstacle(problem) or (branches_ways.box_obstacle(problem) if kernel == "box_branches" else None)
    why = why or branches_ways.misfit(problem, kernel, made)
    if why:
        raise ValueError(why)
    assert isinstance(made, (Config, BoxConfig))
    return _assembled(problem, problem, kernel, made, "config given explicitly")


def _boxed(asked: Problem, problem: Problem) -> BranchesPlan | str:
    """The way by boxes, or what keeps a problem from it, in words."""
    why = branches_ways.box_obstacle(problem)
    if why:
        return why
    rule = branches_ways.box_rule(problem)
    why = branches_ways.misfit(problem, "box_branches", rule)
    return why or _looked_up(
        asked, problem, "box_branches", branches_ways.box_config(problem, rule), "boxes of the bulk tensor copy engine"
    )


def _looked_up(asked: Problem, problem: Problem, kernel: str, rule: Config | BoxConfig, why: str) -> BranchesPlan:
    """The plan with the config that was stored for it, if there is one that fits, else with the rule's."""
    by_rule = _assembled(asked, problem, kernel, rule, why)
    found = stored.find(problem.device, kernel, *branches_ways.key_of(problem))
    if found is None or branches_ways.misfit(problem, kernel, found.config):
        return by_rule
    assert isinstance(found.config, (Config, BoxConfig))
    p = _assembled(asked, problem, kernel, found.config, f"{why}; config of {found.where}", found.seconds)
    if absurd(p.prediction, by_rule.prediction):
        return by_rule
    return p if found.exact or p.prediction.seconds <= ways.MOST_OF_RULE * by_rule.prediction.seconds else by_rule


def _assembled(
    asked: Problem,
    problem: Problem,
    kernel: str,
    made: Config | BoxConfig,
    why: str,
    measured: float | None = None,
) -> BranchesPlan:
    boxed = isinstance(made, BoxConfig)
    terms = tuple(branches_ways.packed(term) for term in problem.terms) if boxed else problem.terms
    packs = tuple(new.number for new, old in zip(terms, problem.terms, strict=True) if new != old)
    left = problem._replace(terms=terms)
    for term in terms:
        plan.counted(problem.role, term.geometry, made)
    longest: dict[int, float] = {}
    programs: dict[int, int] = {}
    for term in terms:
        counted = branches_cost.steps(left, term, made)
        programs[term.part] = counted.total
        longest[term.part] = longest.get(term.part, 0) + counted.steps / max(counted.total, 1)
    if sum(programs.values()) >= tiles.COUNTED:
        raise NotImplementedError(f"{sum(programs.values())} tiles are more than kernels count in 32 bits: {problem}")
    order = tuple(sorted(terms, key=lambda term: (-longest[term.part], term.part, term.number)))
    bits = 64 if _reach(left, made) >= 2**31 else 32
    has_bias = any(term.has_bias for term in terms)
    numerics = Numerics(bits, plan.ACCUMULATORS[problem.dtype], problem.precision, has_bias)
    return BranchesPlan(asked, problem, kernel, made, numerics, order, packs, why, measured)


def _reach(problem: Problem, made: Config | BoxConfig) -> int:
    what = [(t.geometry, Strides(problem.x, t.filters, problem.y)) for t in problem.terms]
    return max(plan._reach(g, strides, problem.role, made) for g, strides in what)
