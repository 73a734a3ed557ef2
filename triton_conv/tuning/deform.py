"""Deformable convolutions as the tuner sees them: configs worth measuring, random operands, what is right.

Offsets are odd sixteenths of a pixel: never whole, where the gradient of an offset has two sides.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import replace
from itertools import product
from math import prod

import torch
from torch import Tensor

from .. import check, deform_config, deform_cost, deform_plan, deform_reference, deform_run, plan, ways
from ..config import Config, most_splits
from ..deform_plan import DeformPlan, DeformProblem, DeformRole
from ..devices import Device
from ..geometry import ConvGeometry, Strides
from ..stored import Entry
from ..tiles import ceil_div
from .operands import poison, where

MOST = 48  # configs of a way
_HOPELESS = 4  # times the least predicted time: predictions are not that wrong

Case = dict[str, Tensor]

_WRITTEN = {
    DeformRole.FORWARD: ("y",),
    DeformRole.INPUT: ("x",),
    DeformRole.OFFSET: ("doffset", "dmask"),
    DeformRole.WEIGHT: ("w",),
}


def candidates(problem: DeformProblem, p: DeformPlan) -> list[Config]:
    """The config of a plan, then others of the way that it goes, by predicted time."""
    predicted = {config: deform_plan.with_config(problem, p, config).seconds for config in fitting(problem, p)}
    quickest = sorted(predicted, key=lambda config: (predicted[config], repr(config)))
    likely = [config for config in quickest if predicted[config] <= _HOPELESS * predicted[quickest[0]]]
    return [p.config, *likely][:MOST]


def fitting(problem: DeformProblem, p: DeformPlan) -> list[Config]:
    """The other configs of the way of a plan that fit, the same list for the same plan."""
    rule, found = p.config, list[Config]()
    least = 16 if rule.dot else 1
    for m, n, k in product(*(_around(side, least) for side in (rule.BLOCK_M, rule.BLOCK_N, rule.BLOCK_K))):
        for stages, warps in product((1, 2, 3) if rule.dot else (1,), (4, 8)):
            config = replace(rule, BLOCK_M=m, BLOCK_N=n, BLOCK_K=k, num_stages=stages, num_warps=warps, splits=1)
            found += _sliced(problem, config)
    most = deform_cost.held(problem, rule)  # the rule's tiles are as large as compilers keep in registers
    other = {
        config
        for config in found
        if config != rule and deform_cost.held(problem, config) <= most and deform_plan.misfit(problem, config) is None
    }
    return sorted(other, key=repr)


def _around(side: int, least: int) -> list[int]:
    return sorted({max(side // 2, least), side, 2 * side})


def _sliced(problem: DeformProblem, config: Config) -> Iterator[Config]:
    """A weight gradient's config in one slab, and in so many that programs fill the device once, twice, four times."""
    if problem.role is not DeformRole.WEIGHT:
        yield config
        return
    whole = deform_config.tiles(problem, config)
    most = most_splits(problem.geometry, whole.longest)
    for splits in {1, *(min(ceil_div(n * problem.device.multiprocessors, whole.total), most) for n in (1, 2, 4))}:
        yield replace(config, splits=splits)


_VARIANT = re.compile(r"(\d+) offset groups(, mask)?(?:, offset (\w+))?")


def problem_of(entry: Entry, device: Device) -> DeformProblem:
    """A problem that is filed under the entry, on dense operands.

    Raises ValueError for numbers that no deformable convolution has.
    """
    key, (N, inputs, outputs), variant = entry.key, entry.extents, _VARIANT.fullmatch(entry.key.variant)
    groups = int(variant[1]) if variant else 0
    if not groups or key.C % groups or key.C % key.groups or key.K % key.groups or min(N, key.C, key.K) < 1:
        raise ValueError("no deformable convolution has such numbers")
    padding = []
    for i, o, taps, step, apart in zip(inputs, outputs, key.filter, key.stride, key.dilation, strict=True):
        missing = max((o - 1) * step + apart * (taps - 1) + 1 - i, 0)
        padding.append((missing // 2, missing - missing // 2))
    how = (key.filter, outputs, key.stride, tuple(padding), key.dilation, ("zeros",) * 3)
    g = ConvGeometry(N, key.C, key.K, key.groups, inputs, *how)
    x, w, y = (ways.dense_strides(g.shape(name), key.channels_last) for name in "xwy")
    offset, mask = (ways.dense_strides((N, count * groups * g.taps, *outputs), key.channels_last) for count in (2, 1))
    assert variant is not None
    role = DeformRole(key.role)
    what = (key.dtype, key.precision, Strides(x, w, y), offset, mask if variant[2] else ())
    return DeformProblem(role, g, groups, *what, role is DeformRole.FORWARD, device, variant[3] or key.dtype)


def case(problem: DeformProblem, device: torch.device, seed: int) -> Case:
    """Tensors of the problem's strides: standard normal values, masks in [0, 1], and NaN where a kernel writes."""
    found, generator = _empty(problem, device), torch.Generator(device).manual_seed(seed)
    for name, t in found.items():
        poison(t) if name in _WRITTEN[problem.role] else _fill(t, name, generator)
    return found


def _empty(problem: DeformProblem, device: torch.device) -> Case:
    """The same without values; NaN is what lies between elements."""
    g, made = problem.geometry, dict[str, tuple[tuple[int, ...], tuple[int, ...], str]]()
    for name in "xwy":
        made[name] = (_four(g.shape(name)), _four(getattr(problem.strides, name)), problem.dtype)
    pairs = problem.offset_groups * g.taps
    for name, strides, channels in (("offset", problem.offset, 2 * pairs), ("mask", problem.mask, pairs)):
        for copy in (name, f"d{name}") if problem.role is DeformRole.OFFSET else (name,):
            if strides:
                made[copy] = ((g.N, channels, *g.output[1:]), _four(strides), problem.offset_dtype)
    if problem.has_bias:
        made["bias"] = ((g.K,), (1,), problem.dtype)
    found: Case = {}
    for name, (shape, strides, dtype) in made.items():
        flat = torch.empty(plan.span(shape, strides), dtype=getattr(torch, dtype), device=device)
        found[name] = poison(flat).as_strided(shape, strides)
    return found


def _four(axes: tuple[int, ...]) -> tuple[int, ...]:
    return (*axes[:2], *axes[3:])


def _fill(t: Tensor, name: str, generator: torch.Generator) -> None:
    if name == "offset":
        odd = torch.randint(-32, 32, t.shape, generator=generator, device=t.device)
        t.copy_((2 * odd + 1) / 16)
    elif name == "mask":
        t.copy_(torch.rand(t.shape, generator=generator, device=t.device))
    else:
        t.copy_(torch.randn(t.shape, generator=generator, device=t.device))


def bytes_of(problem: DeformProblem) -> int:
    """Of the operands and what is written."""
    return sum(t.numel() * t.element_size() for t in _empty(problem, torch.device("meta")).values())


def expected(problem: DeformProblem, given: Case) -> tuple[Tensor, ...]:
    """What a plan should write, in float64, by plain PyTorch."""
    g, groups = problem.geometry, problem.offset_groups
    wide = {name: t.double() for name, t in given.items()}
    mask = wide.get("mask")
    if problem.role is DeformRole.FORWARD:
        x, offset, w = (wide[name] for name in ("x", "offset", "w"))
        return (deform_reference.forward(x, offset, w, mask, wide.get("bias"), g, groups),)
    wanted = [problem.role is role for role in (DeformRole.INPUT, DeformRole.OFFSET, DeformRole.OFFSET)]
    what = (wide["y"], torch.nan_to_num(wide["x"]), wide["offset"], torch.nan_to_num(wide["w"]), mask, g, groups)
    found = deform_reference.gradients(*what, (*wanted, problem.role is DeformRole.WEIGHT))
    return tuple(t for t in found if t is not None)


def wrong(problem: DeformProblem, p: DeformPlan, given: Case, want: tuple[Tensor, ...]) -> str | None:
    """How what a plan writes differs from what it should be, in words; None where it does not."""
    names = [name for name in _WRITTEN[problem.role] if name in given]
    for name in names:
        poison(given[name])
    with check.poisoned():
        deform_run.run(p, given)
    depth, dtype = _depth(problem), getattr(torch, problem.dtype)
    for name, right in zip(names, want, strict=True):
        got = given[name]
        # samples are rounded to the operands' dtype before they are multiplied
        rounded = torch.finfo(dtype).eps * depth**0.5 * right.abs().amax()
        bound = check.tolerance(right, depth, got.dtype, problem.precision, got.device) + rounded
        error = torch.nan_to_num((got.to(right.dtype) - right).abs(), nan=torch.inf, posinf=torch.inf)
        found = where(error, error > bound, f"within rounding in {name}")
        if found:
            return found
    return None


def _depth(problem: DeformProblem) -> int:
    """How many products sum up to an element of what a role writes; a sample is four of them."""
    g = problem.geometry
    of_group = {"C": g.C // g.groups, "K": g.K // g.groups}
    if problem.role is DeformRole.FORWARD:
        return 4 * of_group["C"] * g.taps
    if problem.role is DeformRole.INPUT:
        return 16 * of_group["K"] * g.taps
    if problem.role is DeformRole.OFFSET:
        return 4 * (g.C // problem.offset_groups) * of_group["K"]
    return 4 * g.N * prod(g.output)
