"""Suites of layer shapes, which tests, tuner and benchmarks share.

    >>> suite = SUITES["resnet50"]
    >>> len(suite.layers), sum(layer.times for layer in suite.layers.values())
    (23, 53)

Shapes are those of published networks: `networks` counts the larger ones, `compound` those of layers that are more than
a convolution; the smaller stand here.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from .. import branches_ways, explain, stored
from ..branches_plan import BranchesPlan
from ..deform_plan import DeformPlan
from ..devices import Device
from ..streaming_plan import StreamingPlan
from . import branches, compound, networks, subject
from .layers import Layer
from .networks import Layers
from .subject import AnyProblem
from .tune import Task


@dataclass(frozen=True)
class Suite:
    """Layers by name, with shapes at a `batch`; `about` says in words what they are and where they come from."""

    name: str
    layers: Mapping[str, Layer]
    about: str = ""
    batch: int = 1


def _at_batch(layers: Mapping[str, Layer], batch: int) -> dict[str, Layer]:
    return {name: layer._replace(input=(layer.input[0] * batch, *layer.input[1:])) for name, layer in layers.items()}


def _suite(name: str, about: str, batch: int, layers: Mapping[str, Layer]) -> Suite:
    """A suite of layers of one image each."""
    return Suite(name, _at_batch(layers, batch), about, batch)


def tasks(
    suite: Suite | str,
    device: Device,
    batch: int | None = None,
    dtype: torch.dtype | None = None,
    channels_last: bool | None = None,
) -> list[Task]:
    """What there is to tune in a suite: forward and gradients of its layers, each problem once.

        >>> from triton_conv.devices import H200
        >>> len(tasks("resnet50", H200))
        69

    `batch`, `dtype` and `channels_last` are the suite's own where they are None. Layers without configs to choose from
    are left out, and a warning says so (see `fixed`); epilogues have no part in configs, and a streaming convolution is
    an ordinary one of a fixed number of frames: its bits do not depend on how a video is cut, so its config may not.
    Raises ValueError for a suite
    that there is not and a batch below 1.
    """
    found: list[Task] = []
    problems = set()
    for name, layer in layers(suite, batch, dtype, channels_last).items():
        reason = fixed(layer)
        if reason:
            warnings.warn(f"{name} is left out: {reason}", stacklevel=2)
            continue
        problems_of_it = _problems(compound.bare(layer), device)
        if not problems_of_it:
            reason = "its kernel walks other axes than that of an ordinary convolution, and runs by rule"
            if layer.options.get("branches"):
                reason = "one launch cannot compute its branches"
            warnings.warn(f"{name} is left out: {reason}", stacklevel=2)
        for problem in problems_of_it:
            if problem not in problems:
                problems.add(problem)
                found.append(Task(name, problem))
    return found


def _problems(layer: Layer, device: Device) -> list[AnyProblem]:
    """What is tuned for a layer: of a streaming convolution the ordinary one by whose configs it runs, forward only.

    Of several branches it is what one launch computes, forward and the input gradient, and where rules would leave
    that to a launch for each branch, these too.
    """
    if not layer.options.get("deform") and not layer.options.get("branches") and "context" not in layer.options:
        return list(explain.problems(layer.input, layer.weight, device=device, **layer.options).values())
    with stored.hidden():  # so that every rank of a job has the same
        options = layer.options | ({"one_launch": True} if layer.options.get("branches") else {})
        plans = explain.plans(layer.input, layer.weight, device=device, **options)
        return [problem for p in plans.values() for problem in _problems_behind(p)]


def _problems_behind(p: explain.AnyPlan) -> list[AnyProblem]:
    if isinstance(p, BranchesPlan):
        apart = [] if p.worth_it else [branches_ways.alone(p.asked, term) for term in p.asked.terms]
        return [branches.numbered(p.asked), *apart]
    if isinstance(p, StreamingPlan):
        problem = subject.streaming(p)
        return [] if problem is None else [problem]
    return [p.asked] if isinstance(p, DeformPlan) else []


def layers(
    suite: Suite | str,
    batch: int | None = None,
    dtype: torch.dtype | None = None,
    channels_last: bool | None = None,
) -> dict[str, Layer]:
    """The layers of a suite at another batch, in another dtype or memory format; errors are those of `tasks`."""
    if isinstance(suite, str):
        if suite not in SUITES:
            raise ValueError(f"suite {suite!r} is not one of {', '.join(SUITES)}")
        suite = SUITES[suite]
    if batch is not None and batch < 1:
        raise ValueError(f"batch {batch} is not positive")
    changes: dict[str, Any] = {} if dtype is None else {"dtype": dtype}
    changes |= {} if channels_last is None else {"channels_last": channels_last}
    found = {}
    for name, layer in suite.layers.items():
        images = layer.input[0] if batch is None else layer.input[0] // suite.batch * batch
        options = {**layer.options, **changes}
        found[name] = layer._replace(input=(images, *layer.input[1:]), options=options)
    return found


# By the option that says so, what has no problem that the tuner knows.
_RULED = {"causal": "causal_conv1d"}


def fixed(layer: Layer) -> str:
    """Why there is nothing to tune in a layer; "" if there is."""
    ruled = [what for option, what in _RULED.items() if layer.options.get(option)]
    return f"{ruled[0]} has one config for each shape, by rule" if ruled else ""


# ---------------------------------------------------------------------------------------------------------------------
# Layers of one image each


def _aspp() -> Layers:
    """Atrous spatial pyramids at output stride 16 and 8 of 513x513 images.

    DeepLabV2 (Chen et al. 2016) has the four dilations, DeepLabV3 (2017) the 2048 channels before and 256 after; 256
    before are those of pyramids on features that a 1x1 convolution has reduced.
    """
    found = Layers()
    for size in (33, 65):
        found.square("1x1", 2048, 256, size, 1)
        for channels in (2048, 256):
            for dilation in (6, 12, 18, 24):
                name = f"dilation {dilation}"
                weight = (256, channels, 3, 3)
                found.add(name, (channels, size, size), weight, padding=dilation, dilation=dilation)
        found.square("1x1", 1280, 256, size, 1)
    return found


def _upsampling() -> Layers:
    found = Layers()

    def up(name: str, channels: int, filters: int, size: int, taps: int, **options: Any) -> None:
        found.add(name, (channels, size, size), (channels, filters, taps, taps), transposed=True, **options)

    # DCGAN at 64x64 (Radford et al. 2015), in the widths of PyTorch's example.
    up("DCGAN", 100, 512, 1, 4)
    for channels, size in ((512, 4), (256, 8), (128, 16)):
        up("DCGAN", channels, channels // 2, size, 4, stride=2, padding=1)
    up("DCGAN", 64, 3, 32, 4, stride=2, padding=1)
    # U-Net on 572x572 images, without padding (Ronneberger et al. 2015, figure 1).
    for channels, size in ((1024, 28), (512, 52), (256, 100), (128, 196)):
        up("U-Net", channels, channels // 2, size, 2, stride=2)
    # The generator of CycleGAN at 256x256 (Zhu et al. 2017).
    for channels, size in ((256, 64), (128, 128)):
        up("CycleGAN", channels, channels // 2, size, 3, stride=2, padding=1, output_padding=1)
    return found


def _patches() -> Layers:
    """Images and pairs of frames cut into patches: vision transformers."""
    found = Layers()
    # Dosovitskiy et al. 2020; Radford et al. 2021; Kirillov et al. 2023.
    for name, size, taps, width in (("ViT-B/16", 224, 16, 768), ("CLIP-L/14", 224, 14, 1024), ("SAM-B", 1024, 16, 768)):
        found.add(name, (3, size, size), (width, 3, taps, taps), stride=taps)
    # Wang et al. 2024; Qwen 2025: patches come one by one, 1024 of them from an image of 32x32.
    for name, taps, width in (("Qwen2-VL", 14, 1280), ("Qwen3-VL", 16, 1152)):
        filters = (2, taps, taps)
        found.add(name, (3, *filters), (width, 3, *filters), images=1024, stride=filters)
    return found


def _wavenet() -> Layers:
    """Dilated stacks over raw audio, in memory with samples side by side."""
    found = Layers()
    for dilation in (1, 2, 4, 8, 16, 32, 64, 128, 256, 512):  # WaveNet (van den Oord et al. 2016): causal, two taps
        options: dict[str, Any] = {"padding": ((dilation, 0),), "dilation": dilation, "channels_last": False}
        found.add(f"WaveNet dilation {dilation}", (64, 16000), (128, 64, 2), **options)
    for dilation in (1, 2, 4, 8, 16, 32, 64, 128):  # WaveGlow (Prenger et al. 2018): 16000 samples, 8 a group
        options = {"padding": dilation, "dilation": dilation, "channels_last": False}
        found.add(f"WaveGlow dilation {dilation}", (512, 2000), (1024, 512, 3), **options)
    return found


def _whisper() -> Layers:
    """The two convolutions before Whisper's encoder (Radford et al. 2022), over 30 s of 80 mel bands; large-v3: 128."""
    found = Layers()
    for name, bands, width in (("base", 80, 512), ("medium", 80, 1024), ("large-v3", 128, 1280)):
        found.add(name, (bands, 3000), (width, bands, 3), padding=1, channels_last=False)
        found.add(name, (width, 3000), (width, width, 3), padding=1, stride=2, channels_last=False)
    return found


def _circular() -> Layers:
    """Longitudes go round: the globe at 5.625 degrees, and panoramas of 512x1024."""
    found = Layers()
    border: dict[str, Any] = {"padding_mode": ("zeros", "circular")}
    # The ResNet of Rasp and Thuerey 2021 (WeatherBench), 117 fields in and 128 channels.
    found.add("globe", (117, 32, 64), (128, 117, 7, 7), padding=3, **border)
    found.add("globe", (128, 32, 64), (128, 128, 3, 3), padding=1, **border)
    # HorizonNet (Sun et al. 2019): ResNet-50's 3x3 convolutions.
    for channels, height in ((64, 128), (128, 64), (256, 32), (512, 16)):
        found.add("panorama", (channels, height, 2 * height), (channels, channels, 3, 3), padding=1, **border)
    return found


def _mamba() -> Layers:
    """Mamba-2.8B (Gu and Dao 2023) and Mamba2-2.7B (Dao and Gu 2024), 2048 tokens."""
    options = {"causal": True, "dtype": torch.bfloat16, "channels_last": True, "activation": "silu"}
    found = Layers()
    for name, channels in (("Mamba-2.8B", 5120), ("Mamba2-2.7B", 5376)):
        found[name] = Layer((1, channels, 2048), (channels, 4), options, times=64)
    return found


# Blocks, width of the 3x3 convolution, its groups, output channels, stride: He et al. 2015, Xie et al. 2016, table 1.
_RESNET = [(3, 64, 1, 256, 1), (4, 128, 1, 512, 2), (6, 256, 1, 1024, 2), (3, 512, 1, 2048, 2)]
_RESNEXT = [(3, 128, 32, 256, 1), (4, 256, 32, 512, 2), (6, 512, 32, 1024, 2), (3, 1024, 32, 2048, 2)]
# RegNetY-8GF: depths, widths and width of a group as in Radosavovic et al. 2020, table 9 of the appendix.
_REGNET = [(2, 224, 4, 224, 2), (4, 448, 8, 448, 2), (10, 896, 16, 896, 2), (1, 2016, 36, 2016, 2)]

SUITES: dict[str, Suite] = {
    suite.name: suite
    for suite in (
        _suite("resnet50", "ResNet-50 at 224x224 (He et al. 2015)", 128, networks.bottlenecks(64, _RESNET)),
        _suite("resnet50_batch1", "ResNet-50 at 224x224, one image", 1, networks.bottlenecks(64, _RESNET)),
        _suite(
            "resnext50",
            "ResNeXt-50 32x4d at 224x224 (Xie et al. 2016)",
            128,
            networks.bottlenecks(64, _RESNEXT),
        ),
        _suite(
            "regnety",
            "RegNetY-8GF at 224x224 (Radosavovic et al. 2020)",
            128,
            networks.bottlenecks(32, _REGNET, simple=True),
        ),
        _suite("mobilenetv3", "MobileNetV3-Large at 224x224 (Howard et al. 2019)", 128, networks.mobilenet_v3()),
        _suite("efficientnetv2", "EfficientNetV2-S at 384x384 (Tan and Le 2021)", 32, networks.efficientnet_v2()),
        _suite("convnext", "ConvNeXt-T at 224x224 (Liu et al. 2022)", 128, networks.convnext()),
        _suite("replknet", "RepLKNet-31B at 224x224, depthwise (Ding et al. 2022)", 64, networks.replknet()),
        _suite("aspp", "DeepLab's atrous pyramids (Chen et al. 2016, 2017)", 16, _aspp()),
        _suite("sd_unet", "Stable Diffusion 1.5, U-Net (Rombach et al. 2022)", 8, networks.diffusion_unet()),
        _suite("sd_vae", "Stable Diffusion, decoder (Rombach et al. 2022)", 1, networks.diffusion_decoder()),
        _suite("upsampling", "transposed: DCGAN, U-Net, CycleGAN (2015 to 2017)", 32, _upsampling()),
        _suite("wan_vae", "Wan 2.1, causal video decoder at 480x832 (2025)", 1, networks.wan_decoder()),
        _suite("ltx_vae", "LTX-Video, causal autoencoder at 512x768 (HaCohen et al. 2024)", 1, networks.ltx_video()),
        _suite("patches", "patch embeddings: ViT, CLIP, SAM, Qwen-VL (2020 to 2025)", 16, _patches()),
        _suite("x3d", "X3D-M, temporal depthwise (Feichtenhofer 2020)", 16, networks.x3d()),
        _suite("wavenet", "dilated audio: WaveNet (2016), WaveGlow (2018)", 8, _wavenet()),
        _suite("whisper", "Whisper, before the encoder (Radford et al. 2022)", 8, _whisper()),
        _suite("circular", "circular longitudes: WeatherBench (2021), HorizonNet (2019)", 16, _circular()),
        _suite("mamba", "Mamba's short convolutions (2023, 2024)", 8, _mamba()),
        _suite(
            "resnet50_fused",
            "ResNet-50, norms folded: bias, relu and shortcut in the kernel (He et al. 2015)",
            128,
            compound.fused_bottlenecks([(blocks, width, out, stride) for blocks, width, _, out, stride in _RESNET]),
        ),
        _suite(
            "aspp_branches", "DeepLabV3's pyramids, four filters at once (Chen et al. 2017)", 16, compound.pyramids()
        ),
        _suite("inception_v3", "Inception-v3, filters over one input (Szegedy et al. 2015)", 64, compound.inception()),
        _suite("sknet50", "SKNet-50, selective kernels (Li et al. 2019)", 64, compound.selective_kernels()),
        _suite("dcnv2_resnet50", "DCNv2 ResNet-50 at 800x1344, deformable (2019)", 2, compound.deformable()),
        _suite("wan_streaming", "Wan 2.1, video decoder in chunks at 480x832 (2025)", 1, compound.wan_chunks()),
        _suite("ltx_streaming", "LTX-2, video decoder in chunks at 512x768 (2026)", 1, compound.ltx_chunks()),
        _suite("qwen_image", "Qwen-Image, decoder at 1024x1024, chunks of one frame (2025)", 1, compound.qwen_image()),
    )
}
