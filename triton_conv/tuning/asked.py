"""What the console script is asked to tune: a shape, suites of layers, or the convolutions of a model."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from typing import Any

import torch

from .. import explain, plan
from ..devices import Device
from . import models, suites
from .record import calls_of
from .tune import Task, tasks_of

# Options of one of the three ways to say what is tuned, with their defaults.
_OF_A_SHAPE: dict[str, Any] = {"transposed": False, "stride": 1, "padding": 0, "output_padding": None, "dilation": 1}
_OF_A_SHAPE |= {"groups": 1, "padding_mode": ("zeros",), "precision": None, "out_dtype": None, "bias": False}
_OF_A_SUITE: dict[str, Any] = {"batch": None}
_OF_A_MODEL: dict[str, Any] = {
    "inputs": None,
    "model_arguments": None,
    "autocast": None,
    "forward_only": False,
    "run_on": None,
}


def check(arguments: argparse.Namespace) -> None:
    """Raises ValueError unless one thing is asked for, with options of its own."""
    given = {
        "INPUT and WEIGHT": arguments.input is not None,
        "--suite": bool(arguments.suite),
        "--model": arguments.model is not None,
    }
    if sum(given.values()) != 1:
        raise ValueError(f"one of {', '.join(given)} is to say what is tuned")
    if given["INPUT and WEIGHT"] and arguments.weight is None:
        raise ValueError("argument weight: a shape is an input and a weight")
    for (what, is_given), options in zip(given.items(), (_OF_A_SHAPE, _OF_A_SUITE, _OF_A_MODEL), strict=True):
        strange = [name for name, default in options.items() if getattr(arguments, name) != default]
        if strange and not is_given:
            raise ValueError(f"argument {_option(strange[0])}: goes with {what}")


def _option(name: str) -> str:
    return {"inputs": "--input"}.get(name, f"--{name.replace('_', '-')}")


def tasks(arguments: argparse.Namespace, device: Device) -> list[Task]:
    """One for each problem. Raises ValueError; warns of what is left out."""
    if arguments.suite:
        return _of_suites(arguments, device)
    return _of_a_model(arguments, device) if arguments.model is not None else _of_a_shape(arguments, device)


def _of_suites(arguments: argparse.Namespace, device: Device) -> list[Task]:
    names = list(dict.fromkeys(arguments.suite))
    found: dict[plan.Problem, Task] = {}
    for name in names:
        for task in suites.tasks(name, device, arguments.batch, arguments.dtype, arguments.channels_last):
            label = f"{name}: {task.label}" if len(names) > 1 else task.label
            found.setdefault(task.problem, task._replace(label=label))
    return list(found.values())


def _of_a_shape(arguments: argparse.Namespace, device: Device) -> list[Task]:
    wanted = {name: getattr(arguments, name) for name in _OF_A_SHAPE if getattr(arguments, name) is not None}
    if arguments.output_padding is not None and not arguments.transposed:
        raise ValueError("argument --output-padding: only a transposed convolution has one")
    label = f"{'x'.join(map(str, arguments.input))} {'x'.join(map(str, arguments.weight))}"
    try:
        problems = explain.problems(
            arguments.input,
            arguments.weight,
            dtype=arguments.dtype or torch.float32,
            channels_last=bool(arguments.channels_last),
            device=device,
            **wanted,
        )
    except (RuntimeError, TypeError) as error:
        raise ValueError(str(error)) from error
    return [Task(label, problem) for problem in problems.values()]


def _of_a_model(arguments: argparse.Namespace, device: Device) -> list[Task]:
    if not arguments.inputs:
        raise ValueError("argument --model: needs --input, the shape of an input, for example 256x3x224x224")
    if arguments.autocast not in (None, torch.bfloat16, torch.float16):
        raise ValueError("argument --autocast: is bfloat16 or float16")
    try:
        given = json.loads(arguments.model_arguments or "{}")
    except ValueError as error:
        raise ValueError(f"argument --model-arguments: is no JSON: {error}") from error
    if not isinstance(given, dict):
        raise ValueError("argument --model-arguments: is to be a JSON object, names and values")
    try:
        model = models.build(arguments.model, given)
    except ValueError as error:
        raise ValueError(f"argument --model: {error}") from error
    if arguments.dtype is not None:
        model = model.to(arguments.dtype)
    try:
        calls = calls_of(
            model,
            *models.inputs(model, arguments.inputs),
            backward=not arguments.forward_only,
            autocast=arguments.autocast,
            channels_last=bool(arguments.channels_last),
            device=arguments.run_on,
        )
    except Exception as error:  # the model's own, most likely of an input that it cannot take
        shapes = ", ".join("x".join(map(str, shape)) for shape, _ in arguments.inputs)
        raise ValueError(f"argument --model: {arguments.model} on {shapes}: {error}") from error
    return [task._replace(label=_layer(task.problem)) for task in tasks_of(calls, device)]


def _layer(problem: plan.Problem) -> str:
    """A geometry in a few words: "64>128 3x3 stride 2, 56x56"."""
    g = problem.geometry

    def by(sizes: Sequence[int]) -> str:
        first = next((axis for axis in range(2) if max(g.input[axis], g.filter[axis]) > 1), 2)
        return "x".join(map(str, sizes[first:]))

    words = [f"{g.C}>{g.K} {by(g.filter)}"]
    words += [f"stride {by(g.stride)}"] if max(g.stride) > 1 else []
    words += [f"dilation {by(g.dilation)}"] if max(g.dilation) > 1 else []
    words += [f"groups {g.groups}"] if g.groups > 1 else []
    return f"{' '.join(words)}, {g.N} of {by(g.input)}"
