"""Stage a: what the device reaches at best, and whether each kernel is right, on a layer of every kind."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any, NamedTuple

from triton_conv import explain, plan
from triton_conv.devices import Device
from triton_conv.explain import AnyPlan
from triton_conv.plan import Plan
from triton_conv.tuning.layers import LAYERS, Layer
from triton_conv.ways import Problem

from . import checking, compound, meters, references
from .checking import Compiler
from .record import Facts
from .units import Context, Unit

# Beside those of the audit, whose compiled code modes do not change much.
_CIRCULAR = LAYERS["3x3 circular"]
_MODES = {
    f"3x3 {mode}": _CIRCULAR._replace(options={**_CIRCULAR.options, "padding_mode": mode})
    for mode in ("reflect", "replicate")
}

NAME = "a"
ABOUT = "ceilings of the device, and every kernel once against float64"
LIMIT = 300.0

_CEILINGS = 5  # copies, and products of four kinds of numbers


class Check(NamedTuple):
    """A layer's operation to check; `kind` is what is the same for those that run the same code paths."""

    name: str
    kind: tuple
    layer: Layer
    title: str
    plan: AnyPlan
    problem: Problem | None = None


def units(context: Context) -> Iterator[Unit]:
    yield Unit("ceilings", partial(_ceilings, context))
    compiler = Compiler(context)
    found, first = checks(context), len(checks(context, of_new_kinds=True))
    yield from _units_of(found[:first], context, compiler)
    yield from compound_units(context, compiler)
    yield from _units_of(found[first:], context, compiler)


def _units_of(found: list[Check], context: Context, compiler: Compiler) -> Iterator[Unit]:
    for check in found:
        compiler.add(check.name, partial(_plans, check, context))
        yield Unit(check.name, partial(_run, check, context, compiler), kernel=check.plan.kernel)


def compound_units(context: Context, compiler: Compiler) -> Iterator[Unit]:
    """Of layers that are more than a convolution."""
    for job in compound.few(compiler.device) if context.simulate else compound.jobs():
        name = f"{job.name}, {job.op}"
        compiler.add(name, partial(compound.planned, job, compiler.device))
        kernel = compound.family(job, compiler.device)
        yield Unit(name, partial(compound.compared, job, context, compiler, name), kernel=kernel)


def checks(context: Context, of_new_kinds: bool = False) -> list[Check]:
    """One of every operation of every layer; those of new kinds first, in a simulation they alone."""
    found = every(checking.device_of(context))
    first = checking.covering((check.kind, check) for check in found)
    return first if context.simulate or of_new_kinds else first + [check for check in found if check not in first]


def every(device: Device) -> list[Check]:
    """Operations of the layers that the audit reads, one of every kind that people train."""
    found = []
    for name, layer in {**LAYERS, **_MODES}.items():
        if device.capability < layer.since or compound.compound(layer):
            continue
        if layer.options.get("causal"):
            of_layer: Any = explain.plans(layer.input, layer.weight, device=device, bias=True, **layer.options)
            rows = layer.options["channels_last"]
            found += [Check(f"{name}, {title}", (p.kernel, rows), layer, title, p) for title, p in of_layer.items()]
        elif "pointwise" in layer.options:
            of_layer = explain.plans(layer.input, layer.weight, device=device, bias=True, **layer.options)
            title, p = next(iter(of_layer.items()))
            found.append(Check(f"{name}, fused", (p.kernel,), layer, title, p))
        else:
            problems = explain.problems(layer.input, layer.weight, device=device, bias=True, **layer.options)
            for title, problem in problems.items():
                p = plan.make(problem)
                found.append(Check(f"{name}, {title}", _kind(p), layer, title, p, problem))
    return found


def _kind(p: Plan) -> tuple:
    width = p.dtype if p.dtype in ("float8_e4m3fn", "int8") else ""
    modes = {mode for mode in p.asked.modes if mode != "zeros"}
    return p.kernel, p.role, p.bundle > 1, width, *(sorted(modes) if p.kernel in ("box", "gather") else ())


def _ceilings(context: Context) -> Facts:
    found = meters.of(context).ceilings()
    words = ", ".join(f"{name} {value / 1e12:.3g} T/s" for name, value in found.items())
    ok = len(found) == _CEILINGS and all(value > 0 for value in found.values())
    return {"ok": ok, "words": words, "ceilings": found}


def _plans(check: Check, context: Context) -> list[AnyPlan]:
    if check.problem is None:
        return [check.plan]
    assert isinstance(check.plan, Plan)
    return [checking.small_plan(check.problem, check.plan, context)[1]]


def _run(check: Check, context: Context, compiler: Compiler) -> Facts:
    if check.problem is not None:
        assert isinstance(check.plan, Plan)
        problem, p = checking.small_plan(check.problem, check.plan, context)
        return checking.compare(problem, p, context, compiler, check.name)
    errors, notes = compiler.compiled(check.name)
    if checking.deadly(errors):
        return {"ok": False, "words": f"does not compile: {'; '.join(errors)}", "code": notes}
    size = (2, 48, 12) if context.simulate else (2, 512, 4096)
    layer = references.smaller(check.layer, *size)
    with checking.watched(context):
        if check.layer.options.get("causal"):
            return references.causal(layer, check.title, context.device)
        return references.separable(layer, context.device)
