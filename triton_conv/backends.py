"""Whose kernels run: this package's, or PyTorch's own where these were measured to be quicker.

`backend` is the user's choice; `admits` says which problems PyTorch may take over without a promise broken, `convolve`
is how it then computes them.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from .epilogue import PLAIN
from .geometry import ConvGeometry, Role
from .settings import Setting
from .ways import Problem

BACKENDS = ("triton", "auto")
VARIABLE = "TRITON_CONV_BACKEND"

_backend: Setting[str | None] = Setting(None)


def _asked_slowly(*_: str) -> str:
    return torch.backends.cudnn.conv.fp32_precision  # type: ignore[attr-defined]


# What that property calls, in a seventh of its time; private, so that a release may leave it out.
_float32_precision = getattr(torch._C, "_get_fp32_precision_getter", _asked_slowly)


class backend:
    """Choose whose kernels run, for the process; as a context manager, until its end.

        >>> triton_conv.backend("auto")  # from here on
        backend('auto')
        >>> with triton_conv.backend("triton"):  # in here
        ...     y = triton_conv.conv2d(torch.randn(1, 3, 8, 8), torch.randn(4, 3, 3, 3))
        >>> triton_conv.backend("triton")
        backend('triton')

    "triton", the default, is this package's kernels. With "auto", PyTorch's convolution (cuDNN) runs where tuning
    measured it at the very same size and found it quicker than our quickest kernel, by more than a tie. What nobody
    tuned stays here. The environment variable TRITON_CONV_BACKEND sets what holds before the first call.

    cuDNN was measured with `torch.backends.cudnn.benchmark` on; without it, it may run an algorithm that takes longer.
    Values are then cuDNN's, and so is their error; "auto" gives up the same bits on every run. Under
    `torch.use_deterministic_algorithms(True)` cuDNN competes only if `torch.backends.cudnn.deterministic` is set too.
    A float32 precision other than PyTorch's own setting, 8-bit floats, integers, complex numbers, padding modes and
    padding that differs between the sides are never cuDNN's.

    It is read at each call, also by what torch.compile has compiled. Raises ValueError for another name, and
    RuntimeError inside of compiled code.
    """

    def __init__(self, name: str) -> None:
        check(name, "name")
        if torch.compiler.is_compiling():  # the graph would run after what is changed here has been put back
            raise RuntimeError("backend: call it outside of what torch.compile compiles, which obeys it")
        self._name = name
        _backend.push(self, name)

    def __enter__(self) -> None:
        _backend.enter(self, self._name)

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        _backend.end(self)

    def __repr__(self) -> str:
        return f"backend({self._name!r})"


def check(name: object, argument: str) -> None:
    """Raises ValueError, naming the argument, unless `name` is a backend."""
    if name not in BACKENDS:
        raise ValueError(f"{argument} must be one of {BACKENDS}, but got {argument}={name!r}")


def current() -> str:
    """The backend in force. Raises ValueError if the environment names another."""
    return _backend.value or _of_environment()


@cache
def _of_environment() -> str:
    name = os.environ.get(VARIABLE) or "triton"
    check(name, VARIABLE)
    return name


def admits(problem: Problem) -> bool:
    """Whether PyTorch may compute a problem in our place: asked for, of the same meaning, with no promise broken."""
    return current() == "auto" and comparable(problem) and _keeps_promises(problem)


def settings() -> tuple[bool, bool, bool] | None:
    """What `admits` asks beside the problem and its precision; None where it admits nothing."""
    return _flags() if current() == "auto" else None


def comparable(problem: Problem) -> bool:
    """Whether PyTorch's own convolution computes the same: zeros equal on both sides, all outputs, a dtype of cuDNN's.

    What precision it multiplies with is not asked.
    """
    g = problem.geometry
    most = map(max, g.stride, g.dilation) if problem.role is Role.DGRAD else g.stride  # torch's rules
    return (
        problem.dtype in ("float16", "bfloat16", "float32", "float64")
        and problem.out_dtype == problem.dtype
        and not problem.has_scale
        and problem.epilogue == PLAIN
        and all(mode == "zeros" for mode in g.modes)
        and all(lower == upper >= 0 for lower, upper in g.padding)
        and all(extra < limit for extra, limit in zip(_cut_off(g), most, strict=True))
    )


def _keeps_promises(problem: Problem) -> bool:
    """Settings of PyTorch's are obeyed, not changed for a call: other threads read them too."""
    enabled, deterministic, asked = _flags()
    if not enabled:
        return False
    if problem.dtype == "float32" and problem.precision != default_precision():
        return False
    return deterministic or not asked


def _flags() -> tuple[bool, bool, bool]:
    flags = torch.backends.cudnn
    return flags.enabled, flags.deterministic, torch.are_deterministic_algorithms_enabled()


def default_precision() -> str:
    """How PyTorch is set to multiply float32 in convolutions; covers `cudnn.allow_tf32` and the newer settings."""
    return "tf32" if _float32_precision("cuda", "conv") == "tf32" else "ieee"


@contextmanager
def cudnn(enabled: bool = True, precision: str = "") -> Iterator[None]:
    """Within it, cuDNN is used or not, chooses by measuring, and multiplies float32 as "tf32" or "ieee" if so asked.

    Unlike `torch.backends.cudnn.flags`, it can be entered whichever of PyTorch's settings of TF32 were made.
    """
    settings: Any = torch.backends.cudnn
    names = ("enabled", "benchmark", "deterministic")
    before, precise = [getattr(settings, name) for name in names], settings.conv.fp32_precision

    def put(values: Sequence[bool], precision: str) -> None:
        with torch.backends.__allow_nonbracketed_mutation():  # as `flags` itself does
            for name, value in zip(names, values, strict=True):
                setattr(settings, name, value)
            if precision:
                settings.conv.fp32_precision = precision

    try:
        put((enabled, True, False), precision)
        yield
    finally:
        put(before, precision and precise)


def _cut_off(g: ConvGeometry) -> tuple[int, ...]:
    """By how much the input is longer than what the outputs see: output_padding, where the input is the output."""
    pairs = zip(g.input, g.padding, g.filter, g.output, g.stride, g.dilation, strict=True)
    return tuple(i + sum(p) - d * (f - 1) - 1 - s * (o - 1) for i, p, f, o, s, d in pairs)


def convolve(
    role: Role,
    g: ConvGeometry,
    a: Tensor,
    b: Tensor,
    bias: Tensor | None,
    shape: Sequence[int],
    strides: Sequence[int],
    channels_last: bool,
) -> Tensor:
    """PyTorch's result, of this shape and strides, for operands as `execute.Call` has them.

    They are copied to channels-last, or to contiguous, where they lie otherwise: the rival of that name did so too.
    """
    flat = g.filter[0] == g.input[0] == 1 and not any(g.padding[0])
    rank, last = (2, torch.channels_last) if flat else (3, torch.channels_last_3d)
    memory_format = last if channels_last else torch.contiguous_format
    axes = slice(3 - rank, None)
    walk = (list(g.stride[axes]), [lower for lower, _ in g.padding[axes]], list(g.dilation[axes]))
    # As the operator that it is: neither autocast nor a mode may change it once more.
    with torch._C._DisableAutocast(), torch._C.DisableTorchFunction(), torch.no_grad():
        first, second = (_of_dims(t, rank + 2).contiguous(memory_format=memory_format) for t in (a, b))
        if role is Role.WGRAD:
            wide = g.shape("w")
            w = first.new_empty(()).expand(*wide[:2], *wide[5 - rank :])  # of which only the shape is read
            how = (*walk, False, [0] * rank, g.groups, [False, True, False])
            result = torch.ops.aten.convolution_backward(first, second, w, None, *how)[1]
        else:
            extra = list(_cut_off(g)[axes]) if role is Role.DGRAD else [0] * rank
            transposed = role is Role.DGRAD
            result = torch.ops.aten.convolution(first, second, bias, *walk, transposed, extra, g.groups)
        result = _of_dims(result, len(shape))
        if all(have == want or n == 1 for have, want, n in zip(result.stride(), strides, shape, strict=True)):
            return result.as_strided(shape, strides)
        return result.new_empty_strided(shape, strides).copy_(result)


def _of_dims(t: Tensor, dims: int) -> Tensor:
    """(N, C, *spatial) with more or fewer axes of one position in front of the spatial ones."""
    while t.dim() < dims:
        t = t.unsqueeze(2)
    while t.dim() > dims:
        t = t.squeeze(2)
    return t
