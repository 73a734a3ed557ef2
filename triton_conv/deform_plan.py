"""What a deformable convolution launches, as a pure function of numbers: shapes, strides and device in, plan out.

A plan prints itself (`str(plan)`).
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator
from dataclasses import dataclass, replace
from functools import lru_cache
from math import prod
from typing import TYPE_CHECKING

from . import choose, invariance, recovery, stored, tiles, ways
from . import deform_config as configs
from . import deform_cost as cost
from . import key as keys
from .config import Config, Numerics, most_splits
from .cost import Prediction, Roofline, absurd
from .deform_config import DeformProblem, DeformRole
from .forks import cached_property
from .frozen import PlanOfProblem
from .geometry import Role
from .plan import ACCUMULATORS, counted, span
from .tiles import Tiles
from .ways import dense_strides

if TYPE_CHECKING:
    from .kernels.launch import Launch

__all__ = ["DTYPES", "DeformPlan", "DeformProblem", "DeformRole", "make"]

DTYPES = ("float16", "bfloat16", "float32", "float64")

_KERNELS = {
    DeformRole.FORWARD: "deform",
    DeformRole.INPUT: "deform_dgrad",
    DeformRole.OFFSET: "deform_offset",
    DeformRole.WEIGHT: "deform_wgrad",
}
_REASONS = {
    DeformRole.FORWARD: "samples are interpolated on their way to the dot: no columns are stored",
    DeformRole.INPUT: "what every pixel gave is found by sorting: no atomics, weights computed anew",
    DeformRole.OFFSET: "columns of gradients meet the corners of x in registers: none are stored",
    DeformRole.WEIGHT: "samples are interpolated on their way to the dot: no columns are stored",
}


@dataclass(frozen=True)
class DeformPlan(PlanOfProblem):
    """A kernel and everything it is launched with, for tensors of any address.

    `asked` is the caller's problem, `problem` the one that is left when the tensors that `packs` names are copied to
    channels-last; `measured` are the kernels' seconds where the config was measured at this very size.
    """

    asked: DeformProblem
    problem: DeformProblem
    packs: tuple[str, ...]
    config: Config
    numerics: Numerics
    why: str = "tiles by rule"
    measured: float | None = None

    @property
    def kernel(self) -> str:
        return _KERNELS[self.role]

    @property
    def role(self) -> DeformRole:
        return self.asked.role

    @property
    def N(self) -> int:
        return self.asked.geometry.N

    @property
    def compiled_for(self) -> Hashable:
        """All that its kernels' code depends on beside their config."""
        return key_of(self.problem)[0], self.numerics

    @property
    def tiles(self) -> Tiles:
        return configs.tiles(self.problem, self.config)

    @property
    def dtypes(self) -> dict[str, str]:
        """The dtype of every operand that a launch may name; x, w and y are gradients where they are written."""
        operands = dict.fromkeys(("x", "w", "y", "bias"), self.dtype)
        operands |= dict.fromkeys(("offset", "mask", "doffset", "dmask"), self.asked.offset_dtype)
        operands |= {"cells": "int32", "order": "int64", "first": "int32"}
        return operands | {"workspace": self.numerics.accumulator}

    @property
    def slabs_shape(self) -> tuple[int, ...]:
        """The workspace of a weight gradient: copies of dw; () where there are none."""
        g = self.asked.geometry
        return (self.config.splits, *g.shape("w")) if self.config.splits > 1 else ()

    @property
    def lists_shape(self) -> tuple[int, int, int]:
        """(lists, output pixels that each one sorts, cells + 1) of an input gradient."""
        return configs.lists_shape(self.asked)

    @property
    def workspace_bytes(self) -> int:
        """Device memory beyond inputs and outputs, in bytes, without what sorting takes for itself."""
        copies = sum(self._copies.values())
        if self.role is DeformRole.INPUT:
            lists, pixels, cells = self.lists_shape
            return copies + lists * (pixels * (4 + 4 + 8) + cells * (4 + 4))
        return copies + (prod(self.slabs_shape) * max(self.asked.item_bytes, 4) if self.slabs_shape else 0)

    @property
    def _copies(self) -> dict[str, int]:
        return {name: prod(self.asked.geometry.shape(name)) * self.asked.item_bytes for name in self.packs}

    @cached_property
    def launches(self) -> tuple[Launch, ...]:
        """What runs, in order, and for an input gradient a sort after the first one.

        Needs Triton, and is first asked for when TRITON_INTERPRET can no longer be set.
        """
        from .kernels import deform, deform_dgrad, deform_offset, deform_wgrad

        rooms = {
            DeformRole.FORWARD: deform,
            DeformRole.INPUT: deform_dgrad,
            DeformRole.OFFSET: deform_offset,
            DeformRole.WEIGHT: deform_wgrad,
        }
        return tuple(rooms[self.role].launches(self.problem, self.config, self.numerics, self.tiles))

    @cached_property
    def roofline(self) -> Roofline:
        """The least time of what the plan computes, by whatever kernel."""
        return cost.roofline(self.asked)

    @cached_property
    def prediction(self) -> Prediction:
        """The predicted time of the kernels."""
        return cost.predict(self.problem, self.config)

    @property
    def reason(self) -> str:
        return f"{_REASONS[self.role]}; {self.why}"

    def __str__(self) -> str:
        numerics = self.numerics
        products = f"float32 products as {numerics.precision}" if self.dtype == "float32" else f"{self.dtype} products"
        copies = [f"copy {'dw from' if self._writes(name) else name + ' to'} channels_last" for name in self.packs]
        lines = [
            f"kernel     {self.kernel} ({self.role.value})",
            f"geometry   {self.asked}",
            f"config     {self.config}",
            f"numbers    {products}, {numerics.accumulator} accumulator, {numerics.index_bits}-bit offsets",
            f"layout     {'; '.join(copies) or 'as given, no copies'}",
            f"workspace  {self.workspace_bytes} bytes{self._workspace_use()}",
            f"reason     {self.reason}",
        ]
        return "\n".join(lines)

    def _writes(self, name: str) -> bool:
        return self.role is DeformRole.WEIGHT and name == "w"

    def _workspace_use(self) -> str:
        uses = [f"a copy of {'d' if self._writes(name) else ''}{name}" for name in self.packs]
        if self.role is DeformRole.INPUT:
            uses.append("output pixels sorted by where they sample")
        elif self.slabs_shape:
            uses.append(f"{self.config.splits} slabs of dw, summed in order")
        return f" ({'; '.join(uses)})" if uses else ""


def make(problem: DeformProblem) -> DeformPlan:
    """The plan of a problem; the second time it is a look-up.

    Raises NotImplementedError for a dtype without kernels, and for the gradient of an image of 2^31 pixels.
    """
    return _make(problem, stored.generation(), None if problem.role is DeformRole.WEIGHT else invariance.batch())


@lru_cache(maxsize=4096)
def _make(problem: DeformProblem, _generation: Hashable, batch: int | None) -> DeformPlan:
    alike = problem if batch is None else problem._replace(geometry=replace(problem.geometry, N=batch))
    plans = _candidates(alike)
    if batch is not None:
        plans = (_assembled(problem, p.config, p.why) for p in plans)
    return recovery.first(problem, plans)


def _candidates(problem: DeformProblem) -> Iterator[DeformPlan]:
    """The plans of a problem in the order in which they are tried: each is for where those before it cannot run.

    After the best one come configs from other places, each with fewer slabs, then with small tiles, then no copies.
    """
    found = choice(every(problem))
    yield found
    for p in recovery.sources(lambda: choice(every(problem))):
        yield p
        for copies in (True, False):
            small = choose.smallest(p.config, problem.dtype)
            assert isinstance(small, Config)
            for config in (p.config, *choose.fewer_slabs(p.config), small, *choose.fewer_slabs(small)):
                yield _assembled(problem, config, f"{p.why}, which could not run", copies=copies)


def every(problem: DeformProblem) -> list[DeformPlan]:
    """The plans of all ways to run a problem: so far one; `make` chooses among them.

    Raises NotImplementedError for a dtype without kernels.
    """
    if problem.dtype not in DTYPES or problem.offset_dtype not in DTYPES:
        raise NotImplementedError(
            f"deformable convolutions have no kernel for x of {problem.dtype} with offset of {problem.offset_dtype}"
        )
    if problem.role is DeformRole.INPUT and max(configs.lists_shape(problem)[1:]) >= 2**31:
        raise NotImplementedError(
            f"cells of images are sorted as 32-bit numbers, which do not count those of {problem}"
        )
    g = problem.geometry
    if max(*g.input, *g.output, *map(sum, g.padding)) >= tiles.COUNTED:
        raise NotImplementedError(f"images are longer than corners are counted in 32 bits: {problem}")
    return [_looked_up(problem)]


def choice(found: list[DeformPlan]) -> DeformPlan:
    """The one to run."""
    return found[0]


def _looked_up(problem: DeformProblem) -> DeformPlan:
    """The plan with the config that was stored for it, if there is one that fits, else with the rule's."""
    rule = _assembled(problem, configs.default(packed(problem)[1]))
    found = stored.find(problem.device, rule.kernel, *key_of(rule.problem))
    if found is None or not isinstance(found.config, Config) or misfit(problem, found.config):
        return rule
    p = _assembled(problem, found.config, f"config of {found.where}", found.seconds)
    if absurd(p.prediction, rule.prediction):
        return rule
    return p if found.exact or p.prediction.seconds <= ways.MOST_OF_RULE * rule.prediction.seconds else rule


def key_of(left: DeformProblem) -> tuple[keys.Key, keys.Extents]:
    """Under what the configs of a role's kernel are filed, for operands as the kernel reads them."""
    variant = f"{left.offset_groups} offset groups{', mask' if left.has_mask else ''}"
    if left.offset_dtype != left.dtype:
        variant += f", offset {left.offset_dtype}"
    channels_last = left.strides.x[1] == left.strides.y[1] == 1
    what = (left.role, left.dtype, left.dtype, left.precision, channels_last, variant)
    return keys.of(left.geometry, *what)


def misfit(problem: DeformProblem, config: Config) -> str | None:
    """What is wrong with a config for a problem, in words; None if nothing is."""
    if config.flatten or config.filters_first:
        return "taps are not flattened, and filters not first"
    if config.splits == 1:
        return None
    if problem.role is not DeformRole.WEIGHT:
        return f"its {config.splits} splits are for weight gradients"
    most = most_splits(problem.geometry, configs.tiles(problem, replace(config, splits=1)).longest)
    return f"its {config.splits} slabs are more than {most}" if config.splits > most else None


def with_config(problem: DeformProblem, p: DeformPlan, config: Config) -> DeformPlan:
    """The plan of a problem that goes the way of another one of it, with this config."""
    return _assembled(problem, config, "config given for this way")


def _assembled(
    problem: DeformProblem,
    config: Config,
    why: str = "tiles by rule",
    measured: float | None = None,
    copies: bool = True,
) -> DeformPlan:
    packs, left = packed(problem) if copies else ((), problem)
    counted(Role.FPROP, left.geometry, config)
    bits = 64 if _reach(left, config) >= 2**31 else 32
    numerics = Numerics(bits, ACCUMULATORS[problem.dtype], problem.precision, problem.has_bias)
    return DeformPlan(problem, left, packs, config, numerics, why, measured)


# As many channels make it worth copying a tensor whose channels do not lie side by side: they are gathered in vectors.
_WORTH_PACKING = 8


def packed(p: DeformProblem) -> tuple[tuple[str, ...], DeformProblem]:
    """(tensors that are copied to channels-last, the problem with these copied).

    Those are filters, which kernels take tap by tap, and activations that are read; of what is written, dw.
    """
    g = p.geometry
    written = {DeformRole.FORWARD: "y", DeformRole.INPUT: "x"}.get(p.role)
    channels = {"x": p.segment, "w": g.C // g.groups, "y": g.K // g.groups}
    strides = p.strides._asdict()
    packs = [n for n, c in channels.items() if n != written and strides[n][1] != 1 and c >= _WORTH_PACKING]
    dense = {name: dense_strides(g.shape(name), channels_last=True) for name in packs}
    return tuple(packs), p._replace(strides=p.strides._replace(**dense))


def _reach(p: DeformProblem, config: Config) -> int:
    """The largest offset or index that a launch computes, tails of tiles included."""
    g = p.geometry
    (lists, pixels, cells), (_, H, W), output = configs.lists_shape(p), g.input, g.output
    positions = g.N * max(prod(g.input), prod(output)) + config.BLOCK_M * config.splits + 256
    spans = [
        span((g.N, g.C, 1, H + 1, W + 1), p.strides.x),
        span((g.N, g.K, *output), p.strides.y),
        span(g.shape("w"), p.strides.w) * config.splits,
        span((g.N, 2 * p.offset_groups * g.taps, *output), p.offset),
        positions,
    ]
    if p.has_mask:
        spans.append(span((g.N, p.offset_groups * g.taps, *output), p.mask))
    if p.role is DeformRole.INPUT:
        spans += [lists * pixels, lists * cells]
    return max(spans)
