"""Sends interpreted calls the way of any GPU and any config, so that every kernel is reached without one."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

from .. import branches_plan, deform_plan, execute, plan
from ..devices import DEVICES, INTERPRETER, Device
from ..tuning import branches, deform, space

OWN = "interpreter"
DEVICE_NAMES = (OWN, *DEVICES)


@contextmanager
def steered(device: str, candidate: int) -> Iterator[None]:
    """Inside, interpreted calls are planned as for this GPU; with a candidate, by one of the ways and configs there.

    Candidate 0 is what plans choose; every other number stands for some way and some config of it that could be
    measured, the same for the same problem. Calls that are not interpreted go as they would.
    """
    if not execute.interpreting():
        yield
        return
    found: Device = INTERPRETER if device == OWN else DEVICES[device]
    modules: tuple[Any, ...] = (plan, deform_plan, branches_plan)
    before = execute.INTERPRETER, *(module.every for module in modules)
    candidates = (_of_a_plan, _of_a_deformable_one, _of_branches)
    try:
        # a device of its own for each candidate: nothing that is cached belongs to another
        execute.INTERPRETER = found._replace(source=f"{found.source}; candidate {candidate}")
        if candidate:
            for module, every, configs in zip(modules, before[1:], candidates, strict=True):
                module.every = _one_of(every, configs, candidate)
        yield
    finally:
        execute.INTERPRETER = before[0]
        for module, every in zip(modules, before[1:], strict=True):
            module.every = every


def _one_of(every: Callable[..., list], others: Callable[[Any, Any], list], number: int) -> Callable[..., list]:
    def one(problem: Any, *explicit: Any) -> list:
        found = every(problem, *explicit)
        if any(config is not None for config in explicit):
            return found
        rest, which = divmod(number - 1, len(found))
        rest, tiled = divmod(rest, 4)
        p = found[which]
        if not tiled:
            return [p]
        made = others(problem, p)
        return [made[rest % len(made)]()] if made else [p]

    return one


def _of_a_plan(problem: Any, p: Any) -> list:
    return [partial(plan.with_config, problem, p, config) for config in space.fitting(problem, p)]


def _of_a_deformable_one(problem: Any, p: Any) -> list:
    return [partial(deform_plan.with_config, problem, p, config) for config in deform.fitting(problem, p)]


def _of_branches(_problem: Any, p: Any) -> list:
    return [partial(branches_plan.with_config, p, config) for config in branches.fitting(p)]
