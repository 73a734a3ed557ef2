"""The same bits: in every batch, on every run, however kernels are launched, and of the precision that was asked for.

Layers of every kernel family go through the public functions, forward and backward.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

import triton_conv
from triton_conv import batch_invariant, causal_conv1d, execute, plan, separable_conv2d
from triton_conv.devices import Device
from triton_conv.plan import Plan

from .. import host
from .steady import deterministic
from .support import compile_ahead
from .units import Context, Unit

_BATCHES, _TIMES = (1, 7, 64), 20
_TINY_BATCHES, _TINY_TIMES = (1, 2), 2


class Family(NamedTuple):
    """A layer: sizes of a sample and of its filters, and these where kernels are interpreted; `pad` is the larger's."""

    name: str
    sample: tuple[int, ...]
    weight: tuple[int, ...]
    tiny: tuple[tuple[int, ...], tuple[int, ...]]
    pad: int = 1
    last: bool = True
    dtype: torch.dtype = torch.bfloat16
    function: Callable[..., Tensor] = triton_conv.conv2d
    mode: str = "zeros"
    gradients: bool = True
    remembered: bool = True  # by `triton_conv.fast`
    recorded: bool = True  # by `execute.recording`, as plain convolutions are

    def operands(self, device: torch.device | str, N: int, tiny: bool) -> tuple[Tensor, Tensor]:
        """Input and filters, the same values whatever N."""
        sample, weight = self.tiny if tiny else (self.sample, self.weight)

        def random(shape: tuple[int, ...], seed: int) -> Tensor:
            if str(device) == "meta":
                t = torch.empty(shape, device=device, dtype=self.dtype)
            else:
                generator = torch.Generator(device).manual_seed(seed)
                t = torch.randn(shape, generator=generator, device=device).to(self.dtype)
            return t.contiguous(memory_format=torch.channels_last) if self.last else t

        return random((N, *sample), 0), random(weight, 1)

    def outputs(self, x: Tensor, w: Tensor, tiny: bool) -> list[Tensor]:
        """y, and if it has gradients those of x and w."""
        pads = (0, w.shape[-1] // 2) if tiny else self.pad
        options: dict[str, Any] = {"padding": pads, "padding_mode": self.mode} if x.dim() == 4 else {}
        if not self.gradients:
            with torch.no_grad():
                return [self.function(x, w, **options)]
        x, w = (t.detach().requires_grad_() for t in (x, w))
        y = self.function(x, w, **options)
        return [y.detach(), *torch.autograd.grad(y, (x, w), y.detach() / 16)]  # in float16 too


def _depthwise(x: Tensor, w: Tensor, **options: Any) -> Tensor:
    return triton_conv.conv2d(x, w, groups=len(w), **options)


def _causal(x: Tensor, w: Tensor) -> Tensor:
    y = causal_conv1d(x, w, activation="silu")
    assert isinstance(y, Tensor)
    return y


def _separable(x: Tensor, w: Tensor, **options: Any) -> Tensor:
    mixing = torch.ones(16, len(w), 1, 1, device=w.device, dtype=w.dtype)
    return separable_conv2d(x, w, mixing, fused=True, **options)


def _transposed(x: Tensor, w: Tensor, **options: Any) -> Tensor:
    return triton_conv.conv_transpose2d(x, w, stride=2, **options)


def _fused(x: Tensor, w: Tensor, **options: Any) -> Tensor:
    scale = torch.linspace(0.5, 1.5, len(w), device=w.device, dtype=w.dtype)
    return triton_conv.conv2d(x, w, activation="silu", scale=scale, **options)


def _branches(x: Tensor, w: Tensor, padding: Any, padding_mode: str) -> Tensor:
    return triton_conv.multi_conv2d(x, [triton_conv.Branch(filters, padding=padding) for filters in (w, w.flip(0))])


def _deformable(x: Tensor, w: Tensor, padding: Any, padding_mode: str) -> Tensor:
    offset = 2 * x[:, : 2 * w.shape[2] * w.shape[3]].detach()
    return triton_conv.deform_conv2d(x, offset, w, padding=padding)


def _in_chunks(x: Tensor, w: Tensor) -> Tensor:
    context = x[:, :, : w.shape[2] - 1].detach().neg()
    y = triton_conv.causal_conv3d(x, w, context=context, padding=w.shape[-1] // 2)
    assert isinstance(y, Tensor)
    return y


_IMAGE, _FILTERS, _SMALL = (64, 28, 28), (64, 64, 3, 3), ((16, 1, 3), (16, 16, 1, 2))
_EACH, _LANES = (64, 1, 3, 3), ((2, 1, 4), (2, 1, 1, 3))
_POINT, _FRAMES = ((16, 1, 3), (16, 16, 1, 1)), ((4, 1, 2, 2), (4, 4, 2, 1, 1))
_VIDEO, _CUBES = (64, 4, 14, 14), (64, 64, 3, 3, 3)
_APART: dict[str, Any] = {"remembered": False, "recorded": False}
FAMILIES = (
    Family("box", _IMAGE, _FILTERS, _SMALL),
    Family("gather", _IMAGE, _FILTERS, _SMALL, last=False, dtype=torch.float32),
    Family("few channels", (3, 32, 32), (32, 3, 3, 3), ((3, 1, 3), (8, 3, 1, 2)), last=False),
    Family("depthwise", _IMAGE, _EACH, _LANES, last=False, function=_depthwise),
    Family("depthwise, channels-last", _IMAGE, _EACH, _LANES, function=_depthwise),
    Family("banded", (64, 32, 32), (64, 1, 31, 31), ((1, 1, 16), (1, 1, 1, 13)), 15, False, torch.float16, _depthwise),
    Family("folded", _IMAGE, _FILTERS, _SMALL, mode="circular"),
    Family("transposed", (64, 14, 14), _FILTERS, _SMALL, function=_transposed),
    Family("causal", (256, 1024), (256, 4), ((2, 5), (2, 4)), last=False, function=_causal, remembered=False),
    Family("separable", _IMAGE, _EACH, _LANES, last=False, function=_separable, gradients=False, remembered=False),
    Family("fused", _IMAGE, _FILTERS, _SMALL, function=_fused, **_APART),
    Family("branches", _IMAGE, _FILTERS, _SMALL, function=_branches, **_APART),
    Family("deformable", _IMAGE, _FILTERS, _POINT, function=_deformable, **_APART),
    Family("video in chunks", _VIDEO, _CUBES, _FRAMES, last=False, function=_in_chunks, **_APART),
)
SIMULATED = ("few channels", "separable")  # the interpreter takes its time for others


def units(context: Context) -> Iterator[Unit]:
    """One that compiles what the others run, one for each family, one for TF32."""
    yield Unit("bits: compiled ahead", partial(_ahead, context), timeout=180.0)
    for family in FAMILIES:
        if context.simulate and family.name not in SIMULATED:
            continue
        yield Unit(f"bits: {family.name}", partial(same_bits, family, context), timeout=180.0)
    yield Unit("bits: TF32 switched between calls", partial(switched, context))


def plans(family: Family, device: Device, batches: tuple[int, ...]) -> list[Plan]:
    """What runs in a unit of a family whose kernels are those of plain convolutions; from shapes alone."""
    found = []
    for N in batches:
        with execute.recording() as calls:
            family.outputs(*family.operands("meta", N, tiny=False), tiny=False)
        problems = [execute.problem_of(call, device) for call in calls]
        with batch_invariant():
            found += [plan.make(problem) for problem in problems]
        if batches[1] == N:
            found += [plan.make(problem) for problem in problems]
    return found


def _ahead(context: Context) -> dict[str, Any]:
    """By all processors at once."""
    device = execute.device_of(context.device)
    if context.device.type != "cuda" or device is None:
        return {"ok": True, "words": "nothing to compile on a CPU"}
    known = [family for family in FAMILIES if family.gradients and family.recorded]
    wanted = [p for family in known for p in plans(family, device, _BATCHES)]
    facts = compile_ahead(wanted, context.device)
    words = f"{facts['plans']} plans in {facts['seconds']:.1f} s, {len(facts['faults'])} of which do not compile"
    return {"ok": not facts["faults"], "words": words, **facts}


def same_bits(family: Family, context: Context) -> dict[str, Any]:
    """A sample in batches of 1, 7 and 64; the same call 20 times; launched directly, by Triton, under a profiler."""
    tiny = context.simulate
    batches, times = (_TINY_BATCHES, _TINY_TIMES) if tiny else (_BATCHES, _TIMES)
    x, w = family.operands(context.device, batches[-1], tiny)
    run = partial(family.outputs, tiny=tiny)
    wrong = []
    with batch_invariant():
        alone, *others = ([t[0].clone() for t in run(x[:n], w)[:2]] for n in batches)
        last = [t[-1].clone() for t in run(x[: batches[1]], w)[:2]]
        for n, found in zip(batches[1:], others, strict=True):
            wrong += _different(f"sample 0 in a batch of {n}", found, alone)
        one = x[batches[1] - 1 : batches[1]]
        wrong += _different("the last sample alone", [t[0] for t in run(one, w)[:2]], last)

    x = x[: batches[1]]
    with deterministic():
        first = run(x, w)
        for number in range(2, times + 1):
            wrong += _different(f"run {number}", run(x, w), first)
    with host.counting() as count:
        wrong += _different("a warm run", run(x, w), first)
    if context.device.type == "cuda" and (count["short"] < 3 * family.remembered or count["binder"]):
        wrong.append(f"not short: {count['short']} calls are, {count['binder']} launches go by Triton's binder")
    with _by_triton():
        wrong += _different("launched by Triton", run(x, w), first)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]):
        wrong += _different("under a profiler", run(x, w), first)
    wrong += _different("after a profiler", run(x, w), first)
    finite = all(bool(t.isfinite().all()) for t in first)
    words = f"batches of {', '.join(map(str, batches))}, {times} runs, launched directly, by Triton, under a profiler"
    words += ": "
    words += "; ".join(wrong[:3]) or ("the same bits" if finite else "not all are finite")
    return {"ok": not wrong and finite, "words": words, "different": wrong[:20]}


def switched(context: Context) -> dict[str, Any]:
    """PyTorch's setting of TF32 is obeyed from one warm call to the next: bits are those of the precision by name."""
    cuda, setting = context.device.type == "cuda", torch.backends.cudnn.conv  # type: ignore[attr-defined]
    family = next(family for family in FAMILIES if family.name == "gather")
    x, w = family.operands(context.device, 2, context.simulate)
    before, wrong, results = setting.fp32_precision, list[str](), {}
    for name in ("ieee", "tf32"):
        results[name] = [triton_conv.conv2d(x, w, precision=name) for _ in range(2)][-1:]
    try:
        for number in range(6):
            name = ("ieee", "tf32")[number % 2]
            setting.fp32_precision = name
            wrong += _different(f"call {number}, {name}", [triton_conv.conv2d(x, w)], results[name])
    finally:
        setting.fp32_precision = before
    apart = not torch.equal(results["ieee"][0], results["tf32"][0])
    if cuda and not apart:
        wrong.append("TF32 and IEEE float32 have the same bits")
    words = "; ".join(wrong[:3]) or "six warm calls, each of the precision that was set"
    return {"ok": not wrong, "words": words, "different": wrong}


def _different(what: str, found: list[Tensor], wanted: list[Tensor]) -> list[str]:
    return [
        f"{name} of {what}"
        for name, a, b in zip(("y", "dx", "dw"), found, wanted, strict=False)
        if a.shape != b.shape or not torch.equal(a, b)
    ]


@contextmanager
def _by_triton() -> Iterator[None]:
    """Within it, every launch goes through Triton's public interface."""
    from triton_conv.kernels import direct

    before = direct._unusual
    direct._unusual = lambda kernel: True
    try:
        yield
    finally:
        direct._unusual = before
