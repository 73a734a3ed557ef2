"""What cannot be done, in words that say what can: kinds of tensors, models, and torch.jit.script."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

DEVICES = ("cpu", "cuda", "meta")


def check_kind(name: str, argument: str, t: Any) -> None:
    """Raises for what is not a plain dense tensor on a device we know.

    The types are PyTorch's where its convolutions raise: TypeError, NotImplementedError for nested and quantized
    tensors, else RuntimeError. Named tensors, which PyTorch had up to 2.12, are refused by its dispatcher.
    """
    if not isinstance(t, Tensor):
        raise TypeError(f"{name}(): argument '{argument}' must be Tensor, not {type(t).__name__}")
    if t.is_nested:  # before everything that asks for its shape
        raise NotImplementedError(
            f"{name}(): {argument} is nested; pad it with torch.nested.to_padded_tensor(t, 0.0) or convolve its parts, "
            "t.unbind(), one by one"
        )
    if t.layout is not torch.strided:
        raise RuntimeError(f"{name}(): {argument} has layout {t.layout}; convert it with .to_dense()")
    if t.is_quantized:
        raise NotImplementedError(f"{name}(): {argument} is quantized; convert it with .dequantize()")
    if t.device.type not in DEVICES:
        raise RuntimeError(
            f"{name}(): {argument} {list(t.shape)} is on {t.device}; triton_conv runs on CUDA and CPU devices: move it "
            "there with .to(), or leave it to torch.nn.functional"
        )


def check_model(name: str, model: Any) -> None:
    """Raises TypeError for what is no module, or not yet one, and ValueError for a module inside itself."""
    if not isinstance(model, torch.nn.Module):
        raise TypeError(f"{name}(): argument 'model' must be torch.nn.Module, not {type(model).__name__}")
    _check_tree(name, "", model, set(), set())


def _check_tree(name: str, path: str, module: torch.nn.Module, above: set, seen: set) -> None:
    if module in above:  # torch's own train() and state_dict() would not come back from it either
        raise ValueError(f"{name}(): argument 'model' contains itself: {path!r} is a module around it")
    if module in seen:
        return
    seen.add(module)
    if not hasattr(module, "_modules"):
        where = f"holds {path!r}, " if path else "is "
        raise TypeError(
            f"{name}(): argument 'model' {where}a {type(module).__name__} that never called Module.__init__()"
        )
    for key, child in module._modules.items():
        if child is not None:
            _check_tree(name, f"{path}.{key}" if path else key, child, above | {module}, seen)


def not_scripted(name: str) -> str:
    """Why torch.jit.script refuses a function or module."""
    return (
        f"{name} cannot be compiled by torch.jit.script; use torch.compile, torch.export or torch.jit.trace, which "
        "take it as it is"
    )


def refuse_script(*functions: Callable[..., Any]) -> None:
    """Has torch.jit.script raise RuntimeError with those words, wherever the code it compiles calls one of these."""
    for function in functions:
        vars(function)["__script_unsupported"] = not_scripted(f"triton_conv.{function.__name__}")
