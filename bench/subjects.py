"""The ways to compute a job, each on operands that already lie as it wants them: ours, and others'.

The convolution that users write is timed whole: our operators with whatever copies their plans make, PyTorch's with the
padding before it where cuDNN has no such border. A gradient on its own starts from what a forward pass has kept.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

import triton_conv
from triton_conv import explain, ops, schemas
from triton_conv.geometry import ConvGeometry, Role

from .jobs import Job
from .kinds.kind import Forward as NamedForward
from .kinds.kind import Kind, Tensors
from .records import (
    CHANNELS_LAST,
    COMPILED,
    CONTIGUOUS,
    FLAG_GEMS,
    LINEAR,
    OTHERS,
    OURS,
    PADDED_CHANNELS_LAST,
    PADDED_CONTIGUOUS,
)

DEFAULT = tuple(name for name in OTHERS if name != COMPILED)  # which takes minutes to compile a few layers

Work = Callable[[], tuple[Tensor, ...]]
Forward = Callable[[Tensor, Tensor], Tensor]


class Operands(NamedTuple):
    """Input, weight and gradient of the output, in the caller's shapes, and what a kind of layers has `besides`."""

    x: Tensor
    w: Tensor
    dy: Tensor
    besides: Mapping[str, Tensor] = MappingProxyType({})

    @property
    def named(self) -> dict[str, Tensor]:
        """What is computed from, by name."""
        return {"x": self.x, "w": self.w, **self.besides}


class Subject(NamedTuple):
    """One way to compute a job.

    `prepared` makes of operands what is timed; its results are those that `results` names, in that order. `between`
    says that it rounds to its dtype before it is done, which no single kernel does.
    """

    who: str
    channels_last: bool
    prepared: Callable[[Operands], Work]
    between: bool = False


_RESULTS = {"fprop": ("y",), "dgrad": ("dx",), "wgrad": ("dw",), "step": ("y", "dx", "dw")}


def results(job: Job) -> tuple[str, ...]:
    """Names of what a job computes; a step has the gradients of everything that a layer is computed from."""
    if job.kind is None or job.op != "step":
        return _RESULTS[job.op]
    return ("y", *(f"d{name}" for name in job.kind.shapes(job.layer)))


@dataclass(frozen=True)
class Convolution:
    """A layer's parameters, one entry for each spatial axis; `padding` in pairs."""

    geometry: ConvGeometry
    rank: int
    transposed: bool
    output_padding: tuple[int, ...]

    @classmethod
    def of(cls, job: Job) -> Convolution:
        options, rank = job.layer.options, len(job.layer.weight) - 2
        problem = explain.problems(job.layer.input, job.layer.weight, **options)["forward"]
        extra = options.get("output_padding", 0)
        extra = (extra,) * rank if isinstance(extra, int) else tuple(extra)
        return cls(problem.geometry, rank, problem.role is Role.DGRAD, extra)

    def axes(self, name: str) -> tuple[Any, ...]:
        """Of `stride`, `padding`, `dilation` or `modes`."""
        return getattr(self.geometry, name)[3 - self.rank :]

    @property
    def before(self) -> list[tuple[int, int]]:
        """What is padded before a convolution that only knows zeros, equal on both sides."""
        borders = zip(self.axes("padding"), self.axes("modes"), strict=True)
        return [(0, 0) if mode == "zeros" and pair[0] == pair[1] else pair for pair, mode in borders]

    @property
    def within(self) -> list[int]:
        """And what that convolution pads."""
        pairs = zip(self.axes("padding"), self.before, strict=True)
        return [0 if any(before) else lower for (lower, _), before in pairs]

    @property
    def cuts(self) -> bool:
        """Whether it is a product of patches that do not overlap and leave nothing over."""
        g = self.geometry
        whole = all(i % f == 0 for i, f in zip(g.input, g.filter, strict=True))
        plain = not self.transposed and g.groups == 1 and not any(map(any, g.padding)) and g.taps > 1
        return plain and whole and g.filter == g.stride and max(g.dilation) == 1


def subjects(job: Job, who: Collection[str] | None = None) -> list[Subject]:
    """Ours, then those of `who` that can compute the job; None: all but torch.compile.

    Raises ValueError for a name that there is not.
    """
    wanted = DEFAULT if who is None else who
    strange = sorted(set(wanted) - {OURS, *OTHERS})
    if strange:
        raise ValueError(f"who: {strange[0]!r} is not one of {', '.join(OTHERS)}")
    found = _ours_and_others(job) if job.kind is None else _of_kind(job, job.kind)
    if COMPILED in wanted:
        found += _compiled(job, found)
    return [subject for subject in found if subject.who in (OURS, *wanted)]


def _ours_and_others(job: Job) -> list[Subject]:
    conv = Convolution.of(job)
    last = bool(job.layer.options.get("channels_last"))
    found = [Subject(OURS, last, partial(_ours, job, conv))]
    padded = any(map(any, conv.before))
    if conv.transposed and padded:
        return found  # nobody else has it
    names = (PADDED_CONTIGUOUS, PADDED_CHANNELS_LAST) if padded else (CONTIGUOUS, CHANNELS_LAST)
    for name, how in zip(names, (False, True), strict=True):
        found.append(Subject(name, how, partial(_cudnn, job.op, conv), between=padded))
    if conv.cuts:
        found.append(Subject(LINEAR, last, partial(_linear, job.op, conv, last)))
    gems = _flag_gems(conv) if job.op in ("fprop", "step") else None
    if gems is not None:
        found.append(Subject(FLAG_GEMS, last, partial(_forward_or_step, job.op, gems), between=padded))
    return found


def _forward_or_step(op: str, forward: Forward, t: Operands) -> Work:
    return _named_forward_or_step(op, lambda named: forward(named["x"], named["w"]), t)


def _named_forward_or_step(op: str, forward: NamedForward, t: Operands) -> Work:
    if op == "fprop":
        return lambda: (forward(t.named),)
    leaves = {name: tensor.detach().requires_grad_() for name, tensor in t.named.items()}

    def step() -> tuple[Tensor, ...]:
        with torch.enable_grad():
            y = forward(leaves)
        return y.detach(), *torch.autograd.grad(y, tuple(leaves.values()), t.dy)

    return step


# ---------------------------------------------------------------------------------------------------------------------
# Ours


def _ours(job: Job, conv: Convolution, t: Operands) -> Work:
    known = {k: v for k, v in job.layer.options.items() if k not in ("dtype", "channels_last", "transposed")}
    if job.op in ("fprop", "step"):
        name = f"conv{'_transpose' * conv.transposed}{conv.rank}d"
        return _forward_or_step(job.op, partial(getattr(triton_conv, name), **known), t)
    padding = [p for pair in conv.axes("padding") for p in pair]
    walk = (list(conv.axes("stride")), padding, list(conv.axes("dilation")), conv.geometry.groups)
    params = (*walk, ",".join(conv.axes("modes")), known.get("precision"))
    if job.op == "wgrad":
        pair = (t.x, t.dy) if conv.transposed else (t.dy, t.x)
        return lambda: (ops.conv_wgrad(*pair, t.w.shape, t.w.stride(), *params),)
    if conv.transposed:
        return lambda: (schemas.fprop(t.dy, t.w, None, params),)
    return lambda: (ops.conv_dgrad(t.dy, t.w, t.x.shape, *params),)


# ---------------------------------------------------------------------------------------------------------------------
# cuDNN, in two dimensions or three: PyTorch makes two of one as well


def _cudnn(op: str, conv: Convolution, t: Operands) -> Work:
    flat = [0] * (conv.rank == 1)  # an axis of one position in front
    one = [1] * (conv.rank == 1)
    before = [*((0, 0) for _ in flat), *conv.before]
    modes = [*("zeros" for _ in flat), *conv.axes("modes")]
    walk = ([*one, *conv.axes("stride")], [*flat, *conv.within], [*one, *conv.axes("dilation")])
    how = (*walk, conv.transposed, [*flat, *conv.output_padding], conv.geometry.groups)
    x, w, dy = (a.unsqueeze(2) if flat else a for a in (t.x, t.w, t.dy))

    def narrow(results: Sequence[Tensor]) -> tuple[Tensor, ...]:
        return tuple(r.squeeze(2) if flat else r for r in results)

    if op in ("fprop", "step"):
        work = _forward_or_step(
            op, lambda x, w: torch.convolution(_padded(x, before, modes), w, None, *how), Operands(x, w, dy)
        )
        return lambda: narrow(work())
    wide = _padded(x, before, modes)  # which a forward pass has kept
    mask = [op == "dgrad", op == "wgrad", False]

    def gradient() -> tuple[Tensor, ...]:
        dx, dw, _ = torch.ops.aten.convolution_backward(dy, wide, w, None, *how, mask)
        return narrow([_unpadded(dx, before, modes) if op == "dgrad" else dw])

    return gradient


def _padded(x: Tensor, before: Sequence[tuple[int, int]], modes: Sequence[str]) -> Tensor:
    """As `torch.nn` pads: one call for each mode."""
    for mode in dict.fromkeys(modes):
        pairs = [pair if m == mode else (0, 0) for pair, m in zip(before, modes, strict=True)]
        if any(map(any, pairs)):
            flat = [p for pair in reversed(pairs) for p in pair]
            x = functional.pad(x, flat, mode="constant" if mode == "zeros" else mode)
    return x


def _unpadded(dx: Tensor, before: Sequence[tuple[int, int]], modes: Sequence[str]) -> Tensor:
    """The gradient of `_padded`, an axis at a time.

    Written out, because autograd would run it on the stream of a forward pass that no graph has captured.
    """
    for axis, (pair, mode) in enumerate(zip(before, modes, strict=True), start=2):
        lower, upper = pair
        if not any(pair):
            continue
        extent = dx.shape[axis] - lower - upper
        first, middle, last = dx.split((lower, extent, upper), dim=axis)
        dx = middle.clone()
        if mode == "circular":
            dx.narrow(axis, extent - lower, lower).add_(first)
            dx.narrow(axis, 0, upper).add_(last)
        elif mode == "replicate":
            dx.narrow(axis, 0, 1).add_(first.sum(axis, keepdim=True))
            dx.narrow(axis, extent - 1, 1).add_(last.sum(axis, keepdim=True))
        elif mode == "reflect":
            dx.narrow(axis, 1, lower).add_(first.flip(axis))
            dx.narrow(axis, extent - 1 - upper, upper).add_(last.flip(axis))
    return dx


# ---------------------------------------------------------------------------------------------------------------------
# F.linear of patches


def _linear(op: str, conv: Convolution, channels_last: bool, t: Operands) -> Work:
    rank, taps = conv.rank, conv.geometry.filter[3 - conv.rank :]
    outs = list(range(2, 2 + 2 * rank, 2))  # of (N, C, out, tap, out, tap, ...)
    inner = [*(o + 1 for o in outs), 1] if channels_last else [1, *(o + 1 for o in outs)]
    order = [0, *outs, *inner]

    def patches(x: Tensor) -> Tensor:
        for axis, n in zip(reversed(range(2, 2 + rank)), reversed(taps), strict=True):
            x = x.unflatten(axis, (-1, n))
        return x.permute(order).flatten(1 + rank).flatten(0, rank)

    def matrix(w: Tensor) -> Tensor:
        return (w.movedim(1, -1) if channels_last else w).flatten(1)

    def forward(x: Tensor, w: Tensor) -> Tensor:
        y = functional.linear(patches(x), matrix(w))
        return y.view(t.dy.shape[0], *t.dy.shape[2:], -1).movedim(-1, 1)

    if op in ("fprop", "step"):
        return _forward_or_step(op, forward, t)
    kept, filters = patches(t.x), matrix(t.w)

    def rows() -> Tensor:
        return t.dy.movedim(1, -1).flatten(0, rank)

    def wgrad() -> tuple[Tensor, ...]:
        dw = rows().t() @ kept
        if channels_last:
            return (dw.view(t.w.shape[0], *taps, -1).movedim(-1, 1),)
        return (dw.view(t.w.shape),)

    def dgrad() -> tuple[Tensor, ...]:
        N, C, *extents = t.x.shape
        parts = (rows() @ filters).view(N, *t.dy.shape[2:], *((*taps, C) if channels_last else (C, *taps)))
        whole = parts.permute([order.index(d) for d in range(len(order))])  # (N, C, out, tap, ...)
        if channels_last:
            return (whole.movedim(1, -1).reshape(N, *extents, C).movedim(-1, 1),)
        return (whole.reshape(t.x.shape),)

    return wgrad if op == "wgrad" else dgrad


# ---------------------------------------------------------------------------------------------------------------------
# torch.compile and FlagGems


def _compiled(job: Job, found: Sequence[Subject]) -> list[Subject]:
    """Inductor's of the call that users write, in the layer's own memory format; its gradients are part of a step."""
    rivals = [s for s in found if s.who != OURS and s.channels_last == bool(job.layer.options.get("channels_last"))]
    rivals = rivals or [s for s in found[1:] if job.kind is not None]
    if job.op not in ("fprop", "step") or not rivals:
        return []
    torch.compiler.reset()  # or the ninth layer finds that one function has been compiled too often
    # "max-autotune" but for its own CUDA graphs, which cannot be captured: what is timed is a graph of ours
    fast: Any = torch.compile(_plain(job), mode="max-autotune-no-cudagraphs", dynamic=False)
    between = any(s.between for s in rivals)
    return [Subject(COMPILED, rivals[0].channels_last, partial(_named_forward_or_step, job.op, fast), between)]


def _plain(job: Job) -> NamedForward:
    if job.kind is not None:
        return partial(job.kind.plain, job.layer)
    conv = Convolution.of(job)

    def forward(t: Tensors) -> Tensor:
        (y,) = _cudnn("fprop", conv, Operands(t["x"], t["w"], t["x"]))()
        return y

    return forward


def _flag_gems(conv: Convolution) -> Forward | None:
    if conv.transposed or importlib.util.find_spec("flag_gems") is None:
        return None
    run = getattr(importlib.import_module("flag_gems.ops"), f"conv{conv.rank}d", None)
    if run is None:
        return None
    before, modes = conv.before, conv.axes("modes")
    how = (list(conv.axes("stride")), conv.within, list(conv.axes("dilation")), conv.geometry.groups)
    return lambda x, w: run(_padded(x, before, modes), w, None, *how)


# ---------------------------------------------------------------------------------------------------------------------
# Layers that are more than a convolution


def _of_kind(job: Job, kind: Kind) -> list[Subject]:
    last = bool(job.layer.options.get("channels_last"))
    ours = partial(_named_forward_or_step, job.op, partial(kind.ours, job.layer))
    found = [Subject(OURS, last, ours, kind.between(job.layer, job.op))]
    for rival in kind.rivals(job.layer, job.op):
        prepared = partial(_named_forward_or_step, job.op, rival.forward)
        found.append(Subject(rival.who, rival.channels_last, prepared, rival.between))
    return found
