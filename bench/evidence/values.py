"""Stage b: values of everything against float64: cases of every shape, configs that ship, and these at eight warps."""

from __future__ import annotations

import math
import sys
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import replace
from functools import partial
from itertools import islice

import torch

from triton_conv import backends, check, execute, explain, plan, stored, ways
from triton_conv.check import CASES, Case
from triton_conv.config import BoxConfig
from triton_conv.devices import DEVICES, Device, known
from triton_conv.key import CONFIGS
from triton_conv.plan import Plan
from triton_conv.stored import Entry
from triton_conv.tuning import verify
from triton_conv.tuning.layers import LAYERS
from triton_conv.ways import Layout, Problem

from ..jobs import Job, small
from . import checking, compound, fuzzed, record, single_numbers
from .checking import Compiler
from .record import Facts
from .units import Context, Unit

NAME = "b"
ABOUT = "values against float64 and cuDNN: all cases, all configs that ship, and these at eight warps"
LIMIT = 470.0

SEED = 20
RANDOM, CHUNK = 240, 8  # random cases, and how many of them make a unit
_EIGHT = "8 warps"


def units(context: Context) -> Iterator[Unit]:
    compiler = Compiler(context)
    table = [[number] for number in range(len(CASES))]
    drawn = [list(range(n, n + CHUNK)) for n in range(len(CASES), len(CASES) + RANDOM, CHUNK)]
    found = shipped(compiler.device)
    eight = _distinct(found)
    if context.simulate:
        table, drawn = table[::25], [[len(CASES) + 1, len(CASES) + 2]]
        found = checking.covering((kernel, (kernel, entry)) for kernel, entry in found)
        eight = found[::3]
    yield from _units_of_cases(table, context, compiler)
    for name, kernel, entry in _named("shipped", found):
        compiler.add(name, partial(_plans, kernel, entry, context, 0))
        yield Unit(name, partial(_config, name, kernel, entry, context, compiler), kernel=kernel)
    for axis in range(4)[:: 3 if context.simulate else 1]:
        name = f"box_wgrad, runs along {'NDHW'[axis]}"
        compiler.add(name, partial(_plans_of_run, axis, context))
        yield Unit(name, partial(_compared, name, axis, context, compiler), kernel="box_wgrad")
    for name, kernel, entry in _named(_EIGHT, eight):
        compiler.add(name, partial(_plans, kernel, entry, context, 8))
        yield Unit(name, partial(_eight_warps, name, kernel, entry, context, compiler), kernel=f"{kernel}, {_EIGHT}")
    yield from _units_of_twins(context, compiler)
    yield Unit(f"{_EIGHT}, all together", partial(_together, context))
    yield from single_numbers.units(context)
    if not context.simulate:
        yield from _units_of_small_ones(context, compiler)
    yield from _units_of_cases(drawn, context, compiler)
    yield from fuzzed.units(context)


def _named(what: str, found: list[tuple[str, Entry]]) -> Iterator[tuple[str, str, Entry]]:
    """With a name for each unit, no two the same."""
    seen: Counter[str] = Counter()
    for kernel, entry in found:
        name = f"{what} {kernel}: {verify.described(entry)}"
        seen[name] += 1
        yield (name if seen[name] == 1 else f"{name}, {seen[name]}"), kernel, entry


# ---------------------------------------------------------------------------------------------------------------------
# Layers that are more than a convolution


def _units_of_small_ones(context: Context, compiler: Compiler) -> Iterator[Unit]:
    """Of few channels and positions, with tails."""
    for job in map(small, compound.jobs()):
        name = f"small {job.name}, {job.op}"
        compiler.add(name, partial(compound.planned, job, compiler.device))
        kernel = compound.family(job, compiler.device)
        yield Unit(name, partial(compound.compared, job, context, compiler, name), kernel=kernel)


def _units_of_twins(context: Context, compiler: Compiler) -> Iterator[Unit]:
    """At eight warps."""
    found: Iterable[Job] = compound.few(compiler.device) if context.simulate else compound.jobs()
    for job in islice(found, 1 if context.simulate else None):
        name = f"{_EIGHT} {job.name}, {job.op}"
        compiler.add(name, partial(compound.planned, job, compiler.device, 8))
        kernel = f"{compound.family(job, compiler.device)}, {_EIGHT}"
        yield Unit(name, partial(_compound_twin, job, context, compiler, name), kernel=kernel)


def _compound_twin(job: Job, context: Context, compiler: Compiler, name: str) -> Facts:
    try:
        compound.planned(job, compiler.device, 8)
    except RuntimeError as error:
        return {"ok": True, "words": f"cannot have eight warps: {error}", "right": None}
    return _as_finding(compound.compared(job, context, compiler, name, 8))


# ---------------------------------------------------------------------------------------------------------------------
# Cases, by the public functions


def _units_of_cases(chunks: list[list[int]], context: Context, compiler: Compiler) -> Iterator[Unit]:
    for numbers in chunks:
        first = check.numbered_case(numbers[0], SEED)
        name = f"case {numbers[0]}: {first}" if len(numbers) == 1 else f"random cases {numbers[0]} to {numbers[-1]}"
        compiler.add(name, partial(_plans_of_cases, numbers, compiler.device))
        yield Unit(name, partial(_cases, name, numbers, context, compiler))


def _cases(name: str, numbers: list[int], context: Context, compiler: Compiler) -> Facts:
    errors, notes = compiler.compiled(name)
    if checking.deadly(errors):
        return {"ok": False, "words": f"does not compile: {'; '.join(errors)}", "code": notes}
    most, theirs, wrong, done = 0.0, None, list[str](), 0
    for number in numbers:
        if context.left() < 0 and len(numbers) > 1:
            return {"ok": not wrong, "words": f"the time was up after {done} cases", "unfinished": True}
        case = check.numbered_case(number, SEED)
        try:
            with checking.watched(context):
                results, rival = _case(case, number, context)
        except torch.AcceleratorError as error:  # the process ends with it
            raise RuntimeError(f"case {number}, {case}: {error}") from error
        except Exception as error:
            wrong.append(f"case {number}, {case}: {type(error).__name__}: {str(error)[:300]}")
            if not _answers(context):
                raise RuntimeError(f"{wrong[-1]}; the device answers no more") from error
            continue
        done += 1
        most = max([most, *(result.share for result in results)])
        theirs = rival if theirs is None else max(theirs, rival or 0.0)
        wrong += [
            f"case {number}, {case}: {r.name} {r.share:.3g} times too far off: {r.note}" for r in results if not r.ok
        ]
    facts: Facts = {"cases": len(numbers), "share": most, "cudnn_share": theirs, "code": notes + errors}
    if wrong:
        return {"ok": False, "words": "; ".join(wrong[:3]), "wrong": wrong, **facts}
    rivals = "" if theirs is None else f", cuDNN's {theirs:.0%}"
    return {"ok": True, "words": f"right; worst error {most:.0%} of what rounding allows{rivals}", **facts}


def _answers(context: Context) -> bool:
    """Whether the device still does."""
    if context.device.type != "cuda":
        return True
    try:
        torch.cuda.synchronize(context.device)
    except torch.AcceleratorError:
        return False
    return True


def _case(case: Case, number: int, context: Context) -> tuple[list[check.Result], float | None]:
    """What `check.check_case` finds, and the worst error of PyTorch's own convolutions as a share of the tolerance."""
    given = case.operands(SEED * 1_000_003 + number, context.device)
    with check.poisoned(), execute.recording() as calls:
        got = case.run(given)
    want = check.expected(case, given)
    results = [check.compare(case, name, got[name], want[name]) for name in want]
    if context.device.type != "cuda" or case.dtype not in check.FLOATS or number >= len(CASES):
        return results, None
    shares = []
    for call in calls:
        if min(call.a.numel(), call.b.numel(), math.prod(call.output_shape)) == 0:
            continue
        problem = execute.problem_of(call, checking.device_of(context))
        (name,) = case.quantities(call.role)
        if backends.comparable(problem):
            try:
                theirs = _by_cudnn(problem, call, got[name])
            except torch.AcceleratorError:
                raise
            except RuntimeError as error:  # no algorithm for it
                print(f"cuDNN does not compute {name} of {case}: {error}", file=sys.stderr)
            else:
                shares.append(check.compare(case, name, theirs, want[name]).share)
    return results, max(shares, default=None)


def _by_cudnn(problem: Problem, call: execute.Call, output: torch.Tensor) -> torch.Tensor:
    last = ways.reads_channels_last(call.role, problem.strides)
    how = (call.bias, tuple(output.shape), output.stride(), last)
    with backends.cudnn(precision="tf32" if problem.precision == "tf32" else "ieee"):
        return backends.convolve(call.role, call.geometry, call.a, call.b, *how)


def _plans_of_cases(numbers: list[int], device: Device) -> list[Plan]:
    """From shapes alone; complex cases, made of several real ones, are compiled when they run."""
    found = []
    for number in numbers:
        case = check.numbered_case(number, SEED)
        if case.dtype.is_complex:
            continue
        with execute.recording() as calls:
            case.run(case.operands(0, "meta"))
        for call in calls:
            if min(call.a.numel(), call.b.numel(), math.prod(call.output_shape)) > 0:
                found.append(plan.make(execute.problem_of(call, device)))
    return found


# ---------------------------------------------------------------------------------------------------------------------
# Configs, each on the problem that it is filed under


def shipped(device: Device) -> list[tuple[str, Entry]]:
    """(kernel, entry) of what ships for a device, or for the known one that is most like it."""
    kin = known(device.name, device.multiprocessors) or min(
        DEVICES.values(),
        key=lambda d: (abs(d.capability - device.capability), abs(d.multiprocessors - device.multiprocessors)),
    )
    directory = stored.shipped_directory()
    found = []
    for kernel in CONFIGS:
        if kernel.startswith("deform") or kernel.endswith("_branches"):  # whose values are another stage's
            continue
        for entry in stored.read(stored.path_of(directory, kin.name, kernel), kernel, [kin.name]):
            found.append((kernel, entry))
    return found


def planned(kernel: str, entry: Entry, context: Context, warps: int = 0) -> tuple[Problem, Plan]:
    """The problem of an entry and the plan that goes by its winner, with so many warps where they are given.

    Raises ValueError, in words, where there is none.
    """
    device = checking.device_of(context)
    problem, p = verify.problem_of(entry, device), verify.plan_of(entry, kernel, device)
    if warps:
        config = replace(p.config, num_warps=warps)
        layout = Layout(p.packs, p.channels_last, p.bundle, p.geometry, p.strides, p.steps)
        misfit = ways.misfit(problem, kernel, layout, config)
        if misfit:
            raise ValueError(misfit)
        p = plan.with_config(problem, p, config)
    return checking.small_plan(problem, p, context)


def _plans(kernel: str, entry: Entry, context: Context, warps: int) -> list[Plan]:
    return [planned(kernel, entry, context, warps)[1]]


def _config(name: str, kernel: str, entry: Entry, context: Context, compiler: Compiler) -> Facts:
    return checking.compare(*planned(kernel, entry, context), context, compiler, name)


def _run_along(axis: int, context: Context) -> tuple[Problem, Plan]:
    """A weight gradient whose box is a run along an axis: then strides of its descriptors are in no order."""
    layer = LAYERS["video"]
    device = checking.device_of(context)
    problem = explain.problems(layer.input, layer.weight, device=device, **layer.options)["weight gradient"]
    box = tuple(16 if n == axis else 1 for n in range(4))
    p = plan.every(problem, BoxConfig(box, 64, 64, num_stages=3))[0]  # type: ignore[arg-type]
    return checking.small_plan(problem, p, context)


def _plans_of_run(axis: int, context: Context) -> list[Plan]:
    return [_run_along(axis, context)[1]]


def _compared(name: str, axis: int, context: Context, compiler: Compiler) -> Facts:
    return checking.compare(*_run_along(axis, context), context, compiler, name)


def _distinct(found: list[tuple[str, Entry]]) -> list[tuple[str, Entry]]:
    """Those that would be other code at eight warps: with another config, or of another kind of problem."""

    def kind(kernel: str, entry: Entry) -> tuple:
        assert entry.winner is not None
        key, config = entry.key, entry.winner.config
        what = (key.role, key.dtype, key.channels_last, key.groups > 1, key.filter, key.stride, key.dilation)
        return kernel, replace(config, splits=min(config.splits, 2)), what

    right = [(kernel, entry) for kernel, entry in found if entry.winner is not None]
    right = [(kernel, entry) for kernel, entry in right if entry.winner and entry.winner.config.num_warps < 8]
    return checking.covering((kind(*one), one) for one in right)


def _eight_warps(name: str, kernel: str, entry: Entry, context: Context, compiler: Compiler) -> Facts:
    """A config that is wrong at eight warps is a finding, not a failure: none ships."""
    try:
        problem, p = planned(kernel, entry, context, 8)
    except ValueError as error:
        return {"ok": True, "words": f"cannot have eight warps: {error}", "right": None}
    return _as_finding(checking.compare(problem, p, context, compiler, name))


def _as_finding(facts: Facts) -> Facts:
    return {**facts, "ok": True, "right": facts["ok"], "words": ("" if facts["ok"] else "WRONG: ") + facts["words"]}


def _together(context: Context) -> Facts:
    """What the units before found, as far as they ran."""
    found = record.read(context.out)
    units = {} if found is None else found.stages.get(NAME, {})
    checked = {name: facts for name, facts in units.items() if name.startswith(f"{_EIGHT} ")}
    wrong = [name for name, facts in checked.items() if facts.get("right") is False or not facts["ok"]]
    right = sum(facts.get("right") is True for facts in checked.values())
    by_kernel = {kernel: _count(checked, kernel) for kernel in CONFIGS}
    words = f"{right} configs are right at eight warps, {len(wrong)} wrong or failed"
    return {"ok": True, "words": words, "right": right, "wrong": wrong, "kernels": by_kernel}


def _count(checked: dict[str, Facts], kernel: str) -> dict[str, int]:
    of_kernel = [facts for name, facts in checked.items() if name.startswith(f"{_EIGHT} {kernel}:")]
    return {"checked": len(of_kernel), "right": sum(facts.get("right") is True for facts in of_kernel)}
