"""Tensors of more than 2^31 elements, and of more than 2^31 bytes: every kernel against slices in float64.

Convolutions and causal ones are here, in `huge_calls` what is more than a convolution.

A slice is some of the images, or some of the rows of a single image, computed by plain PyTorch as a small problem of
its own. Of a weight gradient only these images have an output gradient other than zero.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from math import prod
from typing import Any, NamedTuple

import torch
from torch import Tensor

from triton_conv import causal_conv1d, causal_conv1d_update, check, execute, explain, plan
from triton_conv.config import Config, KernelConfig
from triton_conv.devices import Device
from triton_conv.explain import AnyPlan
from triton_conv.geometry import Role
from triton_conv.plan import Plan
from triton_conv.tuning import operands
from triton_conv.ways import Problem

from . import huge_calls
from .support import apart, compile_ahead, freed, left_out
from .units import Context, Unit

_NAMES = {Role.FPROP: "forward", Role.DGRAD: "input gradient", Role.WGRAD: "weight gradient"}
_GATHER = Config(64, 64, 32)


class Huge(NamedTuple):
    """A convolution that pads to its own size, and the kernel of it that is meant; `N` 1 is one image of many rows."""

    name: str
    kernel: str
    role: Role
    N: int
    dtype: torch.dtype = torch.bfloat16
    channels_last: bool = True
    C: int = 64
    groups: int = 1
    taps: int = 3
    stride: int = 1
    explicit: KernelConfig | None = None
    bits: int = 64  # of offsets

    def shapes(self, tiny: bool) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Of input and weight: images of 2^24 elements, of which 129 are more than 2^31."""
        C = (4 if self.taps > 3 else 16) if tiny else self.C
        taps = (C // (C if self.groups > 1 else 1), self.taps, self.taps)
        if tiny:
            size = 16 if self.taps > 3 or self.N == 1 else 8
            return (min(self.N, 2), C, size, size), (C, *taps)
        rows, columns = (512, 512) if self.N > 1 else (2**31 // self.C // 4096 + 64, 4096)
        return (self.N, C, rows, columns), (C, *taps)

    def problem(self, device: Device, tiny: bool) -> Problem:
        """What plans are made of."""
        shapes, groups = self.shapes(tiny), 1
        if self.groups > 1:
            groups = shapes[0][1]
        found = explain.problems(
            *shapes,
            padding=self.taps // 2,
            stride=self.stride,
            groups=groups,
            dtype=self.dtype,
            channels_last=self.channels_last,
            device=device,
            precision="ieee",
        )
        return found[_NAMES[self.role]]

    def plan(self, device: Device, tiny: bool) -> Plan:
        """The one of the kernel that is meant. Raises LookupError where it has none."""
        problem = self.problem(device, tiny)
        found = plan.every(problem, self.explicit)
        for p in found:
            if p.kernel == self.kernel and not p.packs:
                return p
        raise LookupError(f"no plan by {self.kernel} among {', '.join(p.kernel for p in found)} for {problem.geometry}")


def _family(name: str, kernel: str, wgrad: str, **how: Any) -> list[Huge]:
    roles = ((Role.FPROP, kernel), (Role.DGRAD, kernel), (Role.WGRAD, wgrad))
    return [Huge(f"{name} {role.value}", by, role, 129, **how) for role, by in roles]


HUGE: tuple[Huge, ...] = (
    *_family("box", "box", "box_wgrad"),
    *_family("gather", "gather", "wgrad", channels_last=False),
    *_family("gather channels-last", "gather", "wgrad", explicit=_GATHER),
    *_family("depthwise", "depthwise", "depthwise_wgrad", groups=64),
    *_family("depthwise contiguous", "depthwise", "depthwise_wgrad", groups=64, channels_last=False),
    *_family("banded", "banded", "banded_wgrad", groups=64, taps=13, channels_last=False),
    Huge("box one image fprop", "box", Role.FPROP, 1),
    Huge("gather one image fprop", "gather", Role.FPROP, 1, channels_last=False),
    Huge("gather one image dgrad", "gather", Role.DGRAD, 1, channels_last=False),
    Huge("box stride 2 fprop", "box", Role.FPROP, 129, stride=2, taps=2),
    Huge("box stride 2 dgrad", "box", Role.DGRAD, 129, stride=2, taps=2),
    Huge("gather float32 fprop", "gather", Role.FPROP, 129, dtype=torch.float32),
    Huge("box between 2^31 bytes and elements fprop", "box", Role.FPROP, 100, bits=32),
    Huge("gather between 2^31 bytes and elements fprop", "gather", Role.FPROP, 100, channels_last=False, bits=32),
)


def units(context: Context) -> Iterator[Unit]:
    """One for each of `HUGE`, those of causal convolutions and steps, and one for each of `huge_calls.CALLS`."""
    if execute.device_of(context.device) is None:
        yield Unit("huge", partial(left_out, "kernels run on a GPU, or where TRITON_INTERPRET=1"))
        return
    yield Unit("huge: compiled ahead", partial(_compiled, context), timeout=240.0)
    for huge in HUGE:
        yield Unit(f"huge: {huge.name}", partial(checked, huge, context))
    yield Unit("huge: causal", partial(_causal, context))
    yield Unit("huge: causal update", partial(_causal_update, context))
    yield from huge_calls.units(context)


def _device(context: Context) -> Device:
    device = execute.device_of(context.device)
    assert device is not None
    return device


def _compiled(context: Context) -> dict[str, Any]:
    device, plans = _device(context), list[AnyPlan]()
    for huge in HUGE:
        try:
            plans.append(huge.plan(device, context.simulate))
        except LookupError:  # which its own unit says
            continue
    plans += [p for call in huge_calls.CALLS for p in call.plans(device)]
    facts = compile_ahead(plans, context.device)
    words = f"{facts['plans']} plans compiled in {facts['seconds']:.1f} s, {len(facts['faults'])} faults"
    return {"ok": True, "words": words, **facts}


def checked(huge: Huge, context: Context) -> dict[str, Any]:
    """The facts of one case. Raises LookupError where the kernel that is meant cannot run it."""
    device, where = _device(context), context.device
    freed(where)
    problem, p = huge.problem(device, context.simulate), huge.plan(device, context.simulate)
    bits, g = p.numerics.index_bits, problem.geometry
    call, output = operands.operands(problem, where, seed=0)
    parts = _slices(g.N, g.input[1], context.simulate)
    images = sorted({n for n, _ in parts})
    if huge.role is Role.WGRAD:
        for n in set(range(g.N)) - set(images):
            call.a[n].zero_()
    execute.run(p, call, output)
    if huge.role is Role.WGRAD:
        wrong = _wrong_sum(problem, call, output, images)
    else:
        wrong = [words for part in parts for words in _wrong(problem, call, output, part)]
    unwritten = sum(int(output[n].isnan().sum()) for n in range(output.shape[0]))
    if unwritten:
        wrong.append(f"{unwritten} elements are not written")
    largest = max(prod(g.shape(name)) for name in "xy")
    if not context.simulate and bits != huge.bits:
        wrong.append(f"offsets have {bits} bits, {huge.bits} are needed")
    words = f"{p.kernel}, {largest:,} elements, {bits}-bit offsets: "
    del call, output
    freed(where)
    facts = {"kernel": p.kernel, "config": str(p.config), "elements": largest, "index_bits": bits}
    return {"ok": not wrong, "words": words + ("; ".join(wrong[:3]) or "right"), **facts}


def _slices(N: int, rows: int, tiny: bool) -> list[tuple[int, slice]]:
    """(an image, rows of the operands that are read): the first, the middle and the last of either."""
    if N > 1:
        return [(n, slice(0, rows)) for n in sorted({0, N // 2, N - 1})]
    part = 8 if tiny else 32
    return [(0, slice(first, first + part)) for first in sorted({0, rows // 2 - part // 2, rows - part})]


def _wrong(problem: Problem, call: execute.Call, output: Tensor, part: tuple[int, slice]) -> list[str]:
    """How a slice of the output of fprop or dgrad differs, in words; rows beside a cut are not looked at."""
    n, rows = part
    g, image = problem.geometry, slice(n, n + 1)
    whole = rows == slice(0, g.input[1])
    got, small = output[image], replace(g, N=1)
    a = call.a[image]
    if not whole:  # stride 1: as many rows in as out
        count = rows.stop - rows.start
        small = replace(small, input=_with_rows(g.input, count), output=_with_rows(g.output, count))
        a, got = a[:, :, :, rows], got[:, :, :, rows]
    want = operands.expected(problem._replace(geometry=small), replace(call, geometry=small, a=a))
    if not whole:
        beside = g.filter[1] // 2
        inner = slice(0 if rows.start == 0 else beside, -beside if rows.stop < g.input[1] else None)
        want, got = want[:, :, :, inner], got[:, :, :, inner]
    return _beyond(problem, small, got, want, f"image {n} rows {rows.start} to {rows.stop}")


def _wrong_sum(problem: Problem, call: execute.Call, output: Tensor, images: Sequence[int]) -> list[str]:
    """How a weight gradient differs from the sum over these images, in words."""
    g = problem.geometry
    small = replace(g, N=len(images))
    a, b = (torch.cat([t[n : n + 1] for n in images]) for t in (call.a, call.b))
    few = replace(call, geometry=small, a=a, b=b)
    want = operands.expected(problem._replace(geometry=small), few)
    return _beyond(problem, small, output, want, "the weight gradient")


def _beyond(problem: Problem, small: Any, got: Tensor, want: Tensor, what: str) -> list[str]:
    depth = check.depth(small, problem.role)
    want = want.reshape(got.shape)
    bound = check.tolerance(want, depth, got.dtype, problem.precision, got.device)
    error = torch.nan_to_num((got.to(want.dtype) - want).abs(), nan=torch.inf, posinf=torch.inf)
    count = int((error > bound).sum())
    return (
        [f"{count} of {error.numel()} elements of {what} are off, by up to {float(error.max()):.3g}"] if count else []
    )


def _with_rows(extents: tuple[int, ...], rows: int) -> tuple[int, int, int]:
    return extents[0], rows, extents[2]


def _causal(context: Context) -> dict[str, Any]:
    """Forward and gradients of a causal convolution, channels in slices against torch's."""
    tiny, where = context.simulate, context.device
    freed(where)
    B, C, L = (2, 8, 40) if tiny else (2, 2**15, 2**15 + 2**9)
    dtype = torch.float32 if tiny else torch.bfloat16
    generator = torch.Generator(where).manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=where).normal_(generator=generator)

    x, w, dy = random(B, C, L).requires_grad_(), random(C, 4).requires_grad_(), random(B, C, L)
    y = causal_conv1d(x, w)
    assert isinstance(y, Tensor)
    dx, dw = torch.autograd.grad(y, (x, w), dy)
    worst = 0.0
    for first in (0, C // 2, C - 4):
        c = slice(first, first + 4)
        xs, ws = (t[:, c] if t is x else t[c] for t in (x, w))
        xs, ws = (t.detach().double().requires_grad_() for t in (xs, ws))
        padded = torch.nn.functional.pad(xs, (3, 0))
        want = sum(padded[:, :, tap : tap + L] * ws[:, tap].view(-1, 1) for tap in range(4))
        assert isinstance(want, Tensor)
        wanted = (want.detach(), *torch.autograd.grad(want, (xs, ws), dy[:, c].double()))
        worst = max(worst, *(apart(a, b) for a, b in zip((y[:, c].detach(), dx[:, c], dw[c]), wanted, strict=True)))
    elements = B * C * L
    del x, w, dy, y, dx, dw
    freed(where)
    words = f"causal_conv1d and its gradients, {elements:,} elements: off by {worst:.2g} of their norm"
    return {"ok": worst < 0.01, "words": words, "elements": elements, "error": worst}


def _causal_update(context: Context) -> dict[str, Any]:
    """A step of many sequences, some of them against torch's; the state of two taps is the input before."""
    where, dtype = context.device, torch.bfloat16
    freed(where)
    B, C = (3, 16) if context.simulate else (2**16, 2**15 + 2**7)
    generator = torch.Generator(where).manual_seed(0)
    x, state, w = (torch.empty(s, dtype=dtype, device=where) for s in ((B, C, 1), (B, C, 1), (C, 2)))
    for t in (x, state, w):
        t.normal_(generator=generator)
    some = [0, B // 2, B - 1]
    before = state[some].double()
    with check.poisoned():
        y = causal_conv1d_update(x, state, w)
    want = before[:, :, 0] * w[:, 0].double() + x[some, :, 0].double() * w[:, 1].double()
    error = apart(y[some, :, 0], want)
    moved = all(torch.equal(a, b) for a, b in zip(state.split(2**12), x.split(2**12), strict=True))
    written = not any(part.isnan().any() for part in y.split(2**12))
    words = f"causal_conv1d_update, {B * C:,} elements: off by {error:.2g} of their norm"
    words += "" if moved else "; the state is not what came last"
    words += "" if written else "; elements of y are not written"
    del x, state, y
    freed(where)
    return {"ok": error < 0.01 and moved and written, "words": words, "elements": B * C, "error": error}
