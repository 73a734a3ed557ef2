"""Networks of `torch.nn` that the evidence run trains, small or large by their widths."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 (its name everywhere)


def _normed(convolution: nn.Module, channels: int) -> nn.Sequential:
    return nn.Sequential(convolution, nn.BatchNorm2d(channels))


class Residual(nn.Module):
    """The basic block of ResNet-18: two 3x3 convolutions and a short cut."""

    def __init__(self, C: int, K: int, stride: int, dilation: int):
        super().__init__()
        self.first = _normed(nn.Conv2d(C, K, 3, stride, dilation, dilation, bias=False), K)
        self.second = _normed(nn.Conv2d(K, K, 3, 1, dilation, dilation, bias=False), K)
        alike = stride == 1 and C == K
        self.short = nn.Identity() if alike else _normed(nn.Conv2d(C, K, 1, stride, bias=False), K)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.second(F.relu(self.first(x))) + self.short(x))


class Backbone(nn.Module):
    """A 7x7 stem and a stage of `blocks` for each of `widths`, the first without a stride, the others with these.

    It pools by averages: the gradient of PyTorch's maximum does not repeat its bits on a GPU.
    """

    def __init__(self, widths: Sequence[int], blocks: int, strides: Sequence[int], dilations: Sequence[int]):
        super().__init__()
        self.stem = _normed(nn.Conv2d(3, widths[0], 7, 2, 3, bias=False), widths[0])
        stages, C = [], widths[0]
        for K, stride, dilation in zip(widths, strides, dilations, strict=True):
            for block in range(blocks):
                stages.append(Residual(C, K, stride if block == 0 else 1, dilation))
                C = K
        self.stages = nn.Sequential(*stages)

    def forward(self, x: Tensor) -> Tensor:
        return self.stages(F.avg_pool2d(F.relu(self.stem(x)), 2))


class ResNet(nn.Module):
    """ResNet-18 by default, but for its pooling: (N, 3, H, W) to logits (N, classes).

    >>> ResNet(8, (4, 8), 1)(torch.randn(2, 3, 16, 16)).shape
    torch.Size([2, 8])
    """

    def __init__(self, classes: int, widths: Sequence[int] = (64, 128, 256, 512), blocks: int = 2):
        super().__init__()
        strides = (1, *(2 for _ in widths[1:]))
        self.backbone = Backbone(widths, blocks, strides, [1] * len(widths))
        self.classifier = nn.Linear(widths[-1], classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.backbone(x).mean((2, 3)))


class DeepLab(nn.Module):
    """A small DeepLabV3: a dilated ResNet at an eighth of the size, atrous pyramid pooling, transposed convolutions.

    (N, 3, H, W) to logits (N, classes, H, W), H and W multiples of 8. Pyramids end in transposed convolutions: the
    gradient of PyTorch's bilinear interpolation does not repeat its bits on a GPU.

    >>> DeepLab(4, (4, 8), 1, 8, (1, 2))(torch.randn(2, 3, 16, 16)).shape
    torch.Size([2, 4, 16, 16])
    """

    def __init__(
        self,
        classes: int,
        widths: Sequence[int] = (64, 128, 256),
        blocks: int = 2,
        channels: int = 256,
        dilations: Sequence[int] = (6, 12, 18),
    ):
        super().__init__()
        C = widths[-1]
        self.backbone = Backbone(widths, blocks, (1, 2, 1)[: len(widths)], (1, 1, 2)[: len(widths)])
        self.pyramid = nn.ModuleList(
            [_normed(nn.Conv2d(C, channels, 1, bias=False), channels)]
            + [_normed(nn.Conv2d(C, channels, 3, 1, d, d, bias=False), channels) for d in dilations]
        )
        self.pooled = _normed(nn.Conv2d(C, channels, 1, bias=False), channels)
        self.project = _normed(nn.Conv2d((2 + len(dilations)) * channels, channels, 1, bias=False), channels)
        self.up = nn.ModuleList(
            _normed(nn.ConvTranspose2d(a, b, 4, 2, 1, bias=False), b)
            for a, b in ((channels, channels // 4), (channels // 4, channels // 4))
        )
        self.logits = nn.ConvTranspose2d(channels // 4, classes, 4, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.backbone(x)
        seen = [F.relu(branch(x)) for branch in self.pyramid]
        mean = F.relu(self.pooled(x.mean((2, 3), keepdim=True)))
        x = F.relu(self.project(torch.cat([*seen, mean.expand(-1, -1, *x.shape[2:])], 1)))
        for step in self.up:
            x = F.relu(step(x))
        return self.logits(x)


class Mixed(nn.Module):
    """One convolution of each kind on `C` channels: circular, depthwise, grouped and strided, dilated, transposed.

    (N, 3, H, W) to (N, 3, H, W), H and W even.

    >>> Mixed(8)(torch.randn(2, 3, 8, 8)).shape
    torch.Size([2, 3, 8, 8])
    """

    def __init__(self, C: int):
        super().__init__()
        self.stem = _normed(nn.Conv2d(3, C, 3, padding=1, padding_mode="circular", bias=False), C)
        self.depthwise = nn.Conv2d(C, C, 3, padding=1, groups=C)
        self.grouped = nn.Conv2d(C, C, 3, stride=2, padding=1, groups=2)
        self.dilated = _normed(nn.Conv2d(C, C, 3, padding=2, dilation=2, bias=False), C)
        self.up = nn.ConvTranspose2d(C, C, 4, stride=2, padding=1)
        self.last = nn.Conv2d(C, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem(x))
        x = F.relu(self.depthwise(x))
        x = F.relu(self.grouped(x))
        x = F.relu(self.dilated(x))
        return self.last(F.relu(self.up(x)))
