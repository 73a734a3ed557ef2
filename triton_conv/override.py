"""`override()`: the convolutions of code that cannot be changed, sent to `triton_conv.functional`."""

from __future__ import annotations

import contextlib
import operator
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch._ops import OpOverload, OpOverloadPacket
from torch.nested._internal.nested_tensor import NestedTensor
from torch.overrides import TorchFunctionMode

from . import functional
from .deform import deform_conv2d
from .later import when_imported

__all__ = ["override"]


def _convolution(
    input: Tensor, weight: Tensor, bias, stride, padding, dilation, transposed, output_padding, groups
) -> Tensor:
    """`torch.convolution`: every rank, forward and transposed, in one signature."""
    rank = weight.dim() - 2
    unused = not transposed and (len(output_padding) not in (1, rank) or any(p < 0 for p in output_padding))
    if not 1 <= rank <= 3 or input.dim() != rank + 2 or unused:  # for torch's error
        return torch.convolution(input, weight, bias, stride, padding, dilation, transposed, output_padding, groups)
    if transposed:
        function = getattr(functional, f"conv_transpose{rank}d")
        return function(input, weight, bias, stride, padding, output_padding, groups, dilation)
    return getattr(functional, f"conv{rank}d")(input, weight, bias, stride, padding, dilation, groups)


def _targets() -> dict[Any, Callable[..., Tensor]]:
    names = [f"{kind}{rank}d" for kind in ("conv", "conv_transpose") for rank in (1, 2, 3)]
    targets = {name: getattr(functional, name) for name in names} | {"convolution": _convolution}
    result: dict[Any, Callable[..., Tensor]] = {}
    for name, target in targets.items():
        packet = getattr(torch.ops.aten, name)
        # torch.nn.functional's functions are torch's own; exported graphs call the aten operators by name.
        result[getattr(torch, name)] = target
        overloads = tuple(getattr(packet, overload) for overload in packet.overloads() if overload != "out")
        result[packet] = partial(_operator, overloads, target)
        result |= {overload: partial(_operator, (overload,), target) for overload in overloads}
    return result


def _operator(overloads: Sequence[OpOverload], target: Callable[..., Tensor], *args: Any, **kwargs: Any) -> Tensor:
    """`target` of the arguments of an operator: modes see them before torch does, and none of ours are its."""
    for overload in overloads[:-1]:
        with contextlib.suppress(RuntimeError):
            given = _parsed(overload._schema, args, kwargs)
            break
    else:
        given = _parsed(overloads[-1]._schema, args, kwargs)
    return target(**given)


def _parsed(schema: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> dict[str, Any]:
    """Arguments by name. Raises RuntimeError, as torch does, for what does not fit the schema."""
    name, names = schema.name, [a.name for a in schema.arguments]
    given = dict(zip(names, args, strict=False))
    if len(args) > len(names):
        raise RuntimeError(f"{name}() expected at most {len(names)} arguments but received {len(args)}: {schema}")
    for key, value in kwargs.items():
        if key not in names or key in given:
            what = "is unknown" if key not in names else "was given twice"
            raise RuntimeError(f"{name}(): argument {key!r} {what}: {schema}")
        given[key] = value
    for argument in schema.arguments:
        if argument.name in given:
            try:
                given[argument.name] = _AS[str(argument.type)](given[argument.name])
            except (TypeError, RuntimeError):
                kind = type(given[argument.name]).__name__
                raise RuntimeError(
                    f"{name}() expected a value of type {argument.type} for argument {argument.name!r}, not {kind}"
                ) from None
        elif not argument.has_default_value():
            raise RuntimeError(f"{name}() is missing a value for argument {argument.name!r}: {schema}")
    return given


def _one_of(*kinds: type) -> Callable[[Any], Any]:
    def same(value: Any) -> Any:
        if not isinstance(value, kinds):
            raise TypeError
        return value

    return same


def _whole(value: Any) -> Any:
    value = value if isinstance(value, torch.SymInt) else operator.index(value)
    if isinstance(value, int) and not -(2**63) <= value < 2**63:
        raise TypeError
    return value


def _alone(value: Any) -> Any:
    """A number that is no entry of a list: in a tensor it may be a float."""
    return int(value) if isinstance(value, Tensor) and value.dim() == 0 else _whole(value)


def _truth(value: Any) -> bool:
    if isinstance(value, str):
        raise TypeError
    return bool(value)


_AS: dict[str, Callable[[Any], Any]] = {
    "Tensor": _one_of(Tensor),
    "Optional[Tensor]": _one_of(Tensor, type(None)),
    "List[int]": lambda value: [_whole(v) for v in value],
    "int": _alone,
    "bool": _truth,
    "str": _one_of(str),
}


_TARGETS = _targets()


def _deformable(
    input: Tensor, weight: Tensor, offset, mask, bias, sh, sw, ph, pw, dh, dw, groups, offset_groups, use_mask
) -> Tensor:
    """torchvision's operator of deformable convolution, which its function and its module call."""
    return deform_conv2d(input, offset, weight, bias, (sh, sw), (ph, pw), (dh, dw), mask if use_mask else None)


def _add_torchvision() -> None:
    if hasattr(torch.ops.torchvision, "deform_conv2d"):  # its code may be missing
        packet = torch.ops.torchvision.deform_conv2d
        _TARGETS[packet] = _TARGETS[packet.default] = _deformable


when_imported("torchvision.extension", _add_torchvision)


class override(contextlib.ContextDecorator, TorchFunctionMode):
    """Send every convolution of the code inside to `triton_conv`, gradients included.

        >>> model, images = torch.nn.Conv2d(3, 8, 3), torch.randn(1, 3, 32, 32)
        >>> with triton_conv.override():
        ...     loss = model(images).square().mean()
        >>> loss.backward()  # ours too: the graph was recorded inside

    Covers `torch.nn.functional.conv{1,2,3}d` and `conv_transpose{1,2,3}d` however they are reached (`torch.nn`
    modules, `torch.conv2d`, `torch.convolution`, `torch.ops.aten`), with torch's arguments and errors, and
    `torchvision.ops.deform_conv2d`, by its module too; everything else runs as it did. May be nested, entered again and
    used as a decorator; leaves nothing behind, whether the code inside returns or raises.

    It holds for the thread that enters it: threads started inside (`torch.nn.DataParallel`'s) do not see it. Nor
    does what runs during a backward pass, a checkpoint's second forward for instance; the gradients themselves
    belong to the convolution that was recorded. Nor does code that torch.jit has compiled: torch.jit.trace a
    `convert`-ed model instead. Arguments that bring their own `__torch_function__` keep it.

    Raises nothing of its own: inside, calls raise what torch raises.

    It costs a few microseconds per torch call, whichever function that is, and `torch.nn.Conv2d` with a
    `padding_mode` still makes its padded copy first. `triton_conv.convert(model)` has neither cost.
    """

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        target = _TARGETS.get(func)
        if target is None or any(_is_custom(t) for t in types):
            return func(*args, **kwargs)
        if isinstance(func, (OpOverload, OpOverloadPacket)):
            return func(*args, **kwargs) if "out" in kwargs else target(*args, **kwargs)
        # torch's argument parser takes NumPy's names of the first argument too.
        return target(*args, **{"input" if name in ("x", "a", "x1") else name: v for name, v in kwargs.items()})


def _is_custom(cls: Any) -> bool:
    """Whether a class answers torch's functions itself: a traced proxy, a tensor of another representation.

    Nested tensors do, but not convolutions: they get our words for it.
    """
    default: Any = Tensor.__torch_function__
    answers = getattr(cls.__torch_function__, "__func__", None) is not default.__func__
    return answers and not issubclass(cls, NestedTensor)
