"""What the evidence run trains: networks, and images made on the device from a seed, or scikit-learn's digits."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache, partial
from importlib.util import find_spec
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812 (its name everywhere)

from triton_conv import demo

from .networks import DeepLab, ResNet

TEST = 1_000_000  # seeds from here on make batches that no network is trained on
_TEXTURES, _KINDS = 8, 3


class Batch(NamedTuple):
    """Images (N, C, H, W), and their classes as shares: (N, classes), or (N, classes, H, W) for every pixel.

    Shares rather than numbers, because PyTorch's loss of numbered pixels does not repeat its bits on a GPU.
    """

    images: Tensor
    shares: Tensor


class Task(NamedTuple):
    """A network, what it learns, and how fast; `batch` makes the one of a seed.

    `dtype` is what convolutions compute in: float32, or what autocast makes of it.
    """

    name: str
    network: Callable[[], torch.nn.Module]
    batch: Callable[[int], Batch]
    loss: Callable[[Any, Batch], Tensor]
    rate: float
    steps: int
    tests: int  # batches
    dtype: torch.dtype


def tasks(device: torch.device, tiny: bool) -> list[Task]:
    """All of them, or those that an interpreter trains in seconds: for a step, in float32.

    16-bit gradients of so small a batch are mostly rounding.
    """
    if tiny:
        textured, drawn, images, how = (2, 16), (2, 8), 1, (1, 1, torch.float32)
        resnet, deeplab = partial(ResNet, _TEXTURES, (4, 8), 1), partial(DeepLab, 1 + _KINDS, (4, 8), 1, 8, (2,))
    else:
        textured, drawn, images, how = (128, 128), (16, 256), 128, (200, 4, torch.bfloat16)
        resnet, deeplab = partial(ResNet, _TEXTURES), partial(DeepLab, 1 + _KINDS)
    found = [
        Task("resnet18", resnet, partial(textures, *textured, device), _cross_entropy, 1e-3, *how),
        Task("deeplab", deeplab, partial(shapes, *drawn, device), _cross_entropy, 1e-3, *how),
    ]
    if find_spec("sklearn") is not None:
        batch = partial(digits, images, device)
        found.append(Task("digits", _digit_net, batch, _with_reconstruction, demo.LEARNING_RATE, *how))
    return found


def textures(N: int, size: int, device: torch.device, seed: int) -> Batch:
    """Coloured gratings under noise; the class is their direction."""
    generator = torch.Generator(device).manual_seed(seed)
    random = partial(torch.rand, generator=generator, device=device)
    labels = torch.randint(_TEXTURES, (N,), generator=generator, device=device)
    angle = (math.pi / _TEXTURES) * labels.view(N, 1, 1)
    frequency, phase = 0.6 + 0.6 * random(N, 1, 1), 2 * math.pi * random(N, 1, 1)
    y, x = _grid(size, device)
    wave = torch.sin(frequency * (x * angle.cos() + y * angle.sin()) + phase)
    noise = torch.randn(N, 3, size, size, generator=generator, device=device)
    images = wave.unsqueeze(1) * (2 * random(N, 3, 1, 1) - 1) + 0.5 * noise
    return Batch(_channels_last(images), F.one_hot(labels, _TEXTURES).float())


def shapes(N: int, size: int, device: torch.device, seed: int) -> Batch:
    """Discs, squares and diamonds, each mostly of a colour, drawn over each other; a pixel's class is its shape's."""
    generator = torch.Generator(device).manual_seed(seed)
    random = partial(torch.rand, generator=generator, device=device)
    y, x = _grid(size, device)
    images = 0.3 * torch.randn(N, 3, size, size, generator=generator, device=device)
    labels = torch.zeros(N, size, size, dtype=torch.long, device=device)
    for _ in range(4):
        kind = torch.randint(_KINDS, (N, 1, 1), generator=generator, device=device)
        down, across = ((t - size * random(N, 1, 1)).abs() for t in (y, x))
        distances = torch.stack([(down**2 + across**2).sqrt(), torch.maximum(down, across), (down + across) / 1.25])
        distance = distances.gather(0, kind.expand(1, N, size, size).contiguous()).squeeze(0)
        inside = distance < size * (0.08 + 0.14 * random(N, 1, 1))
        labels = torch.where(inside, 1 + kind, labels)
        hue = F.one_hot(kind.view(N), 3).view(N, 3, 1, 1)  # without it, shapes alone take more steps to tell apart
        colour = hue + random(N, 3, 1, 1) - 0.5
        images = torch.where(inside.unsqueeze(1), colour + 0.3 * images, images)
    shares = F.one_hot(labels, 1 + _KINDS).permute(0, 3, 1, 2).float()
    return Batch(_channels_last(images), shares)


def digits(N: int, device: torch.device, seed: int) -> Batch:
    """Handwritten digits; seeds from `TEST` on draw those that are never trained on."""
    known = _digits(device)
    test = seed >= TEST
    images, labels = known[2:] if test else known[:2]
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.randint(len(labels), (N,), generator=generator).to(device)
    return Batch(images[chosen], F.one_hot(labels[chosen], 10).float())


@cache
def _digits(device: torch.device) -> demo.Digits:
    return demo.load_digits(device, seed=0)


def _digit_net() -> torch.nn.Module:
    return demo.DigitNet(torch.nn)


def _grid(size: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Rows (1, size, 1) and columns (1, 1, size)."""
    along = torch.arange(size, dtype=torch.float32, device=device)
    return along.view(1, size, 1), along.view(1, 1, size)


def _channels_last(images: Tensor) -> Tensor:
    return images.contiguous(memory_format=torch.channels_last)


def _cross_entropy(output: Any, batch: Batch) -> Tensor:
    return F.cross_entropy(logits_of(output).float(), batch.shares)


def _with_reconstruction(output: Any, batch: Batch) -> Tensor:
    squares = F.mse_loss(output[1].float(), batch.images)
    return _cross_entropy(output, batch) + demo.RECONSTRUCTION_WEIGHT * squares


def logits_of(output: Any) -> Tensor:
    """Of a network that may give more than logits."""
    return output[0] if isinstance(output, tuple) else output
