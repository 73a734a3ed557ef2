"""Plans that are run and compared with float64, compiled before by other processes."""

from __future__ import annotations

import faulthandler
import math
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from triton_conv import backends, check, devices, execute, plan, ways
from triton_conv.devices import Device
from triton_conv.explain import AnyPlan
from triton_conv.geometry import ConvGeometry, Strides
from triton_conv.plan import Plan
from triton_conv.tuning import audit, on_device, operands
from triton_conv.tuning.ahead import Ahead
from triton_conv.tuning.code import TARGETS
from triton_conv.ways import Problem

from .record import Facts
from .units import Context

_WINDOW = 64  # units whose plans are compiled ahead of the one that runs
HANG = 45.0  # seconds that compiled kernels and their references are far from taking, cuDNN's choice included
_SPLITS = 3  # slabs in the interpreter, at most: each is a program


def device_of(context: Context) -> Device:
    """What plans are made for; where the reference runs, an H200."""
    return execute.device_of(context.device) or devices.H200


class Compiler:
    """Compiles plans of units in other processes, a window of units ahead of the one that runs.

    In a simulation nothing is compiled, nor where a target is unknown or processes do not start.
    """

    def __init__(self, context: Context):
        self.device = device_of(context)
        known = not context.simulate and self.device.capability in TARGETS
        self._ahead = Ahead(self.device.capability) if known else None
        self._plans: dict[str, Callable[[], Sequence[AnyPlan]]] = {}
        self._expected: set[str] = set()
        self._rows: dict[AnyPlan, list[audit.Row]] = {}

    def add(self, name: str, plans: Callable[[], Sequence[AnyPlan]]) -> None:
        """Says what a unit will run; units are added in the order in which they run."""
        self._plans[name] = plans

    def compiled(self, name: str) -> tuple[list[str], list[str]]:
        """What of a unit's plans could not be compiled and read, and what their code takes too much of, in words.

        Whether a kernel runs is for its launch to say, not for the tools that read its code; but see `deadly`.
        """
        if self._ahead is None:
            return [], []
        names = list(self._plans)
        first = names.index(name)
        errors: list[str] = []
        notes: list[str] = []
        try:
            for one in names[first : first + _WINDOW]:
                if one not in self._expected:
                    self._expected.add(one)
                    self._ahead.expect_too(p for p in self._some(one) if p not in self._rows)
            for p in self._some(name):
                if p not in self._rows:  # asked again, it would wait behind all that is expected
                    self._rows[p] = self._ahead.rows(p)
                for row in self._rows[p]:
                    if row.code is None:
                        errors.append(f"{row.kernel}: {row.error}")
                    else:
                        notes += [f"{row.kernel} {words}" for words in audit.excesses(row.code, self.device)]
        except RuntimeError as error:
            print(f"nothing is compiled ahead any more: {error}", file=sys.stderr)
            self._ahead = None
        return errors, notes

    def _some(self, name: str) -> list[Any]:
        try:
            return list(self._plans[name]())
        except Exception as error:  # which the unit itself will meet
            print(f"no plans of {name}: {error}", file=sys.stderr)
            return []


def reduced(problem: Problem, images: int, positions: int, channels: int = 0) -> Problem:
    """The same kind of problem with fewer images and, along each axis, fewer positions of the output.

        >>> problem = explain.problems((32, 64, 56, 57), (64, 64, 3, 3), stride=2, padding=1)["forward"]
        >>> reduced(problem, 2, 8).geometry.input
        (1, 15, 16)

    Filters, borders and the order of axes in memory stay, and what of the input is left over. Channels stay too, or are
    about as many as given, with what was left over beyond them; of narrow groups some stay.
    """
    g = problem.geometry
    outputs, inputs = [], []
    for i, o, stride, pads, mode in zip(g.input, g.output, g.stride, g.padding, g.modes, strict=True):
        least = 1 if mode == "zeros" else max(pads) + 1  # what borders of other modes read
        fewer = min(o, max(positions, o - (i - least) // stride))
        fewer = max(fewer, o - (i - 1) // stride)
        outputs.append(fewer)
        inputs.append(i - (o - fewer) * stride)
    small = replace(g, N=min(g.N, images), input=tuple(inputs), output=tuple(outputs))
    if channels:
        depthwise = g.groups == g.C > 1
        groups = min(g.groups, channels // 2 if depthwise else 8)
        C, K = (n // g.groups if depthwise else _fewer(n // g.groups, channels) for n in (g.C, g.K))
        small = replace(small, groups=groups, C=groups * C, K=groups * K)
    return problem._replace(geometry=small, strides=_like(g, problem.strides, small))


def _fewer(count: int, most: int) -> int:
    return count if count <= most else most + count % most % 16


def _like(old: ConvGeometry, strides: Strides, new: ConvGeometry) -> Strides:
    """Dense strides of another geometry, channels first or last in memory as they were."""
    last = {name: getattr(strides, name)[1] == 1 and old.shape(name)[1] > 1 for name in "xwy"}
    return Strides(*(ways.dense_strides(new.shape(name), last[name]) for name in "xwy"))


def same_way(problem: Problem, p: Plan, own: bool) -> Plan:
    """The plan of another problem that goes the way of `p`: with its config, or with one of its own if there is one.

    Raises ValueError where there is none.
    """
    config = replace(p.config, splits=min(p.config.splits, _SPLITS)) if own else p.config
    for found in plan.every(problem):
        if (found.kernel, found.packs, found.bundle) == (p.kernel, p.packs, p.bundle):
            if own:
                return found
            if not ways.misfit(problem, found.kernel, found.layout, config):
                return plan.with_config(problem, found, config)
    try:
        found = plan.every(problem, config)[0]
    except RuntimeError as error:
        raise ValueError(str(error)) from error
    if found.kernel != p.kernel or ways.misfit(problem, found.kernel, found.layout, config):
        raise ValueError(f"{p.kernel} with {config} cannot run {problem.geometry}")
    return found


_MOST_FLOPS = 4e11  # of a reference in float64: a few hundredths of a second
_SMALL = (2, 5, 32)  # images, positions of an axis and channels in the interpreter
_LONG = (1, 4, 8)  # the same where filters have hundreds of taps


def small_plan(problem: Problem, p: Plan, context: Context) -> tuple[Problem, Plan]:
    """A problem that takes moments, and the plan for it that goes the way of `p`.

    On a device it is the problem itself, with fewer images where a reference would take long, and the very config.
    """
    g = problem.geometry
    if context.simulate:
        less = reduced(problem, *(_LONG if g.taps > 64 else _SMALL))
        return less, same_way(less, p, own=True)
    images = max(min(g.N, int(_MOST_FLOPS * g.N / g.flops)), 1)
    if images == g.N:
        return problem, p
    less = reduced(problem, images, max(g.output))
    return less, same_way(less, p, own=False)


def compare(problem: Problem, p: Plan, context: Context, compiler: Compiler, name: str) -> Facts:
    """Facts of a unit: whether a plan computes what it should, and by how much cuDNN is off where it can compute it."""
    errors, notes = compiler.compiled(name)
    facts: Facts = {"kernel": p.kernel, "config": str(p.config), "geometry": str(problem.geometry)}
    facts |= {"code": notes + errors} if notes + errors else {}
    if deadly(errors):
        return {"ok": False, "words": f"does not compile: {'; '.join(errors)}", **facts}
    with watched(context):
        return _compared(problem, p, context, facts)


def deadly(errors: Sequence[str]) -> bool:
    """Whether one of these errors of compilers would end this process too."""
    return any(audit.DIED in error for error in errors)


@contextmanager
def watched(context: Context, seconds: float = HANG) -> Iterator[None]:
    """Ends the process if what is inside takes longer, and prints where it was: a kernel hangs, which nothing stops."""
    if context.device.type == "cuda":
        faulthandler.dump_traceback_later(seconds, exit=True)
    try:
        yield
    finally:
        if context.device.type == "cuda":
            faulthandler.cancel_dump_traceback_later()


def _compared(problem: Problem, p: Plan, context: Context, facts: Facts) -> Facts:
    call, output = operands.operands(problem, context.device, seed=0)
    want = operands.expected(problem, call)
    wrong = operands.wrong(problem, p, call, output, want)
    if wrong:
        return {"ok": False, "words": f"{p.kernel} {p.config}: {wrong}", **facts}
    if not output.is_floating_point():
        return {"ok": True, "words": f"{p.kernel}, exact", **facts}
    if problem.has_scale:  # matrix units add 8-bit floats less precisely: another tolerance, which has been kept
        return {"ok": True, "words": f"{p.kernel}, within rounding", **facts}
    ours = share(problem, output, want)
    theirs = cudnn_share(problem, call, output, want)
    facts |= {"share": ours, "cudnn_share": theirs}
    words = f"{p.kernel}, worst error {ours:.0%} of what rounding allows"
    return {"ok": True, "words": words if theirs is None else f"{words}, cuDNN's {theirs:.0%}", **facts}


def share(problem: Problem, output: Tensor, want: Tensor) -> float:
    """The worst error as a share of its tolerance."""
    depth = check.depth(problem.geometry, problem.role)
    bound = check.tolerance(want, depth, output.dtype, problem.precision, output.device)
    return worst(output, want, bound)


def worst(output: Tensor, want: Tensor, bound: Tensor) -> float:
    """The largest error as a share of its bound; of what is not finite, infinity."""
    errors = (output.detach().to(want.dtype) - want.detach()).abs() / bound.detach()
    return float(torch.nan_to_num(errors, nan=math.inf, posinf=math.inf).max()) if errors.numel() else 0.0


def cudnn_share(problem: Problem, call: execute.Call, output: Tensor, want: Tensor) -> float | None:
    """The same of PyTorch's own convolution; None where that computes something else, or nothing."""
    if not backends.comparable(problem) or want.device.type != "cuda":
        return None
    try:
        with backends.cudnn(precision="tf32" if problem.precision == "tf32" else "ieee"):
            theirs = on_device.convolution(call, output, ways.reads_channels_last(problem.role, problem.strides))()
    except torch.AcceleratorError:
        raise
    except RuntimeError as error:  # no algorithm, or no memory for it
        print(f"cuDNN does not compute it: {error}", file=sys.stderr)
        return None
    return share(problem, theirs, want)


def covering(units: Iterable[tuple[object, Any]]) -> list[Any]:
    """Of (kind, unit) the first unit of each kind."""
    first: dict[object, Any] = {}
    for kind, unit in units:
        first.setdefault(kind, unit)
    return list(first.values())
