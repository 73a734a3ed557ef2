"""Sends interpreted calls the way of any GPU and any config, so that every kernel is reached without one."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from math import prod
from typing import Any

from .. import branches_plan, deform_plan, execute, plan, streaming_plan
from ..config import BoxConfig, Config, KernelConfig
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
    streamed: Any = streaming_plan._chosen
    candidates = (_of_a_plan, _of_a_deformable_one, _of_branches)
    try:
        # a device of its own for each candidate: nothing that is cached belongs to another
        execute.INTERPRETER = found._replace(source=f"{found.source}; candidate {candidate}")
        if candidate:
            for module, every, configs in zip(modules, before[1:], candidates, strict=True):
                module.every = _one_of(every, configs, candidate)
            streaming_plan._chosen = _one_that_can(streamed, candidate)  # type: ignore[assignment]
        yield
    finally:
        execute.INTERPRETER = before[0]
        streaming_plan._chosen = streamed
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


# What videos and sequences may be tiled into: their plans are chosen for any length, and explicit configs are what can
# be asked for.
_STREAMED = (
    *(Config(32, 32, 16), Config(16, 16, 32), Config(32, 16, 16, flatten=True), Config(32, 1, 1, dot=False)),
    *(Config(16, 64, 16, filters_first=True), BoxConfig((1, 1, 2, 8), 16, 16), BoxConfig((2, 1, 2, 4), 16, 16)),
    *(BoxConfig((1, 1, 1, 16), 32, 16), BoxConfig((1, 1, 4, 4), 16, 32), BoxConfig((1, 1, 16, 1), 16, 16)),
)


def _one_that_can(chosen: Callable[..., Any], number: int) -> Callable[..., Any]:
    def one(problem: Any, explicit: Any, generation: Any) -> Any:
        if explicit is None:
            for i in range(len(_STREAMED)):
                with suppress(RuntimeError):  # a box that does not fit
                    return chosen(problem, _STREAMED[(number + i) % len(_STREAMED)], generation)
        return chosen(problem, explicit, generation)

    return one


def _of_a_plan(problem: Any, p: Any) -> list:
    return [partial(plan.with_config, problem, p, config) for config in space.fitting(problem, p) if _light(config)]


def _of_a_deformable_one(problem: Any, p: Any) -> list:
    return [
        partial(deform_plan.with_config, problem, p, config) for config in deform.fitting(problem, p) if _light(config)
    ]


def _of_branches(_problem: Any, p: Any) -> list:
    return [partial(branches_plan.with_config, p, config) for config in branches.fitting(p) if _light(config)]


def _light(config: KernelConfig) -> bool:
    """Whether a step of its tile does not take the interpreter long."""
    if isinstance(config, Config):
        M, N, K = config.BLOCK_M, config.BLOCK_N, config.BLOCK_K
        return max(M * N, (M + N) * K) <= 2**13 if config.dot else M * N * K <= 2**12
    return not isinstance(config, BoxConfig) or prod(config.box) * config.BLOCK_N <= 2**13
