"""Several convolutions in one launch as the tuner sees them: configs worth measuring, random operands, what is right.

Where slices start is no part of a problem: those that are written lie side by side, and so do those that are read while
there is room, so that branches over the whole input read the same channels.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from .. import branches_cost, branches_plan, check, execute, plan, ways
from ..branches_plan import BranchesPlan
from ..branches_problem import Problem, Term, channels_of
from ..branches_run import Bound, Calls, Slice, _slice
from ..branches_ways import alone, misfit
from ..config import ITEM_BYTES, Config
from ..devices import Device
from ..execute import Call
from ..geometry import ConvGeometry, Role
from ..stored import Entry
from . import operands, space


def numbered(problem: Problem) -> Problem:
    """The problem with terms and parts numbered from 0, as one launch of several is by itself."""
    parts = sorted({term.part for term in problem.terms})
    terms = (t._replace(number=i, part=parts.index(t.part)) for i, t in enumerate(problem.terms))
    return problem._replace(terms=tuple(terms))


def plans(ways_of_it: Sequence[BranchesPlan]) -> list[BranchesPlan]:
    """The plans to measure: the ways' own first, then those of all candidates, by predicted time of everything."""
    others = [branches_plan.with_config(p, config) for p in ways_of_it for config in candidates(p)[1:]]
    return [*ways_of_it, *sorted(others, key=lambda p: p.seconds)]


def candidates(p: BranchesPlan) -> list[Config]:
    """The config of a plan, then others of its kernel, by predicted time."""
    fits, predicted = partial(misfit, p.problem, p.kernel), partial(branches_cost.predict, p.problem, p.kernel)
    return space.likely(p.config, _tiled(p), fits, predicted)


def fitting(p: BranchesPlan) -> list[Config]:
    """Every config of a plan's kernel that can run it, the same list for the same plan."""
    return sorted({config for config in _tiled(p) if misfit(p.problem, p.kernel, config) is None}, key=repr)


def _tiled(p: BranchesPlan) -> Iterable:
    """The configs of an ordinary convolution with the widest slices; programs are as many as fit."""
    sides = [channels_of(p.role, term.geometry) for term in p.order]
    src, dst = (max(side) for side in zip(*sides, strict=True))
    C, K = (src, dst) if p.role is Role.FPROP else (dst, src)
    widest = p.order[0]._replace(geometry=replace(p.geometry, C=C, K=K, groups=1))
    wide = replace(p, order=(widest, *p.order[1:]))
    if p.kernel == "gather_branches":
        return (c for c in space.gather(p.problem, wide) if c.dot and not c.flatten)
    return (c for c in space.box(p.problem, wide) if c.programs == 1 and c.box[1] == 1)


# ---------------------------------------------------------------------------------------------------------------------
# Operands and values


@dataclass(frozen=True)
class Case:
    """Random operands, and an output full of NaN."""

    calls: Calls
    output: Tensor
    device: Device

    def bound(self, p: BranchesPlan) -> Bound:
        return Bound(self.calls, [p], self.output, self.device)

    @property
    def given(self) -> tuple[Tensor, tuple[Tensor, ...], list[Tensor | None]]:
        """Source, filters and biases."""
        return self.calls.source, self.calls.filters, [call.bias for call in self.calls.each]


def case(problem: Problem, device: torch.device, seed: int) -> Case:
    """Standard normal values in tensors of the problem's strides, whose terms are `numbered`."""
    generator = torch.Generator(device).manual_seed(seed)
    source, output, filters = _empty(problem, device)
    for t in (source, *filters):
        t.normal_(generator=generator)
    reads, writes = _slices(problem)
    each = []
    for term, read, w in zip(problem.terms, reads, filters, strict=True):
        bias = None
        if term.has_bias:
            bias = torch.empty(term.geometry.K, dtype=w.dtype, device=device).normal_(generator=generator)
        each.append(Call(problem.role, term.geometry, _slice(source, read), w, bias, problem.precision))
    slices = tuple(writes[term.part] for term in problem.terms)
    calls = Calls(source, tuple(filters), tuple(each), tuple(reads), slices, output.shape[1])
    return Case(calls, operands.poison(output), problem.device)


def _empty(problem: Problem, device: torch.device) -> tuple[Tensor, Tensor, list[Tensor]]:
    """(source, output, filters), where what lies between elements is NaN."""
    dtype = getattr(torch, problem.dtype)

    def empty(shape: tuple[int, ...], strides: tuple[int, ...], aligned: bool) -> Tensor:
        offset = 0 if aligned else 1
        flat = torch.empty(plan.span(shape, strides) + offset, dtype=dtype, device=device)
        return operands.poison(flat).as_strided(_four(shape), _four(strides), offset)

    g, (x, y) = problem.terms[0].geometry, problem.channels
    # of an unaligned problem that copies align, tensors in channels-last start at whole vectors
    aligned = [problem.aligned or (problem.alignable and strides[1] == 1) for strides in (problem.x, problem.y)]
    sides = [
        empty((g.N, x, *g.input), problem.x, aligned[0]),
        empty((g.N, y, *g.output), problem.y, aligned[1]),
    ]
    source, output = sides if problem.role is Role.FPROP else sides[::-1]
    whole = problem.aligned or problem.alignable
    return source, output, [empty(t.geometry.shape("w"), t.filters, whole) for t in problem.terms]


def _four(axes: tuple[int, ...]) -> tuple[int, ...]:
    return (*axes[:2], *axes[3:])


def _slices(problem: Problem) -> tuple[list[Slice], list[Slice]]:
    """(what each term reads, what each part is), at whole vectors where the problem has them there."""
    role, (x, y) = problem.role, problem.channels
    sides = [[n * t.geometry.groups for n in channels_of(role, t.geometry)] for t in problem.terms]
    whole = problem.aligned or problem.alignable
    step = 16 // ITEM_BYTES[problem.dtype] if whole else 1
    there, reads, start = (x if role is Role.FPROP else y), list[Slice](), 0
    for source, _ in sides:
        start = start if start + source <= there else 0
        reads.append((start, source))
        start += -(-source // step) * step
    writes, start = dict[int, Slice](), 0
    for term, (_, written) in sorted(zip(problem.terms, sides, strict=True), key=lambda one: one[0].part):
        if term.part not in writes:
            writes[term.part] = start, written
            start += -(-written // step) * step
    return reads, list(writes.values())


def bytes_of(problem: Problem) -> int:
    """Of the operands and what is written."""
    source, output, filters = _empty(problem, torch.device("meta"))
    return sum(t.numel() * t.element_size() for t in (source, output, *filters))


def expected(problem: Problem, given: Case) -> tuple[Tensor, ...]:
    """What a plan should write to each part, in float64, by plain PyTorch."""
    parts = dict[int, Tensor]()
    for term, call in zip(problem.terms, given.calls.each, strict=True):
        five = replace(call, a=call.a.unsqueeze(2), b=call.b.unsqueeze(2))
        y = operands.expected(alone(problem, term), five).squeeze(2)
        parts[term.part] = parts[term.part] + y if term.part in parts else y
    return tuple(parts[part] for part in sorted(parts))


def wrong(problem: Problem, p: BranchesPlan, given: Case, want: tuple[Tensor, ...]) -> str | None:
    """How what a plan writes differs from what it should be, in words; None where it does not."""
    _, writes = _slices(problem)
    with check.poisoned(), execute._on_device(given.output.device):  # copies too
        given.bound(p).into(operands.poison(given.output), *given.given)
    for part, (channels, right) in enumerate(zip(writes, want, strict=True)):
        got = _slice(given.output, channels)
        depth = sum(check.depth(term.geometry, problem.role) for term in problem.terms if term.part == part)
        bound = check.tolerance(right, depth, got.dtype, problem.precision, got.device)
        error = torch.nan_to_num((got.to(right.dtype) - right).abs(), nan=torch.inf, posinf=torch.inf)
        found = operands.where(error, error > bound, f"within rounding in part {part}")
        if found:
            return found
    return None


def prepared(p: BranchesPlan, given: Case) -> dict[str, Tensor]:
    """The tensors as the plan's kernel takes them."""
    with execute._on_device(given.output.device):
        (one,) = given.bound(p).each
        return one.laid(given.output, *given.given)


# ---------------------------------------------------------------------------------------------------------------------
# What an entry is of

_TERM = re.compile(r"(\d+)>(\d+) (\d+)x(\d+)(?: stride (\d+)x(\d+))?(?: dilation (\d+)x(\d+))?(?: groups (\d+))?")


def problem_of(entry: Entry, device: Device) -> Problem:
    """A problem that is filed under the entry, on dense operands.

    Raises ValueError for numbers that no branches have.
    """
    key, sides = entry.key, re.fullmatch(r"(\d+) to (\d+): (.+)", entry.key.variant)
    terms = list[Term]()
    for part, summed in enumerate(sides[3].split(" | ") if sides else ()):
        for words in summed.split(" + "):
            found = _TERM.fullmatch(words)
            if found is None:
                raise ValueError(f"no convolution is {words!r}")
            C, K, R, S, *rest = (int(number or 1) for number in found.groups())
            g = _geometry(entry, C, K, (R, S), (rest[0], rest[1]), (rest[2], rest[3]), rest[4])
            filters = ways.dense_strides(g.shape("w"), key.channels_last)
            terms.append(Term(len(terms), part, g, filters, key.role == Role.FPROP.value))
    if not terms or sides is None:
        raise ValueError("no branches have such numbers")
    x, y = (int(sides[1]), *entry.extents.input), (int(sides[2]), *entry.extents.output)
    x_strides, y_strides = (ways.dense_strides((entry.extents.N, *side), key.channels_last) for side in (x, y))
    what = (Role(key.role), tuple(terms), key.dtype, key.precision, x_strides, y_strides, (x[0], y[0]))
    return Problem(*what, aligned=True, alignable=True, device=device)


def _geometry(
    entry: Entry,
    C: int,
    K: int,
    taps: tuple[int, int],
    stride: tuple[int, int],
    dilation: tuple[int, int],
    groups: int,
) -> ConvGeometry:
    """Of one of the branches, with padding as the extents want it."""
    N, inputs, outputs = entry.extents
    if min(N, C, K, *taps, *stride, *dilation, groups, *inputs, *outputs) < 1 or C % groups or K % groups:
        raise ValueError("no branches have such numbers")
    walk = [(1, *axes) for axes in (taps, stride, dilation)]
    padding = []
    for i, o, r, step, apart in zip(inputs, outputs, *walk, strict=True):
        missing = max((o - 1) * step + apart * (r - 1) + 1 - i, 0)
        padding.append((missing // 2, missing - missing // 2))
    return ConvGeometry(N, C, K, groups, inputs, walk[0], outputs, walk[1], tuple(padding), walk[2], ("zeros",) * 3)
