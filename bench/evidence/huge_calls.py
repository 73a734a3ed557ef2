"""Calls with tensors of more than 2^31 elements that are more than a convolution: some of their images in float64.

The gradient of the output is zero but for these images, so that gradients of filters are sums over them, and those of
other images nothing at all.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial
from math import prod
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

import triton_conv
from triton_conv import backends, check, explain
from triton_conv.devices import Device
from triton_conv.explain import AnyPlan
from triton_conv.tuning.layers import Layer

from .. import kinds, values
from ..kinds.branches import Branches
from ..kinds.kind import Kind, Tensors, convolve
from .support import freed, left_out
from .units import Context, Unit

_IMAGES = {"x", "offset", "mask", "context", "residual"}  # operands that have some of their own for every image
_BF16 = {"dtype": torch.bfloat16, "channels_last": True}
_GIB = 2**30


class _Together(Branches):
    """Branches in one launch, whatever is predicted."""

    def ours(self, layer: Layer, t: Tensors) -> Tensor:
        branches = [triton_conv.Branch(w, **how) for w, how in self._each(layer, t)]
        return triton_conv.multi_conv2d(t["x"], branches, combine=self._combine(layer), one_launch=True)


class _Circular(Kind):
    """A convolution whose input gradient is folded: borders of the padded one add up on the other side."""

    def plain(self, layer: Layer, t: Tensors) -> Tensor:
        return convolve(functional.pad(t["x"], (1, 1, 1, 1), mode="circular"), t["w"])

    def ours(self, layer: Layer, t: Tensors) -> Tensor:
        return triton_conv.conv2d(t["x"], t["w"], padding=1, padding_mode="circular")

    def depth(self, layer: Layer, name: str) -> int:
        taps, (N, _, H, W) = 4 * prod(layer.weight[2:]), layer.input  # a corner of dx is four padded positions
        return {"y": prod(layer.weight[1:]), "dx": layer.weight[0] * taps}.get(name, N * H * W)


class _Separable(Kind):
    """A depthwise convolution and the 1x1 after it, by the one kernel."""

    def shapes(self, layer: Layer) -> dict[str, tuple[int, ...]]:
        return {**super().shapes(layer), "pointwise": (layer.options["pointwise"], layer.weight[0], 1, 1)}

    def plain(self, layer: Layer, t: Tensors) -> Tensor:
        between = convolve(t["x"], t["w"], padding=1, groups=layer.input[1])
        return convolve(between, t["pointwise"])

    def ours(self, layer: Layer, t: Tensors) -> Tensor:
        return triton_conv.separable_conv2d(t["x"], t["w"], t["pointwise"], padding=1, fused=True)

    def between(self, layer: Layer, op: str) -> bool:
        return True

    def depth(self, layer: Layer, name: str) -> int:
        return layer.weight[0] * prod(layer.weight[2:])


class HugeCall(NamedTuple):
    """A call, its layer in full and one that a CPU runs; `kernels` are those that are meant: all of its plans.

    `needs` are GiB of memory: operands, results and gradients, what kernels take and float64 of one image.
    """

    name: str
    layer: Layer
    tiny: Layer
    kernels: tuple[str, ...]
    needs: float
    kind: Kind
    gradients: bool = True

    def plans(self, device: Device) -> list[AnyPlan]:
        """Of the full layer."""
        options = dict(self.layer.options)
        if isinstance(self.kind, _Together):
            options["one_launch"] = True
        found = explain.plans(self.layer.input, self.layer.weight, device=device, **options)
        titles = [title for title in found if self.gradients or title not in ("depthwise", "pointwise")]
        return [found[title] for title in titles]


def _kind(layer: Layer) -> Kind:
    found = kinds.of(layer)
    assert found is not None
    return found


def _square(C: int, **options: Any) -> tuple[Layer, Layer]:
    """(129 images of 2^24 elements: more than 2^31, three small ones) by filters of 3 x 3 that keep the channels."""
    full, tiny = (129, C, 512, 512), (3, 16, 4, 4)
    return (
        Layer(full, (C, C, 3, 3), {**_BF16, "padding": 1, **options}),
        Layer(tiny, (16, 16, 3, 3), {**_BF16, "padding": 1, **options}),
    )


def _branched(*parts: float, channels_last: bool = True, combine: str = "concatenate") -> tuple[Layer, Layer]:
    """Two filters over the same image, the second dilated; each makes a share of as many channels as there are."""
    found = []
    for layer in _square(64, channels_last=channels_last):
        C = layer.input[1]
        first, second = (int(part * C) for part in parts)
        branches = (
            ((first, C, 3, 3), {"padding": 1}),
            ((second, C, 3, 3), {"padding": 2, "dilation": 2}),
        )
        options = {"dtype": torch.bfloat16, "channels_last": channels_last, "branches": branches, "combine": combine}
        found.append(Layer(layer.input, branches[0][0], options))
    full, tiny = found
    return full, tiny


_DEFORM = _square(64, deform=True, mask=True)
_VIDEO = (
    Layer((129, 64, 4, 256, 256), (64, 64, 3, 3, 3), {**_BF16, "padding": 1, "context": 2}),
    Layer((3, 16, 2, 3, 4), (16, 16, 3, 3, 3), {**_BF16, "padding": 1, "context": 2}),
)
_FUSED = _square(64, bias=True, activation="gelu", residual="before")
_DEPTHWISE = (
    Layer((129, 64, 512, 512), (64, 1, 3, 3), {**_BF16, "padding": 1, "groups": 64, "pointwise": 64}),
    Layer((3, 16, 4, 4), (16, 1, 3, 3), {**_BF16, "padding": 1, "groups": 16, "pointwise": 16}),
)
_DEFORMED = ("deform", "deform_dgrad", "deform_offset", "deform_wgrad")

CALLS: tuple[HugeCall, ...] = (
    HugeCall("deform_conv2d", *_DEFORM, _DEFORMED, 70.0, _kind(_DEFORM[0])),
    HugeCall("branches", *_branched(0.5, 0.5), ("box_branches", "box_wgrad"), 34.0, _Together()),
    HugeCall("branches summed", *_branched(1, 1, combine="sum"), ("box_branches", "box_wgrad"), 40.0, _Together()),
    HugeCall(
        "branches contiguous",
        *_branched(21 / 64, 43 / 64, channels_last=False),  # no whole vectors: not copied for boxes
        ("gather_branches", "wgrad"),
        34.0,
        _Together(),
    ),
    HugeCall("causal_conv3d", *_VIDEO, ("box", "box_wgrad"), 60.0, _kind(_VIDEO[0])),
    HugeCall("gelu and residual", *_FUSED, ("box", "box_wgrad", "activation_backward"), 60.0, _kind(_FUSED[0])),
    HugeCall("circular", *_square(64, padding_mode="circular"), ("gather", "box", "wgrad"), 40.0, _Circular()),
    HugeCall("separable", *_DEPTHWISE, ("separable",), 16.0, _Separable(), gradients=False),
)


def units(context: Context) -> Iterator[Unit]:
    """One for each of `CALLS`, for a device that has kernels."""
    for call in CALLS:
        yield Unit(f"huge: {call.name}", partial(checked, call, context), timeout=240.0)


def checked(call: HugeCall, context: Context) -> dict[str, Any]:
    """The facts of one call; where a GPU has less memory than it needs, that."""
    where = context.device
    freed(where)
    if where.type == "cuda":
        free = torch.cuda.mem_get_info(where)[0] / _GIB
        if free < call.needs:
            return left_out(f"{call.name} needs about {call.needs:.0f} GiB, {free:.0f} are free")
    layer = call.tiny if context.simulate else call.layer
    N = layer.input[0]
    images = sorted({0, N // 2, N - 1})
    t, found, dy = _computed(call, layer, images, where)
    worst, wrong = _compared(call, layer, images, t, found, dy)
    wrong += _astray(found, images)
    elements = max(v.numel() for v in (*t.values(), *found.values()))
    del t, found, dy
    freed(where)
    words = f"{call.name}, {elements:,} elements: "
    words += "; ".join(wrong[:3]) or f"worst error {worst:.0%} of what rounding allows"
    return {"ok": not wrong, "words": words, "elements": elements, "share": worst, "needs": call.needs}


def _computed(call: HugeCall, layer: Layer, images: list[int], where: torch.device) -> tuple[Any, Any, Tensor | None]:
    """(operands, results by name, the gradient of y)."""
    generator = torch.Generator(where).manual_seed(0)
    t: dict[str, Tensor] = {}
    for name, shape in call.kind.shapes(layer).items():
        drawn = _laid(shape, layer, where).normal_(generator=generator)
        t[name] = call.kind.drawn(layer, "step", name, drawn).requires_grad_(call.gradients)
    with check.poisoned(), torch.set_grad_enabled(call.gradients):
        y = call.kind.ours(layer, t)
        found, dy = {"y": y.detach()}, None
        if call.gradients:
            dy = torch.zeros_like(y)
            for n in images:
                dy[n].normal_(generator=generator)
            gradients = torch.autograd.grad(y, list(t.values()), dy)
            found |= {f"d{name}": gradient for name, gradient in zip(t, gradients, strict=True)}
    return {name: v.detach() for name, v in t.items()}, found, dy


def _laid(shape: tuple[int, ...], layer: Layer, where: torch.device) -> Tensor:
    """Uninitialised: contiguous, or channels-last where the layer is."""
    dtype = layer.options["dtype"]
    if not layer.options["channels_last"] or len(shape) < 4:
        return torch.empty(shape, dtype=dtype, device=where)
    return torch.empty(shape[0], *shape[2:], shape[1], dtype=dtype, device=where).movedim(-1, 1)


def _compared(
    call: HugeCall, layer: Layer, images: list[int], t: Tensors, found: Mapping[str, Tensor], dy: Tensor | None
) -> tuple[float, list[str]]:
    """(the worst error as a share of what rounding allows, what is wrong in words)."""
    few = layer._replace(input=(len(images), *layer.input[1:]))
    one = layer._replace(input=(1, *layer.input[1:]))
    sums: dict[str, Tensor] = {}
    worst, wrong = 0.0, list[str]()

    def compare(name: str, of: str, got: Tensor, want: Tensor) -> None:
        nonlocal worst
        op = "fprop" if name == "y" else "step"
        how = (call.kind.depth(few, name), layer.options.get("precision"), call.kind.between(layer, op))
        share, words = values.off(f"{name}{of}", got, want, *how)
        worst = max(worst, share)
        wrong.extend([words] if words else [])

    for n in images:
        mine = {name: (v[n : n + 1] if name in _IMAGES else v).double() for name, v in t.items()}
        leaves = {name: v.requires_grad_(call.gradients) for name, v in mine.items()}
        with backends.cudnn(enabled=False), torch.set_grad_enabled(call.gradients):
            y = call.kind.plain(one, leaves)
            gradients: tuple[Tensor, ...] = ()
            if dy is not None:
                gradients = torch.autograd.grad(y, list(leaves.values()), dy[n : n + 1].double())
        compare("y", f" of image {n}", found["y"][n : n + 1], y.detach())
        for name, want in zip(leaves, gradients, strict=dy is not None):
            if name in _IMAGES:
                compare(f"d{name}", f" of image {n}", found[f"d{name}"][n : n + 1], want)
            else:
                sums[name] = sums[name] + want if name in sums else want
    for name, want in sums.items():
        compare(f"d{name}", "", found[f"d{name}"], want)
    return worst, wrong


def _astray(found: Mapping[str, Tensor], images: list[int]) -> list[str]:
    """What lies where nothing should, or is missing, in the other images."""
    wrong = []
    for name, v in found.items():
        if name != "y" and name[1:] not in _IMAGES:
            continue
        others = [n for n in range(v.shape[0]) if n not in images]
        if any(v[n].isnan().any() for n in others):
            wrong.append(f"elements of {name} are not written")
        elif name != "y" and any(v[n].any() for n in others):
            wrong.append(f"{name} is not zero where no gradient arrived")
    return wrong
