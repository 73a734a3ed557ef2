"""The convolutions of published networks, counted: from depths and widths to the shapes of layers.

Batches are one image; `suites` says at which batch they are tuned. Names are those of the parts they stand in. The 1x1
convolutions of squeeze-and-excitation see one position of each image: they are left out, as no time is spent there.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch

from .layers import Layer

TRAINED = {"dtype": torch.bfloat16, "channels_last": True}  # what people train with, unless they say otherwise


class Layers(dict[str, Layer]):
    """Layers by name; one that has been there is counted, not repeated."""

    def add(self, name: str, input: Sequence[int], weight: Sequence[int], images: int = 1, **options: Any) -> None:
        """Appends a layer; `images` are those that the network makes of one, frames or patches."""
        layer = Layer((images, *input), tuple(weight), {**TRAINED, **options})
        for known, other in self.items():
            if other._replace(times=1) == layer:
                self[known] = other._replace(times=other.times + 1)
                return
        rank = len(weight) - 2
        channels, filters = weight[:2] if options.get("transposed") else (input[0], weight[0])
        name = f"{name} {channels}>{filters} {'x'.join(map(str, input[-rank:]))}"
        assert name not in self, name
        self[name] = layer

    def square(
        self, name: str, channels: int, filters: int, size: int, taps: int, stride: int = 1, groups: int = 1
    ) -> int:
        """A "same" convolution of a square image; returns the side of its output."""
        options: dict[str, Any] = {"padding": taps // 2}
        if stride > 1:
            options["stride"] = stride
        if groups > 1:
            options["groups"] = groups
        self.add(name, (channels, size, size), (filters, channels // groups, taps, taps), **options)
        return (size - 1) // stride + 1


def bottlenecks(stem: int, stages: Sequence[tuple[int, int, int, int, int]], simple: bool = False) -> Layers:
    """A ResNet of bottleneck blocks, its stride in the 3x3 convolution, as torchvision and its descendants have it.

    Stages are (blocks, width of the 3x3 convolution, its groups, output channels, stride). The stem is a 7x7
    convolution and a pool, a simple one a 3x3 convolution.
    """
    layers, size = Layers(), 224
    taps = 3 if simple else 7
    size = layers.square("stem", 3, stem, size, taps, 2) // (1 if simple else 2)
    channels = stem
    for number, (blocks, width, groups, out, stride) in enumerate(stages, start=1):
        for block in range(blocks):
            step = stride if block == 0 else 1
            layers.square(f"stage {number} reduce", channels, width, size, 1)
            small = layers.square(f"stage {number} 3x3" + " stride 2" * (step > 1), width, width, size, 3, step, groups)
            layers.square(f"stage {number} expand", width, out, small, 1)
            if block == 0:
                layers.square(f"stage {number} shortcut", channels, out, size, 1, step)
            size, channels = small, out
    return layers


def inverted(stem: int, blocks: Sequence[tuple[str, int, int, int, int]], head: int, size: int) -> Layers:
    """A MobileNet or EfficientNet: blocks are (kind, taps, expanded channels, output channels, stride).

    Kind "fused" is a dense convolution to the expanded channels, "apart" a 1x1, then a depthwise one; both are followed
    by a 1x1 to the output, unless the block does not expand.
    """
    layers = Layers()
    size, channels = layers.square("stem", 3, stem, size, 3, 2), stem
    for kind, taps, wide, out, stride in blocks:
        if kind == "fused":
            size = layers.square(
                f"fused {taps}x{taps}" + " stride 2" * (stride > 1), channels, wide, size, taps, stride
            )
        else:
            if wide != channels:
                layers.square("expand", channels, wide, size, 1)
            name = f"depthwise {taps}x{taps}" + " stride 2" * (stride > 1)
            size = layers.square(name, wide, wide, size, taps, stride, groups=wide)
        if kind == "apart" or wide != out:
            layers.square("project", wide, out, size, 1)
        channels = out
    layers.square("head", channels, head, size, 1)
    return layers


def mobilenet_v3() -> Layers:
    """MobileNetV3-Large at 224 (Howard et al. 2019, table 1)."""
    rows = [(3, 16, 16, 1), (3, 64, 24, 2), (3, 72, 24, 1), (5, 72, 40, 2), (5, 120, 40, 1), (5, 120, 40, 1)]
    rows += [(3, 240, 80, 2), (3, 200, 80, 1), (3, 184, 80, 1), (3, 184, 80, 1), (3, 480, 112, 1), (3, 672, 112, 1)]
    rows += [(5, 672, 160, 2), (5, 960, 160, 1), (5, 960, 160, 1)]
    return inverted(16, [("apart", *row) for row in rows], 960, 224)


def efficientnet_v2() -> Layers:
    """EfficientNetV2-S at 384 (Tan and Le 2021, table 4)."""
    # kind, expansion, blocks, output channels, stride of the first
    stages = [("fused", 1, 2, 24, 1), ("fused", 4, 4, 48, 2), ("fused", 4, 4, 64, 2)]
    stages += [("apart", 4, 6, 128, 2), ("apart", 6, 9, 160, 1), ("apart", 6, 15, 256, 2)]
    blocks, channels = [], 24
    for kind, expansion, count, out, stride in stages:
        for block in range(count):
            blocks.append((kind, 3, channels * expansion, out, stride if block == 0 else 1))
            channels = out
    return inverted(24, blocks, 1280, 384)


def convnext() -> Layers:
    """ConvNeXt-T at 224 (Liu et al. 2022); its pointwise layers are matrix products of channels-last tokens."""
    layers = Layers()
    layers.add("stem", (3, 224, 224), (96, 3, 4, 4), stride=4)
    widths, size = (96, 192, 384, 768), 56
    for stage, (blocks, width) in enumerate(zip((3, 3, 9, 3), widths, strict=True)):
        for _ in range(blocks):
            layers.square("depthwise 7x7", width, width, size, 7, groups=width)
        if stage < 3:
            layers.add("downsample", (width, size, size), (widths[stage + 1], width, 2, 2), stride=2)
            size //= 2
    return layers


def replknet() -> Layers:
    """The depthwise layers of RepLKNet-31B at 224 (Ding et al. 2022), with the 5x5 ones beside them in training."""
    layers = Layers()
    # blocks, width, taps, size
    stages = [(2, 128, 31, 56), (2, 256, 29, 28), (18, 512, 27, 14), (2, 1024, 13, 7)]
    for blocks, width, taps, size in stages:
        for _ in range(blocks):
            layers.square(f"depthwise {taps}x{taps}", width, width, size, taps, groups=width)
            layers.square("depthwise 5x5", width, width, size, 5, groups=width)
    return layers


def diffusion_unet() -> Layers:
    """The U-Net of Stable Diffusion 1.5 at 512x512 (Rombach et al. 2022): latents of 4x64x64."""
    layers = Layers()
    widths, size = (320, 640, 1280, 1280), 64

    def residual(channels: int, out: int) -> None:
        layers.square("3x3", channels, out, size, 3)
        layers.square("3x3", out, out, size, 3)
        if channels != out:
            layers.square("shortcut", channels, out, size, 1)

    def attention(channels: int) -> None:  # projections in and out
        for _ in range(2):
            layers.square("1x1", channels, channels, size, 1)

    layers.square("input", 4, widths[0], size, 3)
    skips, channels = [widths[0]], widths[0]
    for level, width in enumerate(widths):
        for _ in range(2):
            residual(channels, width)
            if level < 3:
                attention(width)
            channels = width
            skips.append(channels)
        if level < 3:
            size = layers.square("downsample", channels, channels, size, 3, 2)
            skips.append(channels)
    residual(channels, channels)
    attention(channels)
    residual(channels, channels)
    for level, width in reversed(list(enumerate(widths))):
        for _ in range(3):
            residual(channels + skips.pop(), width)
            if level < 3:
                attention(width)
            channels = width
        if level > 0:
            size *= 2
            layers.square("3x3", channels, channels, size, 3)  # after nearest up-sampling
    layers.square("output", channels, 4, size, 3)
    return layers


def diffusion_decoder() -> Layers:
    """The decoder of Stable Diffusion's autoencoder, from 4x64x64 to 3x512x512 (Rombach et al. 2022)."""
    layers = Layers()
    size, channels = 64, 512
    layers.square("latent", 4, 4, size, 1)
    layers.square("input", 4, channels, size, 3)
    widths = [512, 512, 512, 256, 128]  # the first are the middle's
    for level, width in enumerate(widths):
        for _ in range(2 if level == 0 else 3):
            layers.square("3x3", channels, width, size, 3)
            layers.square("3x3", width, width, size, 3)
            if channels != width:
                layers.square("shortcut", channels, width, size, 1)
            channels = width
        if 0 < level < 4:
            size *= 2
            layers.square("3x3", channels, channels, size, 3)  # after nearest up-sampling
    layers.square("output", channels, 3, size, 3)
    return layers


def x3d() -> Layers:
    """The depthwise layers of X3D-M, 16 frames of 224x224 (Feichtenhofer 2020, table 3)."""
    layers = Layers()
    layers.add("5x1x1", (24, 16, 112, 112), (24, 1, 5, 1, 1), groups=24, padding=(2, 0, 0))
    size = 112
    for blocks, width in zip((3, 5, 11, 7), (54, 108, 216, 432), strict=True):
        for block in range(blocks):
            options: dict[str, Any] = {"stride": (1, 2, 2)} if block == 0 else {}
            layers.add("3x3x3", (width, 16, size, size), (width, 1, 3, 3, 3), groups=width, padding=1, **options)
            size = size // 2 if block == 0 else size
    return layers


def wan_decoder() -> Layers:
    """The decoder of Wan 2.1's video autoencoder (2025) at 480x832: a chunk of one latent frame, four of pixels.

    A chunk is convolved behind two frames of the one before, here zeros: as many products, and the same shapes.
    """
    layers = Layers()

    def causal(name: str, channels: int, filters: int, frames: int, height: int) -> None:
        weight = (filters, channels, 3, 3, 3)
        layers.add(name, (channels, frames, height, height * 104 // 60), weight, padding=((2, 0), 1, 1))

    layers.add("latent", (16, 1, 60, 104), (16, 16, 1, 1, 1))
    causal("input", 16, 384, 1, 60)
    for filters in (3 * 384, 384):
        layers.add("attention", (384, 60, 104), (filters, 384, 1, 1))
    # (channels in, channels out, frames, height, residual blocks, whether frames double after them)
    stages = [(384, 384, 1, 60, 5, True), (192, 384, 2, 120, 3, True), (192, 192, 4, 240, 3, False)]
    for channels, width, frames, height, blocks, doubles in [*stages, (96, 96, 4, 480, 3, False)]:
        image = (frames, height, height * 104 // 60)
        for block in range(blocks):
            into = channels if block == 0 else width
            causal("3x3x3", into, width, frames, height)
            causal("3x3x3", width, width, frames, height)
            if into != width:
                layers.add("shortcut", (into, *image), (width, into, 1, 1, 1))
        if doubles:
            layers.add("3x1x1", (width, *image), (2 * width, width, 3, 1, 1), padding=((2, 0), 0, 0))
        larger = (width, 2 * image[1], 2 * image[2])  # of frames one by one
        if width > 96:
            layers.add("3x3", larger, (width // 2, width, 3, 3), images=2 * frames if doubles else frames, padding=1)
    causal("output", 96, 3, 4, 480)
    return layers


def ltx_video() -> Layers:
    """LTX-Video's autoencoder (HaCohen et al. 2024) on 121 frames of 512x768: causal encoder, wider decoder.

    Channels are those of version 0.9.1 as diffusers configures it; borders in time repeat the first frame, and in the
    decoder the last one.
    """
    layers = Layers()
    extents = [(121, 128, 192), (61, 64, 96), (31, 32, 48), (16, 16, 24)]
    border: dict[str, Any] = {"padding_mode": ("replicate", "zeros", "zeros")}
    first: dict[str, Any] = {**border, "padding": ((2, 0), 1, 1)}
    both: dict[str, Any] = {**border, "padding": 1}
    for width, extent in zip((128, 256, 512, 512), extents, strict=True):
        layers.add("encoder", (width, *extent), (width, width, 3, 3, 3), **first)
    for (width, extent), (narrow, _) in pairwise(zip((1024, 512, 256, 128), reversed(extents), strict=True)):
        layers.add("decoder", (width, *extent), (width, width, 3, 3, 3), **both)
        layers.add("decoder up", (width, *extent), (8 * narrow, width, 3, 3, 3), **both)
    layers.add("decoder", (128, *extents[0]), (128, 128, 3, 3, 3), **both)
    return layers
