"""The convolutions that a model makes, recorded without computing any.

A copy of the model runs on fake tensors, which know shapes, strides and dtypes and have no memory; so do its gradients.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch._subclasses import fake_tensor
from torch.nn.parameter import UninitializedParameter
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from .. import execute
from ..convert import convert
from ..override import override

_NEEDS_VALUES = (
    fake_tensor.DataDependentOutputException,
    fake_tensor.DynamicOutputShapeException,
    fake_tensor.UnsupportedFakeTensorException,
    fake_tensor.UnsupportedOperatorException,
)
# Of other errors for want of values, and of code that names a device.
_WORDS = ("FakeTensor", "tensor subclass", "data pointer", "data_ptr", "at least two devices")


def calls_of(
    model: torch.nn.Module,
    *inputs: Any,
    backward: bool = True,
    autocast: torch.dtype | None = None,
    channels_last: bool = False,
    device: str | torch.device | None = None,
) -> list[execute.Call]:
    """The calls that a forward of the model on these inputs makes and, with `backward`, those of its gradients.

        >>> model = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.ReLU(), torch.nn.Conv2d(8, 8, 3))
        >>> [call.role.value for call in calls_of(model, torch.empty(2, 3, 32, 32, device="meta"))]
        ['fprop', 'fprop', 'dgrad', 'wgrad', 'wgrad']

    Recorded is what `convert(model)` under `override()` would run, in the model's dtype and mode, on copies without
    memory: model, inputs and random numbers stay as they are, and no kernel runs. Inputs are the forward's arguments,
    tensors of any device among them; those that require a gradient get one. The operands of the calls are meta tensors.

    autocast: the dtype of a `torch.autocast` around the forward. channels_last: lays out the model's parameters and
    inputs of four and five dimensions so. device: runs the copy there for real, for models that look at values.

    Raises TypeError if `model` is no `torch.nn.Module`; RuntimeError if it cannot be copied, has lazy modules that did
    not run yet, or needs values and no `device` was given; ValueError if no output has a gradient. The model's own
    errors pass.
    """
    if not isinstance(model, torch.nn.Module):
        raise TypeError(f"calls_of(): argument 'model' must be torch.nn.Module, not {type(model).__name__}")
    name = type(model).__name__
    if any(isinstance(p, UninitializedParameter) for p in model.parameters()):
        raise RuntimeError(f"{name} has lazy modules without parameters yet: record it after its first forward")
    real = torch.device(device) if device is not None else None
    fake: Any
    with ExitStack() as stack:
        stack.enter_context(torch.inference_mode(False))
        if real is None:
            fake = fake_tensor.FakeTensorMode(allow_non_fake_inputs=True)
            stack.enter_context(_explained(name))
            like = _faking(fake, channels_last)
        else:
            stack.enter_context(torch.random.fork_rng([real] if real.type == "cuda" else []))
            fake, like = nullcontext(), _moving(real, channels_last)
        copied, arguments = _copied(name, (model, inputs), like)
        convert(copied)
        casting = torch.autocast(real.type if real else "cpu", autocast) if autocast else nullcontext()
        for context in (fake, _eager(), override(), torch.set_grad_enabled(backward)):
            stack.enter_context(context)
        made = stack.enter_context(execute.recording())
        with casting:
            output = copied(*arguments)
        if backward:
            _backward(name, output)
    return [_without_memory(call) for call in made]


def _copied(name: str, what: Any, like: Callable[[Tensor], Tensor]) -> Any:
    """A deep copy whose tensors are those that `like` makes of the original ones."""
    try:
        with _Copying(like):
            return copy.deepcopy(what)
    except (TypeError, NotImplementedError) as error:  # a lock, a process group, a generator
        raise RuntimeError(f"{name} cannot be copied to record its convolutions: {error}") from error


class _Copying(TorchFunctionMode):
    def __init__(self, like: Callable[[Tensor], Tensor]):
        super().__init__()
        self.like = like

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        with torch._C.DisableTorchFunctionSubclass():
            if func is torch._C.TensorBase.clone:  # of a parameter's data
                return self.like(args[0])
            if func is Tensor.__deepcopy__:
                tensor, memo = args
                if id(tensor) not in memo:
                    memo[id(tensor)] = self.like(tensor.detach()).requires_grad_(tensor.requires_grad)
                return memo[id(tensor)]
            return func(*args, **(kwargs or {}))


def _faking(mode: Any, channels_last: bool) -> Callable[[Tensor], Tensor]:
    """Copies of tensors are fake ones on the CPU: that is all a model can tell."""

    def like(t: Tensor) -> Tensor:
        with mode:
            empty = torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device="cpu")
            return empty.to(memory_format=_format(t, channels_last))

    return like


def _moving(device: torch.device, channels_last: bool) -> Callable[[Tensor], Tensor]:
    """Copies of tensors on a device; of meta tensors, which have no values, random ones or zeros."""

    def like(t: Tensor) -> Tensor:
        if t.is_meta:
            floating = t.is_floating_point()
            t = torch.randn(t.shape).to(t.dtype) if floating else torch.zeros(t.shape, dtype=t.dtype)
        return t.to(device, copy=True, memory_format=_format(t, channels_last))

    return like


def _format(t: Tensor, channels_last: bool) -> torch.memory_format:
    formats = {4: torch.channels_last, 5: torch.channels_last_3d} if channels_last else {}
    return formats.get(t.dim(), torch.preserve_format)


def _backward(name: str, output: Any) -> None:
    """Gradients of everything that comes out; those of the outputs lie in memory as these do."""
    outputs = [t for t in pytree.tree_leaves(output) if isinstance(t, Tensor) and t.requires_grad]
    if not outputs:
        raise ValueError(f"no output of {name} has a gradient: record it with backward=False")
    torch.autograd.backward(outputs, [torch.ones_like(t) for t in outputs])


def _eager() -> Any:
    """What torch.compile has made of a model runs as the code that it was."""
    return torch.compiler.set_stance("force_eager") if "torch._dynamo" in sys.modules else nullcontext()


@contextmanager
def _explained(name: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:
        if not isinstance(error, _NEEDS_VALUES) and not any(word in str(error) for word in _WORDS):
            raise
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise RuntimeError(
            f"the forward of {name} cannot run on tensors without values, on a CPU, to record its convolutions "
            f"({first}): give a device (--run-on) on which to run it for real"
        ) from error


def _without_memory(call: execute.Call) -> execute.Call:
    def meta(t: Tensor) -> Tensor:
        return torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device="meta")

    bias = None if call.bias is None else meta(call.bias)
    scales = None if call.scales is None else (meta(call.scales[0]), meta(call.scales[1]))
    return replace(call, a=meta(call.a), b=meta(call.b), bias=bias, scales=scales)
