"""Arguments as callers spell them, made into what operators take, with PyTorch's errors."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from numbers import Integral
from typing import Any, TypeAlias

import torch
from torch import Tensor

from .geometry import PADDING_MODES, same_padding
from .unsupported import check_kind

Ints: TypeAlias = int | Sequence[int]
Padding: TypeAlias = str | int | Sequence[int | tuple[int, int]]
Modes: TypeAlias = str | Sequence[str]

DTYPES = {
    *(torch.float16, torch.bfloat16, torch.float32, torch.float64),
    *(torch.complex32, torch.complex64, torch.complex128),
    *(torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64),
}


def forward_parameters(name, rank, weight, stride, padding, dilation, groups, padding_mode) -> tuple:
    """stride, padding, dilation, groups and modes as forward operators take them."""
    stride = ints_of(name, "stride", stride, rank)
    dilation = ints_of(name, "dilation", dilation, rank)
    padding = padding_of(name, padding, rank, weight, stride, dilation)
    return stride, padding, dilation, index_of(name, "groups", groups), mode_names(name, padding_mode, rank)


def check_tensors(
    name: str,
    rank: int,
    dtypes: set[torch.dtype] | None,
    input: Any,
    weight: Any,
    *,
    weight_name: str = "weight",
    **rest: Any,
) -> bool:
    """Whether the input is batched; raises for what is not a dense tensor of the right rank on a device we know.

    Without `dtypes`, which ones fit is for the operator to say. The name of what may be None ends with "bias".
    """
    for argument, t in {"input": input, weight_name: weight, **rest}.items():
        if t is None and argument.endswith("bias"):
            continue
        check_kind(name, argument, t)
        if dtypes is not None and t.dtype not in dtypes:
            instead = f"scaled_conv{rank}d takes it" if t.dtype is torch.float8_e4m3fn else "convert it with .to()"
            raise NotImplementedError(
                f"{name}(): {argument} {list(t.shape)} has dtype {t.dtype}, which is not supported; {instead}"
            )
        if t.device != input.device:
            raise RuntimeError(
                f"{name}(): Expected all tensors to be on the same device, but input {list(input.shape)} is on "
                f"{input.device} and {argument} {list(t.shape)} is on {t.device}"
            )
    if weight.dim() != rank + 2:
        raise RuntimeError(
            f"{name}(): expected a {rank + 2}-dimensional {weight_name}, but got {weight_name} of size "
            f"{list(weight.shape)} (input {list(input.shape)})"
        )
    if input.dim() not in (rank + 1, rank + 2):
        raise RuntimeError(
            f"Expected {rank + 1}D (unbatched) or {rank + 2}D (batched) input to {name}, "
            f"but got input of size: {list(input.shape)}"
        )
    return input.dim() == rank + 2


def index_of(name: str, argument: str, value: Any, too_large: type[Exception] = ValueError) -> Any:
    if isinstance(value, torch.SymInt):
        return value
    try:
        if isinstance(value, bool):
            raise TypeError
        value = operator.index(value)
    except (TypeError, RuntimeError):  # the latter of a tensor without memory
        raise TypeError(f"{name}(): argument '{argument}' must be int, not {type(value).__name__}") from None
    if not -(2**63) <= value < 2**63:
        raise too_large(f"{name}(): argument '{argument}' does not fit into 64 bits, but got {value}")
    return value


def is_sequence(value: Any) -> bool:
    return isinstance(value, (tuple, list))  # PyTorch takes no others


def _spread(name: str, argument: str, value: Any, entries: list[Any], rank: int) -> list[Any]:
    """`entries`, of which there are one or `rank`, as one per axis; `value` is what they were made of."""
    if len(entries) == 1:
        entries = entries * rank
    if len(entries) != rank:
        raise RuntimeError(
            f"{name}(): expected {argument} to be a single value or a list of {rank} values to match the convolution "
            f"dimensions, but got {argument}={value}"
        )
    return entries


def per_axis(name: str, argument: str, value: Any, rank: int) -> list[Any]:
    """One entry per axis from a single entry, or from a sequence of one or `rank` entries."""
    return _spread(name, argument, value, list(value) if is_sequence(value) else [value], rank)


def _indices(name: str, argument: str, values: Sequence[Any]) -> list[Any]:
    """Whole numbers of a sequence, with PyTorch's exceptions, of which only the first must be no bool."""
    return [
        int(v) if place and isinstance(v, bool) else index_of(name, argument, v, TypeError)
        for place, v in enumerate(values)
    ]


def ints_of(name: str, argument: str, value: Any, rank: int) -> list[int]:
    # types before lengths
    entries = _indices(name, argument, value) if is_sequence(value) else [index_of(name, argument, value)]
    return _spread(name, argument, value, entries, rank)


def check_sizes(name: str, rank: int, per_axis: dict[str, Any], **numbers: Any) -> None:
    """Raises for arguments of a constructor that are no whole numbers, or negative."""
    for argument, value in numbers.items():
        if not isinstance(value, Integral) or isinstance(value, bool):
            raise TypeError(f"{name}(): argument '{argument}' must be int, not {type(value).__name__}")
    whole = {argument: [index_of(name, argument, value)] for argument, value in numbers.items()}
    for argument, value in per_axis.items():
        if not is_sequence(value) and not isinstance(value, Integral):
            raise TypeError(f"{name}(): argument '{argument}' must be int or one per axis, not {type(value).__name__}")
        whole[argument] = ints_of(name, argument, value, rank)
    for argument, values in whole.items():
        if any(v < 0 for v in values):
            raise ValueError(f"{name}(): {argument} must not be negative, but got {argument}={values}")


def mode_names(name: str, value: Any, rank: int) -> str:
    """One name if all axes agree, else one per axis joined by commas."""
    modes = per_axis(name, "padding_mode", value, rank)
    if not all(isinstance(m, str) for m in modes):
        raise TypeError(f"{name}(): argument 'padding_mode' must be str or one str per axis, not {value!r}")
    for mode in modes:
        if mode not in PADDING_MODES:  # here, not below, where "circular,zeros" is two names
            raise ValueError(f"padding_mode must be one of {set(PADDING_MODES)}, but got padding_mode={mode!r}")
    return modes[0] if modes.count(modes[0]) == rank else ",".join(modes)


def precision_of(name: str, value: Any) -> str | None:
    if value is not None and not isinstance(value, str):
        raise TypeError(f"{name}(): argument 'precision' must be str or None, not {type(value).__name__}")
    return value


def padding_of(name: str, value: Any, rank: int, weight: Tensor, stride: list[int], dilation: list[int]) -> list[int]:
    """(lower, upper) of each axis in turn."""
    if isinstance(value, (str, bytes)):
        if value == "valid":
            return [0] * (2 * rank)
        if value != "same":
            raise RuntimeError(f"Invalid padding string: {value!r}; it must be 'same' or 'valid'")
        if any(s != 1 for s in stride):
            raise RuntimeError(f"padding='same' is not supported for strided convolutions, but got stride={stride}")
        return [p for taps, d in zip(weight.shape[2:], dilation, strict=True) for p in same_padding(taps, d)]
    if not is_sequence(value) or not any(map(is_sequence, value)):
        return [p for p in ints_of(name, "padding", value, rank) for _ in range(2)]
    pairs: list[list[int]] = []
    for entry in value:
        pair = list(entry) if is_sequence(entry) else [entry, entry]
        if len(pair) != 2:
            raise RuntimeError(f"{name}(): expected padding entries to be ints or (lower, upper), but got {entry}")
        pairs.append([index_of(name, "padding", p) for p in pair])
    return [p for pair in _spread(name, "padding", value, pairs, rank) for p in pair]
