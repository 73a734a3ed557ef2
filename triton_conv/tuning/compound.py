"""Layers of published networks that are more than one convolution to others: what no single call of cuDNN computes.

An epilogue, several filters over one input, positions that are learned, or frames kept from the chunk before. Batches
are one image, as in `networks`. What a layer is beside its convolution is said by its options:

    activation, residual, scale, bias     a convolution with an epilogue
    branches, combine                     filters over the same input; `weight` is that of the first
    deform, offset_groups, mask           a deformable convolution
    context                               a convolution causal in time, behind so many frames of the chunk before
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch

from .layers import Layer
from .networks import Layers

EPILOGUE = ("bias", "activation", "negative_slope", "residual", "scale")

Branch = tuple[tuple[int, ...], dict[str, Any]]  # shape of a filter, and its padding, dilation and so on


def bare(layer: Layer) -> Layer:
    """A convolution without what follows it, by whose config it runs too."""
    return layer._replace(options={name: value for name, value in layer.options.items() if name not in EPILOGUE})


def fused_bottlenecks(stages: Sequence[tuple[int, int, int, int]]) -> Layers:
    """ResNet-50 for inference at 224 (He et al. 2015), its norms folded into filters and biases.

    Stages are (blocks, width of the 3x3 convolution, output channels, stride). Every convolution has a bias and, but
    for shortcuts, a relu; the last of a block adds the shortcut before it.
    """
    layers, size, channels = Layers(), 56, 64
    relu: dict[str, Any] = {"bias": True, "activation": "relu"}
    layers.add("stem", (3, 224, 224), (64, 3, 7, 7), stride=2, padding=3, **relu)
    for number, (blocks, width, out, stride) in enumerate(stages, start=1):
        for block in range(blocks):
            step: dict[str, Any] = {"stride": stride} if block == 0 and stride > 1 else {}
            small = size // step.get("stride", 1)
            layers.add(f"stage {number} reduce", (channels, size, size), (width, channels, 1, 1), **relu)
            name = f"stage {number} 3x3" + " stride 2" * bool(step)
            layers.add(name, (width, size, size), (width, width, 3, 3), padding=1, **step, **relu)
            if block == 0:
                layers.add(f"stage {number} shortcut", (channels, size, size), (out, channels, 1, 1), bias=True, **step)
            expand = (out, width, 1, 1)
            layers.add(f"stage {number} expand and add", (width, small, small), expand, residual="before", **relu)
            size, channels = small, out
    return layers


def _branches(layers: Layers, name: str, input: Sequence[int], branches: Sequence[Branch]) -> None:
    layers.add(name, input, branches[0][0], branches=tuple(branches), combine="concatenate")


def pyramids() -> Layers:
    """DeepLabV3's atrous pyramids at output stride 16 and 8 of 513x513 images (Chen et al. 2017).

    A 1x1 convolution and three dilated ones, over the 2048 channels of a ResNet or the 320 of MobileNetV2.
    """
    layers = Layers()
    for channels in (2048, 320):
        for size in (33, 65):
            for rates in ((6, 12, 18), (12, 24, 36)):
                dilated = [((256, channels, 3, 3), {"padding": rate, "dilation": rate}) for rate in rates]
                name = f"rates {'/'.join(map(str, rates))}"
                _branches(layers, name, (channels, size, size), [((256, channels, 1, 1), {}), *dilated])
    return layers


def inception() -> Layers:
    """What shares an input in the blocks of Inception-v3 at 299x299 (Szegedy et al. 2015), as torchvision has them.

    From memory. Behind the 1x1 convolutions, which are one of more filters, every branch goes its own way, but for the
    1x3 and 3x1 ones of the last two blocks. Pooled branches are left out.
    """
    layers = Layers()

    def ones(block: str, channels: int, size: int, *filters: int) -> None:
        name = f"{block} {'/'.join(map(str, filters))}"
        _branches(layers, name, (channels, size, size), [((count, channels, 1, 1), {}) for count in filters])

    for channels in (192, 256, 288):
        ones("A", channels, 35, 64, 48, 64)
    for narrow in (128, 160, 160, 192):
        ones("C", 768, 17, 192, narrow, narrow)
    ones("D", 768, 17, 192, 192)
    for channels in (1280, 2048):
        ones("E", channels, 8, 320, 384, 448)
        for _ in range(2):
            lines = [((384, 384, 1, 3), {"padding": (0, 1)}), ((384, 384, 3, 1), {"padding": (1, 0)})]
            _branches(layers, "E 1x3 and 3x1", (384, 8, 8), lines)
    return layers


def selective_kernels() -> Layers:
    """The units of SKNet-50 at 224x224 (Li et al. 2019, table 1): 3x3 filters beside dilated ones, in 32 groups."""
    layers, size = Layers(), 56
    for blocks, width, stride in ((3, 128, 1), (4, 256, 2), (6, 512, 2), (3, 1024, 2)):
        for block in range(blocks):
            step: dict[str, Any] = {"stride": stride} if block == 0 and stride > 1 else {}
            weight = (width, width // 32, 3, 3)
            both = [(weight, {"padding": rate, "dilation": rate, "groups": 32, **step}) for rate in (1, 2)]
            _branches(layers, "unit stride 2" if step else "unit", (width, size, size), both)
            size //= step.get("stride", 1)
    return layers


def deformable() -> Layers:
    """The 3x3 convolutions of stages 3 to 5 of a ResNet-50 with DCNv2 (Zhu et al. 2019) at 800x1344.

    That is 800x1333, padded to whole strides as detectors do. The offsets of a first block are of its stride.
    """
    layers, height, width = Layers(), 200, 336
    options: dict[str, Any] = {"deform": True, "offset_groups": 1, "mask": True, "dtype": torch.float16, "padding": 1}
    for stage, (blocks, channels) in enumerate(((4, 128), (6, 256), (3, 512)), start=3):
        weight = (channels, channels, 3, 3)
        layers.add(f"stage {stage} stride 2", (channels, height, width), weight, stride=2, **options)
        height, width = height // 2, width // 2
        for _ in range(blocks - 1):
            layers.add(f"stage {stage}", (channels, height, width), weight, **options)
    return layers


# ---------------------------------------------------------------------------------------------------------------------
# Video in chunks: causal in time, two frames of the chunk before


def _chunk(layers: Layers, name: str, channels: int, filters: int, image: Sequence[int], **options: Any) -> None:
    weight = (filters, channels, 3, 3, 3)
    layers.add(name, (channels, *image), weight, padding=1, context=2, **options)


def wan_chunks() -> Layers:
    """Wan 2.1's video decoder at 480x832 (2025), a latent frame at a time: chunks of one to four frames of pixels."""
    layers = Layers()
    _chunk(layers, "input", 16, 384, (1, 60, 104))
    # (channels in, channels out, frames, height, residual blocks, whether frames double after them)
    stages = [(384, 384, 1, 60, 5, True), (192, 384, 2, 120, 3, True), (192, 192, 4, 240, 3, False)]
    for channels, width, frames, height, blocks, doubles in [*stages, (96, 96, 4, 480, 3, False)]:
        image = (frames, height, height * 104 // 60)
        for block in range(blocks):
            _chunk(layers, "3x3x3", channels if block == 0 else width, width, image)
            _chunk(layers, "3x3x3", width, width, image)
        if doubles:
            layers.add("3x1x1", (width, *image), (2 * width, width, 3, 1, 1), context=2)
    _chunk(layers, "output", 96, 3, (4, 480, 832))
    return layers


def ltx_chunks() -> Layers:
    """LTX-2's video decoder at 512x768 (2026), a latent frame at a time, with images reflected at their borders.

    Widths and modes are those of diffusers' `AutoencoderKLLTX2Video`: five residual blocks a stage, behind each but the
    last a convolution to eight times as many positions of half as many channels.
    """
    layers = Layers()
    border: dict[str, Any] = {"padding_mode": "reflect"}
    _chunk(layers, "latent", 128, 1024, (1, 16, 24), **border)
    widths = (1024, 512, 256, 128)
    images = [(2**stage, 16 * 2**stage, 24 * 2**stage) for stage in range(len(widths))]
    for width, image in zip(widths, images, strict=True):
        for _ in range(2 * 5):
            _chunk(layers, "3x3x3", width, width, image, **border)
    for (width, narrow), image in zip(pairwise(widths), images, strict=False):
        _chunk(layers, "up", width, 8 * narrow, image, **border)
    _chunk(layers, "output", 128, 48, images[-1], **border)
    return layers


def qwen_image() -> Layers:
    """Qwen-Image's decoder at 1024x1024 (2025): Wan's, of images, that is of chunks of one frame."""
    layers = Layers()
    _chunk(layers, "input", 16, 384, (1, 128, 128))
    # (channels in, channels out, side, residual blocks)
    for channels, width, side, blocks in (
        (384, 384, 128, 5),
        (192, 384, 256, 3),
        (192, 192, 512, 3),
        (96, 96, 1024, 3),
    ):
        for block in range(blocks):
            _chunk(layers, "3x3x3", channels if block == 0 else width, width, (1, side, side))
            _chunk(layers, "3x3x3", width, width, (1, side, side))
    _chunk(layers, "output", 96, 3, (1, 1024, 1024))
    return layers
