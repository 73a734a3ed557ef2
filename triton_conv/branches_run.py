"""From the operands of several convolutions to numbers: in one launch, one after the other, or in plain torch.

As `execute` is for one: output strides come from `empty_output`, for real and fake tensors alike.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._prims_common import suggest_memory_format

from . import branches_plan, branches_ways, execute, invariance, plan, recovery, reference
from .branches_plan import BranchesPlan
from .branches_problem import MOST_TERMS, Problem, Term
from .devices import Device
from .execute import Call
from .geometry import Role

Slice = tuple[int, int]  # (first channel, how many)


class Calls(NamedTuple):
    """Convolutions of one role that read slices of `source` and add to slices of an output with `channels` channels.

    The output is zero where none writes. It is channels-last where the source or one of `filters` is.
    """

    source: Tensor
    filters: tuple[Tensor, ...]
    each: tuple[Call, ...]
    reads: tuple[Slice, ...]
    slices: tuple[Slice, ...]
    channels: int

    @property
    def role(self) -> Role:
        return self.each[0].role


def empty_output(calls: Calls) -> Tensor:
    """An uninitialised output."""
    for call in calls.each:
        execute.record(call)
    wanted = (suggest_memory_format(t) == torch.channels_last for t in (calls.source, *calls.filters))
    memory_format = torch.channels_last if any(wanted) else torch.contiguous_format
    shape = [calls.each[0].geometry.N, calls.channels, *calls.each[0].output_shape[2:]]
    source = calls.source
    return torch.empty(shape, dtype=source.dtype, device=source.device, memory_format=memory_format)


def run(calls: Calls, one_launch: bool | None) -> tuple[Tensor, Bound | None]:
    """The output of several convolutions, and what computes it another time, if that is known.

    Raises RuntimeError where one launch is asked for and cannot be had, but for input gradients, which nobody calls.
    """
    output = empty_output(calls)
    if output.numel() == 0:
        return output, None
    device = execute.device_of(calls.source.device)
    if device is None:
        return _plain(calls, output), None
    if one_launch is not False:
        bound = _together(calls, output, device, bool(one_launch))
        if isinstance(bound, Bound):
            return output, bound
        if bound and one_launch and calls.role is Role.FPROP:
            raise RuntimeError(f"one launch cannot compute these branches: {bound} ({_sizes(calls)})")
    return _one_by_one(calls, output), None


def _together(calls: Calls, output: Tensor, device: Device, wanted: bool) -> Bound | str:
    """What has computed the output in one launch; or what keeps it from that, in words, "" where it is not worth it."""
    failed = ""
    while True:
        plans = _plans(calls, output, device)
        if isinstance(plans, str) or not (wanted or all(branches_plan.worth_it(p.asked) for p in plans)):
            return plans if isinstance(plans, str) else ""
        if failed and any(recovery.known_against(p.asked, p) for p in plans):
            return failed
        try:
            bound = Bound(calls, plans, output, device)
            with execute._on_device(output.device):
                bound.into(output, calls.source, calls.filters, [call.bias for call in calls.each])
            return bound
        except Exception as error:
            for p in plans[:1] if recovery.is_cache(error) else plans:
                recovery.heed(p.asked, p, error)
            failed = f"{type(error).__name__}: {error}"


def _sizes(calls: Calls) -> str:
    filters = ", ".join(str(list(w.shape)) for w in calls.filters)
    return f"input {list(calls.source.shape)} of {calls.source.dtype}, weights {filters}"


def _bunches(calls: Calls) -> list[tuple[Call, ...]]:
    """At most as many together as a launch takes, those of one slice side by side."""
    order = sorted(range(len(calls.each)), key=lambda i: calls.slices[i])
    return [tuple(calls.each[i] for i in order[k : k + MOST_TERMS]) for k in range(0, len(order), MOST_TERMS)]


def problems(calls: Calls, output: Tensor, device: Device) -> list[Problem] | str:
    """The problems of all launches, or what keeps the convolutions from any, in words."""
    call = calls.each[0]
    dtype = str(call.a.dtype).removeprefix("torch.")
    if call.a.is_complex() or any(0 in (c.a.numel(), c.b.numel()) for c in calls.each):
        return f"there are no sums of {dtype}" if call.a.is_complex() else "an operand is empty"
    slices = sorted(set(calls.slices))
    if any(a + n > b for (a, n), (b, _) in pairwise(slices)):
        return "slices overlap"
    if len(slices) < len(calls.each) and len(calls.each) > MOST_TERMS:
        return f"a sum has more than {MOST_TERMS} branches"
    precision = (call.precision or execute.default_precision()) if dtype == "float32" else "ieee"
    source, written = execute._strides(calls.source), execute._strides(output)
    x, y = (source, written) if call.role is Role.FPROP else (written, source)
    sides = (calls.source.shape[1], output.shape[1])
    channels = sides if call.role is Role.FPROP else sides[::-1]
    vector = 16 // output.element_size()
    whole = all(first % vector == 0 for first, _ in (*slices, *calls.reads))
    places = {id(c): i for i, c in enumerate(calls.each)}
    found = []
    for bunch in _bunches(calls):
        numbers = [places[id(c)] for c in bunch]
        terms = tuple(
            Term(i, slices.index(calls.slices[i]), c.geometry, execute._strides(c.b), c.bias is not None)
            for i, c in zip(numbers, bunch, strict=True)
        )
        alignable = whole and all(_aligned(c.b) for c in bunch)
        views = (t for i in numbers for t in (calls.each[i].a, _slice(output, calls.slices[i])))
        aligned = all(_aligned(c.b) for c in bunch) and all(map(_aligned, views))
        problem = Problem(call.role, terms, dtype, precision, x, y, channels, aligned, alignable, device)
        why = branches_ways.obstacle(problem)
        if why:
            return why
        found.append(problem)
    return found


def _aligned(t: Tensor) -> bool:
    start = t.storage_offset() * t.element_size() if t.device.type == "meta" else t.data_ptr()
    return start % 16 == 0


def _plans(calls: Calls, output: Tensor, device: Device) -> list[BranchesPlan] | str:
    found = problems(calls, output, device)
    return found if isinstance(found, str) else [branches_plan.make(problem) for problem in found]


def _slice(t: Tensor, channels: Slice) -> Tensor:
    return t if channels == (0, t.shape[1]) else t.narrow(1, *channels)


def _covered(calls: Calls) -> bool:
    return sum(count for _, count in set(calls.slices)) == calls.channels


class _Bound(NamedTuple):
    """The launches of one plan, and how what they are given is made: names with the channels that they stand for."""

    launches: tuple[Any, ...]  # `kernels.direct.Direct`
    reads_copy: bool
    writes_copy: bool
    parts: list[tuple[str, Slice]]
    terms: list[tuple[str, Slice, str, int]]
    with_bias: dict[int, str]
    packs: frozenset[int]

    def laid(
        self, output: Tensor, source: Tensor, filters: Sequence[Tensor], biases: Sequence[Tensor | None]
    ) -> dict[str, Tensor]:
        """The tensors as the plan's kernel takes them, copies of them where it needs these."""
        last = torch.channels_last
        given = source.contiguous(memory_format=last) if self.reads_copy else source
        target = torch.empty_like(output, memory_format=last) if self.writes_copy else output
        tensors = {name: _slice(target, channels) for name, channels in self.parts}
        for name, channels, flt, number in self.terms:
            w = filters[number]
            tensors[name] = _slice(given, channels)
            tensors[flt] = w.permute(0, 2, 3, 1).contiguous() if number in self.packs else w
        for number, name in self.with_bias.items():
            bias = biases[number]
            assert bias is not None
            tensors[name] = bias.contiguous()
        return tensors


class Bound:
    """Launches without their tensors: those of any call with operands and parameters alike.

    Operands are alike that have the same shapes, strides, dtypes, devices and alignment.
    """

    def __init__(self, calls: Calls, plans: Sequence[BranchesPlan], output: Tensor, device: Device):
        self.device = device  # held: its identity is part of a key
        self.shape, self.strides, self.covered = output.shape, output.stride(), _covered(calls)
        read, written = ("x", "y") if calls.role is Role.FPROP else ("y", "x")
        parts = sorted(set(calls.slices))
        self.each = [
            _Bound(
                p.direct,
                read in p.moves,
                written in p.moves,
                [(f"{written}{part}", parts[part]) for part in sorted({term.part for term in p.order})],
                [(f"{read}{t.number}", calls.reads[t.number], f"w{t.number}", t.number) for t in p.order],
                {t.number: f"bias{t.number}" for t in p.order if t.has_bias},
                frozenset(p.packs),
            )
            for p in plans
        ]

    def __call__(self, source: Tensor, filters: Sequence[Tensor], biases: Sequence[Tensor | None]) -> Tensor:
        output = source.new_empty_strided(self.shape, self.strides)
        with execute._on_device(output.device):
            return self.into(output, source, filters, biases)

    def into(
        self, output: Tensor, source: Tensor, filters: Sequence[Tensor], biases: Sequence[Tensor | None]
    ) -> Tensor:
        if not self.covered:
            output.zero_()
        for one in self.each:
            tensors = one.laid(output, source, filters, biases)
            for launch in one.launches:
                launch.run(tensors)
            for name, channels in one.parts if one.writes_copy else ():
                _slice(output, channels).copy_(tensors[name])
        return output


def _one_by_one(calls: Calls, output: Tensor) -> Tensor:
    """Each by its own kernel, into its slice where the kernel can write there; what belongs together is added up."""
    apart = [_apart(channels, calls.slices) for channels in calls.slices]
    if not all(apart) or not _covered(calls):
        output.zero_()
    written: set[Slice] = set()
    for call, channels, alone in zip(calls.each, calls.slices, apart, strict=True):
        y = _slice(output, channels)
        if alone and channels not in written:
            _write(call, y)
        else:
            y += execute.execute(call)
        written.add(channels)
    return output


def _apart(mine: Slice, slices: Sequence[Slice]) -> bool:
    """Whether every slice is this one or has no channel in common with it."""
    return all(s == mine or s[0] >= sum(mine) or mine[0] >= sum(s) for s in slices)


def _write(call: Call, y: Tensor) -> None:
    """The output of one call, into a slice."""
    device = execute.device_of(y.device)
    direct = device is not None and not call.a.is_complex() and invariance.batch() is None
    if not direct or 0 in (call.a.numel(), call.b.numel()):
        y.copy_(execute.execute(call))
        return
    assert device is not None
    problem = execute.problem_of(call, device, y)
    p = plan.make(problem)
    rows = 16 // y.element_size()
    if p.rival_runs or any(stride % rows for stride in (y.stride(0), *y.stride()[2:]) if y.stride(1) == 1):
        y.copy_(execute.execute(call))
        return
    made = execute.computed(problem, call, [y])
    if made is not y:  # a setting has been changed meanwhile
        y.copy_(made)


def _plain(calls: Calls, output: Tensor) -> Tensor:
    """In plain torch, sums in the type that sums have and rounded once."""
    wide = reference.wide_of(output.dtype)
    if len(set(calls.slices)) == len(calls.slices) and _covered(calls):
        for call, channels in zip(calls.each, calls.slices, strict=True):
            _slice(output, channels).copy_(execute.execute(call))
        return output
    total = torch.zeros_like(output, dtype=wide)
    for call, channels in zip(calls.each, calls.slices, strict=True):
        bias = None if call.bias is None else call.bias.to(wide)
        y = _slice(total, channels)
        y += execute.execute(replace(call, a=call.a.to(wide), b=call.b.to(wide), bias=bias))
    return output.copy_(total)
