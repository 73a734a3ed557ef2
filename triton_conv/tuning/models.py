"""Models by name, and inputs of given shapes: what the console script records convolutions of."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor


def build(name: str, arguments: Mapping[str, Any] | None = None) -> torch.nn.Module:
    """What a callable returns, called with keyword arguments or none.

        >>> build("torch.nn:Conv2d", {"in_channels": 3, "out_channels": 8, "kernel_size": 3})
        Conv2d(3, 8, kernel_size=(3, 3), stride=(1, 1))

    `name` is "package.module:callable", importable from the working directory too; "torchvision:resnet50" is the model
    of this name that `torchvision.models.get_model` knows. Raises ValueError for what cannot be imported, does not take
    the arguments or returns no `torch.nn.Module`.
    """
    function = _imported(name)
    try:
        model = function(**arguments or {})
    except Exception as error:
        raise ValueError(f"{name} cannot be called: {type(error).__name__}: {error}") from error
    if not isinstance(model, torch.nn.Module):
        raise ValueError(f"{name} is to return a torch.nn.Module, but returned a {type(model).__name__}")
    return model


def inputs(model: torch.nn.Module, shapes: list[tuple[tuple[int, ...], torch.dtype | None]]) -> list[Tensor]:
    """Tensors without memory, in the dtype of the model's parameters where none is given."""
    floating = [p.dtype for p in model.parameters() if p.is_floating_point()]
    own = floating[0] if floating else torch.get_default_dtype()
    return [torch.empty(shape, dtype=dtype or own, device="meta") for shape, dtype in shapes]


def _imported(name: str) -> Callable[..., Any]:
    module_name, _, path = name.partition(":")
    if not module_name or not path:
        raise ValueError(f"{name!r} is not package.module:callable")
    try:
        with _from_here():
            found: Any = importlib.import_module(module_name)
    except Exception as error:  # whatever the code of a module raises
        raise ValueError(f"{module_name} cannot be imported: {type(error).__name__}: {error}") from error
    if module_name == "torchvision" and not hasattr(found, path):
        return lambda **given: found.models.get_model(path, **given)
    for part in path.split("."):
        if not hasattr(found, part):
            raise ValueError(f"{module_name} has no {path}")
        found = getattr(found, part)
    return found


@contextmanager
def _from_here() -> Iterator[None]:
    """Modules of the working directory can be imported, as `python -m` has it."""
    here = os.getcwd()
    sys.path.insert(0, here)
    try:
        yield
    finally:
        sys.path.remove(here)
