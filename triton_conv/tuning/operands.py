"""Random operands of a problem, in its very layout, and whether a plan computes from them what it should."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from math import prod

import torch
from torch import Tensor

from .. import backends, check, execute, plan, reference
from ..geometry import ConvGeometry, Role
from ..plan import Plan
from ..ways import Problem

_SCALES = (0.5, 0.75)
_SUM_OF_BYTES = 2.0**-13  # sums of 8-bit floats keep so much of a step, on the matrix units that add them
_CHUNK = 2**27  # elements of float64 that a reference holds of its operands and output at a time


def operands(problem: Problem, device: torch.device, seed: int) -> tuple[execute.Call, Tensor]:
    """(a call, its output) with tensors of the problem's strides; what lies between their elements is NaN.

    Floating-point values are standard normal, integers are in -4..4 (0..8 if unsigned), so that every sum is exact.
    """
    g, generator = problem.geometry, torch.Generator(device).manual_seed(seed)
    read = {Role.FPROP: "xw", Role.DGRAD: "yw", Role.WGRAD: "yx"}[problem.role]
    (written,) = set("xwy") - set(read)
    placed = {name: _empty(problem, name, device, written) for name in "xwy"}
    for name in read:
        _randomise(placed[name], generator)
    bias = scales = None
    if problem.has_bias:
        channels = g.C if problem.role is Role.DGRAD else g.K
        bias = _randomised(torch.empty(channels, dtype=placed[written].dtype, device=device), generator)
    if problem.has_scale:
        first, second = (torch.tensor([scale], device=device) for scale in _SCALES)
        scales = first, second
    a, b = (placed[name] for name in read)
    call = execute.Call(problem.role, g, a, b, bias, problem.precision, (), scales, placed[written].dtype)
    return _with_epilogue(call, problem, written, device, generator), poison(placed[written])


def _with_epilogue(
    call: execute.Call, problem: Problem, written: str, device: torch.device, generator: torch.Generator
) -> execute.Call:
    """The call with what its problem's epilogue reads and keeps."""
    e, scale, residual, kept = problem.epilogue, None, None, None
    if e.scale:
        channels = problem.geometry.shape(written)[1]
        dtype = getattr(torch, problem.scale_dtype or problem.out_dtype)
        scale = torch.empty(channels, device=device).uniform_(0.5, 1.5, generator=generator).to(dtype)
    if e.residual:  # one that is not aligned is copied
        residual = _empty(problem._replace(aligned=not problem.moves_residual), written, device, written)
        _randomise(residual, generator)
    if e.keep:
        kept = poison(_empty(problem, written, device, written))
    return replace(call, epilogue=e, scale=scale, residual=residual, kept=kept)


def bytes_of(problem: Problem) -> int:
    """Of the operands and the output, with what lies between their elements."""
    g, strides, e = problem.geometry, problem.strides, problem.epilogue
    item = torch.empty((), dtype=getattr(torch, problem.dtype)).itemsize
    of_output = (bool(e.residual) + e.keep) * ("x" if problem.role is Role.DGRAD else "y")
    return sum(plan.span(g.shape(name), getattr(strides, name)) for name in "xwy" + of_output) * item


def poison(t: Tensor) -> Tensor:
    """The tensor, filled with NaN, an integer one with its largest value."""
    return t.fill_(torch.nan if t.is_floating_point() else torch.iinfo(t.dtype).max)


def wrong(problem: Problem, p: Plan, call: execute.Call, output: Tensor, want: Tensor) -> str | None:
    """How the output of a plan differs from what it should be, in words; None where it does not."""
    with check.poisoned():  # workspaces and copies too
        execute.run(p, call, poison(output))
    if not output.is_floating_point():
        error = (output.to(torch.int64) - want.to(torch.int64).to(output.dtype).to(torch.int64)).abs()
        return where(error, error > 0, "exact")
    sums = _SUM_OF_BYTES if call.a.dtype is torch.float8_e4m3fn else 0.0
    depth = check.depth(problem.geometry, problem.role)
    bound = check.tolerance(want, depth, output.dtype, problem.precision, output.device, sums)
    error = torch.nan_to_num((output.to(want.dtype) - want).abs(), nan=torch.inf, posinf=torch.inf)
    return where(error, error > bound, "within rounding")


def expected(problem: Problem, call: execute.Call) -> Tensor:
    """What a plan should compute, in float64 on the operands' device, by plain PyTorch without cuDNN."""
    g, total = problem.geometry, list[Tensor]()
    with _any_algorithm(), backends.cudnn(enabled=False):  # which may transform: that is inexact for integers
        for images, part in _parts(g):
            a = call.a[images].double()
            if problem.role is Role.FPROP:
                total.append(sum(_fprops(a, call.b, part), torch.zeros((), dtype=a.dtype, device=a.device)))
            elif problem.role is Role.DGRAD:
                found = [reference.dgrad(a, call.b[:, c].double(), None, some) for c, some in _channels(part)]
                total.append(torch.cat(found, 1))
            else:
                found = [reference.wgrad(a, call.b[images, c].double(), some) for c, some in _channels(part)]
                dw = torch.cat(found, 1)
                total = [total[0] + dw if total else dw]
    result = torch.cat(total)
    if call.scales is not None:
        result *= prod(_SCALES)
    return reference.finished(result, call.scale, call.bias, call.residual, call.epilogue)[0]


def _parts(g: ConvGeometry) -> Iterator[tuple[slice, ConvGeometry]]:
    """Images that fit into a chunk, and their geometry."""
    of_one = max((prod(g.shape("x")) + prod(g.shape("y"))) // max(g.N, 1), 1)
    size = max(_CHUNK // of_one, 1)
    for first in range(0, g.N, size):
        images = min(size, g.N - first)
        yield slice(first, first + images), replace(g, N=images)


@contextmanager
def _any_algorithm() -> Iterator[None]:
    """Even where `torch.use_deterministic_algorithms` is on, which refuses cuBLAS unless its workspace is set."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(False)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])


def _fprops(x: Tensor, w: Tensor, part: ConvGeometry) -> Iterator[Tensor]:
    for c, some in _channels(part):
        yield reference.fprop(x[:, c], w[:, c].double(), None, some)


def _channels(g: ConvGeometry) -> Iterator[tuple[slice, ConvGeometry]]:
    """Input channels whose windows fit into some chunks, and their geometry: PyTorch lays the windows of an image out.

    Those of a group are not shared out, except where it is the only one.
    """
    most = max(8 * _CHUNK // max(prod(g.filter) * prod(g.output), 1), 1) if g.groups == 1 else g.C
    for first in range(0, g.C, most):
        channels = min(most, g.C - first)
        of_these = slice(first, first + channels) if channels < g.C else slice(None)
        yield of_these, replace(g, C=channels)


def _empty(problem: Problem, name: str, device: torch.device, written: str) -> Tensor:
    """An operand's place in memory, its surroundings poisoned."""
    shape, strides = problem.geometry.shape(name), getattr(problem.strides, name)
    dtype = getattr(torch, problem.out_dtype if name == written else problem.dtype)
    offset = 0 if problem.aligned else 1
    flat = torch.empty(plan.span(shape, strides) + offset, dtype=dtype, device=device)
    return (poison(flat) if flat.numel() > prod(shape) else flat).as_strided(shape, strides, offset)


def _randomise(t: Tensor, generator: torch.Generator) -> None:
    first = tuple(slice(0, 1) if stride == 0 else slice(None) for stride in t.stride())
    _randomised(t[first], generator)  # what is expanded is there once


def _randomised(t: Tensor, generator: torch.Generator) -> Tensor:
    if t.dtype is torch.float8_e4m3fn:
        return t.copy_(torch.randn(t.shape, generator=generator, device=t.device))
    if t.is_floating_point():
        return t.normal_(generator=generator)
    low = 0 if t.dtype is torch.uint8 else -4
    return t.random_(low, low + 9, generator=generator)


def where(error: Tensor, off: Tensor, how: str) -> str | None:
    """How many elements are `off`, and where the error is largest, in words; None where none is."""
    count = int(off.sum())
    if not count:
        return None
    worst = int(torch.where(off, error.double(), -1.0).argmax())
    position = [int(i) for i in torch.unravel_index(torch.tensor(worst), error.shape)]
    size = float(error.flatten()[worst])
    return f"{count} of {error.numel()} elements are not {how}, the worst by {size:.3g} at {position}"
