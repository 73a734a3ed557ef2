"""A layer of every kernel for `special`, and how far in it a value that is not finite may spread."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

import triton_conv
from triton_conv import Branch, deform_reference
from triton_conv.config import BandedConfig, BoxConfig
from triton_conv.geometry import ConvGeometry, Role

HALF, BRAIN, SINGLE, DOUBLE = torch.float16, torch.bfloat16, torch.float32, torch.float64

# How far a value may spread beyond the outputs that a tap connects it to.
CHANNEL = "all images and positions of a channel"
FILTER = "all taps"
ALL = "everything"


def weights(*names: str) -> dict[tuple[str, str], str]:
    """What lies outside of an image is zeros, which taps are multiplied by, also in gradients."""
    found = {(name, output): CHANNEL for name in names for output in ("y", "dx")}
    return found | {("dy", f"d{name}"): FILTER for name in names}


PADDED = weights("w")
EXACT: dict[tuple[str, str], str] = {}


class Layer(NamedTuple):
    """A function of operands by name, what PyTorch calls it, and the kernels that compute it and its gradients."""

    ours: Callable[..., Tensor]
    theirs: Callable[..., Tensor]
    shapes: dict[str, tuple[int, ...]]
    kernels: tuple[str, ...]
    beyond: dict[tuple[str, str], str] = PADDED
    dtype: torch.dtype = SINGLE
    last: bool = False
    tiles: Mapping[Role, Any] = MappingProxyType({})
    fixed: tuple[str, ...] = ()  # operands that stay finite


def convolution(x, w, **options: Any) -> tuple[Callable, Callable, dict]:
    """conv2d with a bias, ours and theirs, and the shapes of its operands."""
    pads = options.pop("padding", (0, 0))
    mode = options.pop("padding_mode", "zeros")
    precision = options.pop("precision", None)

    def ours(x, w, bias):
        return triton_conv.conv2d(x, w, bias, padding=pads, padding_mode=mode, precision=precision, **options)

    def theirs(x, w, bias):
        padded = functional.pad(x, (pads[1], pads[1], pads[0], pads[0]), "constant" if mode == "zeros" else mode)
        return functional.conv2d(padded, w, bias, **options)

    return ours, theirs, {"x": x, "w": w, "bias": w[:1]}


def transposed(x, w, **options: Any) -> tuple[Callable, Callable, dict]:
    return (
        lambda x, w, bias: triton_conv.conv_transpose2d(x, w, bias, **options),
        lambda x, w, bias: functional.conv_transpose2d(x, w, bias, **options),
        {"x": x, "w": w, "bias": w[1:2]},
    )


def causal(x, w) -> tuple[Callable, Callable, dict]:
    def theirs(x, w, bias, state):
        return functional.conv1d(torch.cat((state, x), 2), w.unsqueeze(1), bias, groups=len(w))

    shapes = {"x": x, "w": w, "bias": w[:1], "state": (*x[:2], w[1] - 1)}
    return lambda x, w, bias, state: triton_conv.causal_conv1d(x, w, bias, initial_state=state), theirs, shapes


def separable(x, first, second) -> tuple[Callable, Callable, dict]:
    def ours(x, w, pointwise):
        with torch.no_grad():
            return triton_conv.separable_conv2d(x, w, pointwise, padding=1, fused=True)

    def theirs(x, w, pointwise):
        between = functional.conv2d(x, w, padding=1, groups=x.shape[1])
        return functional.conv2d(between, pointwise)

    return ours, theirs, {"x": x, "w": first, "pointwise": second}


def branches(combine) -> tuple[Callable, Callable, dict]:
    def ours(x, w, wide):
        both = [Branch(w), Branch(wide, padding=2, dilation=2)]
        return triton_conv.multi_conv2d(x, both, combine=combine, one_launch=True)

    def theirs(x, w, wide):
        parts = [functional.conv2d(x, w), functional.conv2d(x, wide, padding=2, dilation=2)]
        return torch.cat(parts, 1) if combine == "concatenate" else parts[0] + parts[1]

    return ours, theirs, {"x": (2, 16, 5, 6), "w": (16, 16, 1, 1), "wide": (16, 16, 3, 3)}


def deformable() -> tuple[Callable, Callable, dict]:
    def ours(x, w, offset, mask):
        return triton_conv.deform_conv2d(x, offset, w, padding=1, mask=mask)

    def theirs(x, w, offset, mask):
        g = ConvGeometry.forward(tuple(x.shape), tuple(w.shape), (1, 1), ((1, 1), (1, 1)), (1, 1))
        return deform_reference.forward(x, offset, w, mask, None, g, 1)

    return ours, theirs, {"x": (2, 4, 4, 5), "w": (3, 4, 2, 2), "offset": (2, 8, 5, 6), "mask": (2, 4, 5, 6)}


def in_chunks() -> tuple[Callable, Callable, dict]:
    """Of x the first two frames are the context: what reaches a channel's gradient reaches it in both parts."""

    def ours(x, w):
        return triton_conv.causal_conv3d(x[:, :, 2:], w, context=x[:, :, :2], padding=1)

    def theirs(x, w):
        return functional.conv3d(x, w, padding=(0, 1, 1))

    return ours, theirs, {"x": (1, 16, 4, 3, 4), "w": (16, 16, 3, 3, 3)}


# A transposed convolution's input is the output's gradient of another one.
CROPPED = {("w", "y"): CHANNEL, ("w", "dx"): CHANNEL, ("x", "dw"): FILTER}
# Where a run of pixels ends, zeros of the output's gradient meet the input's next pixels; bundled groups share a tile.
RUNS = {**PADDED, ("x", "dw"): FILTER}
BUNDLED = dict.fromkeys((("x", "y"), ("w", "y"), ("dy", "dx"), ("w", "dx"), ("x", "dw"), ("dy", "dw")), ALL)
TILES = dict.fromkeys((("x", "y"), ("w", "y"), ("dy", "dx"), ("w", "dx")), CHANNEL)
TILES |= {("x", "dw"): FILTER, ("dy", "dw"): FILTER}
BANDED = BandedConfig((4, 2, 2), 2, 16, 16, num_stages=2)

LAYERS: dict[str, Layer] = {
    "gather": Layer(
        *convolution((2, 5, 6, 7), (7, 5, 3, 2), padding=(1, 0), stride=(2, 1)), ("gather", "gather", "wgrad")
    ),
    "pointwise": Layer(*convolution((2, 5, 4, 3), (4, 5, 1, 1)), ("gather", "gather", "wgrad"), EXACT, DOUBLE),
    "circular": Layer(
        *convolution((2, 5, 4, 5), (4, 5, 3, 3), padding=(1, 2), padding_mode="circular"),
        ("gather", "gather", "fold", "wgrad"),
        {("w", "dx"): CHANNEL},  # the gradient of the padded input is padded with zeros
    ),
    "transposed": Layer(
        *transposed((2, 5, 4, 5), (5, 4, 3, 3), stride=2, padding=1), ("gather", "gather", "wgrad"), CROPPED
    ),
    "box": Layer(
        *convolution((2, 16, 5, 16), (16, 16, 3, 3), padding=(1, 1)),
        ("box", "box", "box_wgrad"),
        RUNS,
        HALF,
        True,
        {Role.WGRAD: BoxConfig((1, 1, 1, 16), 16, 16)},
    ),
    "box, short runs": Layer(
        *convolution((2, 16, 3, 21), (16, 16, 1, 3), padding=(0, 1)),
        ("box", "box", "box_wgrad", "sum_slabs"),
        RUNS,
        BRAIN,
        True,
        {Role.WGRAD: BoxConfig((1, 1, 1, 16), 16, 16, splits=2)},
    ),
    "box of groups": Layer(
        *convolution((2, 64, 4, 8), (64, 32, 3, 3), padding=(1, 1), groups=2, precision="tf32"),
        ("box", "box", "wgrad"),
        PADDED,
        SINGLE,
        True,
    ),
    "depthwise": Layer(
        *convolution((2, 3, 7, 9), (3, 1, 3, 3), padding=(1, 1), groups=3),
        ("depthwise", "depthwise", "depthwise_wgrad"),
    ),
    "depthwise in vectors": Layer(
        *convolution((2, 16, 5, 6), (16, 1, 3, 3), padding=(1, 1), groups=16, stride=2),
        ("depthwise", "depthwise", "depthwise_wgrad"),
        PADDED,
        HALF,
        True,
    ),
    "banded": Layer(
        *convolution((2, 2, 7, 16), (2, 1, 13, 13), padding=(6, 6), groups=2),
        ("banded", "shift", "banded_wgrad"),
        TILES,
        HALF,
        False,
        {Role.FPROP: BANDED, Role.DGRAD: BANDED, Role.WGRAD: BandedConfig((4, 4, 1), 2, 16, 16)},
    ),
    "bundled groups": Layer(
        *convolution((1, 8, 4, 5), (8, 2, 3, 3), padding=(1, 1), groups=4), ("gather", "gather", "wgrad"), BUNDLED, HALF
    ),
    # without a slope, zeros behind the end meet the last positions
    "causal": Layer(
        *causal((2, 5, 13), (5, 4)),
        ("causal", "causal_backward", "sum_slabs"),
        weights("w") | {("x", "dw"): FILTER},
    ),
    "causal, channels-last": Layer(
        *causal((2, 16, 13), (16, 3)),
        ("causal", "causal_backward", "sum_slabs"),
        weights("w") | {("x", "dw"): FILTER},
        HALF,
        True,
    ),
    "separable": Layer(
        *separable((2, 16, 4, 5), (16, 1, 3, 3), (16, 16, 1, 1)),
        ("separable",),
        {("w", "y"): ALL},
        BRAIN,
        True,
        fixed=("dy",),
    ),
    "branches side by side": Layer(*branches("concatenate"), ("gather_branches", "wgrad"), weights("wide")),
    "branches summed": Layer(
        *branches("sum"), ("box_branches", "box_wgrad", "wgrad"), weights("wide") | {("x", "dw"): FILTER}, HALF, True
    ),
    "deformable": Layer(
        *deformable(),
        ("deform", "deform_cells", "deform_dgrad", "deform_offset", "deform_wgrad"),
        {
            **weights("w"),
            **{
                ("mask", "y"): ALL,
                ("mask", "dx"): ALL,
                ("mask", "dw"): ALL,
                ("w", "doffset"): ALL,
                ("w", "dmask"): ALL,
            },
            **{("dy", "doffset"): ALL, ("dy", "dmask"): ALL, ("mask", "doffset"): ALL},
        },
        fixed=("offset",),
    ),
    "chunks": Layer(*in_chunks(), ("gather", "box", "wgrad"), PADDED, HALF, True),
}
