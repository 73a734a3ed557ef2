"""Small networks of the kinds that people train: the layers and wiring of the originals, a few channels wide."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional


def normed(C: int, K: int, taps: int, activation: type[nn.Module] = nn.ReLU, **options) -> nn.Sequential:
    """Convolution without bias, batch norm, activation: what most of these are made of."""
    options.setdefault("padding", options.get("dilation", 1) * (taps // 2))
    return nn.Sequential(nn.Conv2d(C, K, taps, bias=False, **options), nn.BatchNorm2d(K), activation())


class Bottleneck(nn.Module):
    """ResNet-50's block: 1x1, 3x3, 1x1, beside a shortcut that a 1x1 convolution fits to it."""

    def __init__(self, C: int, width: int, stride: int = 1, dilation: int = 1) -> None:
        super().__init__()
        K = 4 * width
        self.body = nn.Sequential(
            normed(C, width, 1),
            normed(width, width, 3, stride=stride, dilation=dilation),
            nn.Conv2d(width, K, 1, bias=False),
            nn.BatchNorm2d(K),
        )
        fits = C == K and stride == 1
        self.shortcut = nn.Identity() if fits else normed(C, K, 1, nn.Identity, stride=stride)

    def forward(self, x: Tensor) -> Tensor:
        return functional.relu(self.body(x) + self.shortcut(x))


def resnet50(classes: int = 5, width: int = 4) -> nn.Module:
    stages = [Bottleneck(width, width), Bottleneck(4 * width, width)]
    stages += [Bottleneck(4 * width, 2 * width, 2), Bottleneck(8 * width, 2 * width)]
    return nn.Sequential(
        normed(3, width, 7, stride=2),
        nn.MaxPool2d(3, 2, 1),
        *stages,
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(8 * width, classes),
    )


class SqueezeExcite(nn.Module):
    """Channels scaled by what a network of 1x1 convolutions makes of their means."""

    def __init__(self, C: int) -> None:
        super().__init__()
        self.scale = nn.Sequential(
            nn.AdaptiveAvgPool2d(1), nn.Conv2d(C, C // 4, 1), nn.ReLU(), nn.Conv2d(C // 4, C, 1), nn.Hardsigmoid()
        )

    def forward(self, x: Tensor) -> Tensor:
        return x * self.scale(x)


class InvertedResidual(nn.Module):
    """MobileNetV3's block: widened by 1x1, depthwise, squeeze-and-excite, narrowed by 1x1."""

    def __init__(self, C: int, wide: int, K: int, taps: int, stride: int, act: type[nn.Module]) -> None:
        super().__init__()
        self.residual = C == K and stride == 1
        self.body = nn.Sequential(
            normed(C, wide, 1, act),
            normed(wide, wide, taps, act, stride=stride, groups=wide),
            SqueezeExcite(wide),
            normed(wide, K, 1, nn.Identity),
        )

    def forward(self, x: Tensor) -> Tensor:
        return x + self.body(x) if self.residual else self.body(x)


def mobilenet_v3(classes: int = 5) -> nn.Module:
    return nn.Sequential(
        normed(3, 8, 3, nn.Hardswish, stride=2),
        InvertedResidual(8, 16, 8, 3, 1, nn.ReLU),
        InvertedResidual(8, 24, 12, 5, 2, nn.Hardswish),
        normed(12, 24, 1, nn.Hardswish),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(24, classes),
    )


class ConvNeXtBlock(nn.Module):
    """Depthwise 7x7, layer norm over channels, two linear layers as 1x1 convolutions would be, a scaled residual."""

    def __init__(self, C: int) -> None:
        super().__init__()
        self.depthwise = nn.Conv2d(C, C, 7, padding=3, groups=C)
        self.mlp = nn.Sequential(nn.LayerNorm(C), nn.Linear(C, 4 * C), nn.GELU(), nn.Linear(4 * C, C))
        self.gamma = nn.Parameter(torch.full((C,), 0.5))

    def forward(self, x: Tensor) -> Tensor:
        y = self.mlp(self.depthwise(x).permute(0, 2, 3, 1))
        return x + (self.gamma * y).permute(0, 3, 1, 2)


def convnext(classes: int = 5) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 8, 4, stride=4),
        ConvNeXtBlock(8),
        nn.GroupNorm(1, 8),
        nn.Conv2d(8, 16, 2, stride=2),
        ConvNeXtBlock(16),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(16, classes),
    )


class ASPP(nn.Module):
    """Dilated convolutions beside each other, with the mean of the image."""

    def __init__(self, C: int, K: int, rates: tuple[int, ...]) -> None:
        super().__init__()
        self.branches = nn.ModuleList([normed(C, K, 1), *(normed(C, K, 3, dilation=rate) for rate in rates)])
        self.mean = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Conv2d(C, K, 1), nn.ReLU())
        self.project = normed((len(rates) + 2) * K, K, 1)

    def forward(self, x: Tensor) -> Tensor:
        mean = functional.interpolate(self.mean(x), x.shape[2:], mode="bilinear", align_corners=False)
        return self.project(torch.cat([*(branch(x) for branch in self.branches), mean], 1))


class DeepLabV3(nn.Module):
    def __init__(self, classes: int = 4) -> None:
        super().__init__()
        self.backbone = nn.Sequential(normed(3, 4, 3, stride=2), Bottleneck(4, 4, 2), Bottleneck(16, 4, dilation=2))
        self.head = nn.Sequential(ASPP(16, 8, (2, 4, 6)), normed(8, 8, 3), nn.Conv2d(8, classes, 1))

    def forward(self, x: Tensor) -> Tensor:
        y = self.head(self.backbone(x))
        return functional.interpolate(y, x.shape[2:], mode="bilinear", align_corners=False)


class UNet(nn.Module):
    """Two levels down, two up by transposed convolutions, what was there on the way down put beside."""

    def __init__(self, C: int = 3, K: int = 2, width: int = 4) -> None:
        super().__init__()
        self.down = nn.ModuleList([self._double(C, width), self._double(width, 2 * width)])
        self.bottom = self._double(2 * width, 4 * width)
        self.up = nn.ModuleList(
            [nn.ConvTranspose2d(4 * width, 2 * width, 2, stride=2), nn.ConvTranspose2d(2 * width, width, 2, stride=2)]
        )
        self.merge = nn.ModuleList([self._double(4 * width, 2 * width), self._double(2 * width, width)])
        self.last = nn.Conv2d(width, K, 1)

    @staticmethod
    def _double(C: int, K: int) -> nn.Sequential:
        return nn.Sequential(normed(C, K, 3, padding_mode="reflect"), normed(K, K, 3))

    def forward(self, x: Tensor) -> Tensor:
        passed = []
        for level in self.down:
            x = level(x)
            passed.append(x)
            x = functional.max_pool2d(x, 2)
        x = self.bottom(x)
        for up, merge in zip(self.up, self.merge, strict=True):
            beside = passed.pop()
            x = merge(torch.cat([beside, up(x, output_size=beside.shape[2:])], 1))
        return self.last(x)


def dcgan_generator(latent: int = 6, width: int = 4) -> nn.Module:
    def up(C, K):
        return [nn.ConvTranspose2d(C, K, 4, 2, 1, bias=False), nn.BatchNorm2d(K), nn.ReLU()]

    return nn.Sequential(
        nn.ConvTranspose2d(latent, 4 * width, 4, 1, 0, bias=False),
        nn.BatchNorm2d(4 * width),
        nn.ReLU(),
        *up(4 * width, 2 * width),
        *up(2 * width, width),
        nn.ConvTranspose2d(width, 3, 4, 2, 1, bias=False),
        nn.Tanh(),
    )


class ResidualGroupNorm(nn.Module):
    """The block of a latent diffusion VAE."""

    def __init__(self, C: int, K: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.GroupNorm(2, C),
            nn.SiLU(),
            nn.Conv2d(C, K, 3, padding=1),
            nn.GroupNorm(2, K),
            nn.SiLU(),
            nn.Conv2d(K, K, 3, padding=1),
        )
        self.shortcut = nn.Identity() if C == K else nn.Conv2d(C, K, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.shortcut(x) + self.body(x)


def vae_decoder(latent: int = 4, width: int = 4) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(latent, 2 * width, 3, padding=1),
        ResidualGroupNorm(2 * width, 2 * width),
        nn.Upsample(scale_factor=2.0, mode="nearest"),
        nn.Conv2d(2 * width, 2 * width, 3, padding=1),
        ResidualGroupNorm(2 * width, width),
        nn.GroupNorm(2, width),
        nn.SiLU(),
        nn.Conv2d(width, 3, 3, padding=1),
    )


class WaveNet(nn.Module):
    """Gated convolutions in time, padded before only, each twice as dilated as the one below."""

    def __init__(self, width: int = 6, layers: int = 4, values: int = 8) -> None:
        super().__init__()
        self.first = nn.Conv1d(values, width, 1)
        self.gates = nn.ModuleList([nn.Conv1d(width, 2 * width, 2, dilation=2**i) for i in range(layers)])
        self.mixes = nn.ModuleList([nn.Conv1d(width, 2 * width, 1) for _ in range(layers)])
        self.last = nn.Sequential(nn.ReLU(), nn.Conv1d(width, width, 1), nn.ReLU(), nn.Conv1d(width, values, 1))

    def forward(self, x: Tensor) -> Tensor:
        x, skips = self.first(x), 0
        for gate, mix in zip(self.gates, self.mixes, strict=True):
            filtered, gated = gate(functional.pad(x, (gate.dilation[0], 0))).chunk(2, 1)
            kept, skip = mix(filtered.tanh() * gated.sigmoid()).chunk(2, 1)
            x, skips = x + kept, skips + skip
        return self.last(skips)


class VideoStem(nn.Module):
    """3-D convolutions, as video networks begin: a factorised one, and transposed back."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv3d(3, 6, (1, 5, 5), stride=(1, 2, 2), padding=(0, 2, 2)),
            nn.BatchNorm3d(6),
            nn.ReLU(),
            nn.Conv3d(6, 8, (3, 1, 1), padding=(1, 0, 0), groups=2),
            nn.ReLU(),
            nn.ConvTranspose3d(8, 3, (1, 2, 2), stride=(1, 2, 2)),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x)


class BasicBlock(nn.Module):
    """ResNet-18's block, written as torchvision writes it: one in-place ReLU called twice, `+=` for the shortcut."""

    def __init__(self, C: int, K: int, stride: int = 1) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(C, K, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(K)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(K, K, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(K)
        self.downsample = None
        if stride != 1 or C != K:
            self.downsample = nn.Sequential(nn.Conv2d(C, K, 1, stride, bias=False), nn.BatchNorm2d(K))

    def forward(self, x: Tensor) -> Tensor:
        identity = x
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        if self.downsample is not None:
            identity = self.downsample(x)
        out += identity
        return self.relu(out)


def resnet18(classes: int = 5, width: int = 4) -> nn.Module:
    stem = nn.Sequential(nn.Conv2d(3, width, 7, 2, 3, bias=False), nn.BatchNorm2d(width), nn.ReLU(inplace=True))
    stages = [BasicBlock(width, width), BasicBlock(width, 2 * width, 2)]
    return nn.Sequential(
        stem, nn.MaxPool2d(3, 2, 1), *stages, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(2 * width, classes)
    )


class LinearBottleneck(nn.Module):
    """MobileNetV2's block."""

    def __init__(self, C: int, wide: int, K: int, stride: int) -> None:
        super().__init__()
        self.residual = C == K and stride == 1
        self.conv = nn.Sequential(
            normed(C, wide, 1, nn.ReLU6),
            normed(wide, wide, 3, nn.ReLU6, stride=stride, groups=wide),
            nn.Conv2d(wide, K, 1, bias=False),
            nn.BatchNorm2d(K),
        )

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv(x) if self.residual else self.conv(x)


def mobilenet_v2(classes: int = 5) -> nn.Module:
    blocks = [LinearBottleneck(8, 16, 8, 1), LinearBottleneck(8, 24, 12, 2), normed(12, 24, 1, nn.Hardswish)]
    return nn.Sequential(
        normed(3, 8, 3, nn.ReLU6, stride=2), *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(24, classes)
    )


class ConvMixerBlock(nn.Module):
    """A depthwise 7x7 after which GELU comes before the residual, then 1x1 convolutions around another GELU."""

    def __init__(self, C: int) -> None:
        super().__init__()
        self.depthwise = nn.Conv2d(C, C, 7, padding=3, groups=C)
        self.up, self.down = nn.Conv2d(C, 4 * C, 1), nn.Conv2d(4 * C, C, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = functional.gelu(self.depthwise(x)) + x
        return x + self.down(functional.gelu(self.up(x), approximate="tanh"))


def conv_mixer(classes: int = 5) -> nn.Module:
    stem = nn.Sequential(nn.Conv2d(3, 8, 4, stride=4), nn.GELU())
    return nn.Sequential(stem, ConvMixerBlock(8), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, classes))


# For `fuse`. name: (make the model, shape of an input, what is fused in eval mode, by convolution)
FUSED = {
    "ResNet-18": (
        resnet18,
        (2, 3, 32, 32),
        {
            "0.0": ("batch norm 0.1", "relu"),
            "2.conv1": ("batch norm 2.bn1", "relu"),
            "2.conv2": ("batch norm 2.bn2", "residual", "relu"),
            "3.conv1": ("batch norm 3.bn1", "relu"),
            "3.conv2": ("batch norm 3.bn2",),
            "3.downsample.0": ("batch norm 3.downsample.1", "residual", "relu"),
        },
    ),
    "MobileNetV2": (
        mobilenet_v2,
        (2, 3, 16, 16),
        {
            "0.0": ("batch norm 0.1", "relu6"),
            "1.conv.0.0": ("batch norm 1.conv.0.1", "relu6"),
            "1.conv.1.0": ("batch norm 1.conv.1.1", "relu6"),
            "1.conv.2": ("batch norm 1.conv.3", "residual"),
            "2.conv.0.0": ("batch norm 2.conv.0.1", "relu6"),
            "2.conv.1.0": ("batch norm 2.conv.1.1", "relu6"),
            "2.conv.2": ("batch norm 2.conv.3",),
            "3.0": ("batch norm 3.1", "hardswish"),
        },
    ),
    "ConvMixer": (
        conv_mixer,
        (2, 3, 16, 16),
        {
            "0.0": ("gelu",),
            "1.depthwise": ("gelu", "residual"),
            "1.up": ("gelu_tanh",),
            "1.down": ("residual",),
        },
    ),
}

# name: (make the model, shape of an input, number of convolutions)
MODELS = {
    "ResNet-50": (resnet50, (2, 3, 32, 32), 15),
    "MobileNetV3": (mobilenet_v3, (2, 3, 24, 24), 12),
    "ConvNeXt": (convnext, (2, 3, 32, 32), 4),
    "DeepLabV3": (DeepLabV3, (2, 3, 24, 24), 16),
    "U-Net": (UNet, (2, 3, 16, 16), 13),
    "DCGAN generator": (dcgan_generator, (2, 6, 1, 1), 4),
    "VAE decoder": (vae_decoder, (2, 4, 8, 8), 8),
    "WaveNet": (WaveNet, (2, 8, 40), 11),
    "video stem": (VideoStem, (1, 3, 4, 8, 8), 3),
}
