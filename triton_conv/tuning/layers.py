"""Layers whose plans are compiled and read by the audit: one of every kind that people train.

Shapes are PyTorch's: input, weight, and the options of `explain.plans`.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch


class Layer(NamedTuple):
    """A convolution: shapes as PyTorch has them, and what `explain.problems` takes by name.

    >>> Layer((32, 256, 56, 56), (256, 256, 3, 3), BFLOAT16).options["padding"]
    1
    """

    input: tuple[int, ...]
    weight: tuple[int, ...]
    options: dict[str, Any]
    since: int = 80  # the first architecture that has its dtype
    times: int = 1  # that it stands in its network


BFLOAT16 = {"dtype": torch.bfloat16, "channels_last": True, "padding": 1}
FLOAT16 = {**BFLOAT16, "dtype": torch.float16}
FLOAT32 = {**BFLOAT16, "dtype": torch.float32}
FLOAT8 = {**BFLOAT16, "dtype": torch.float8_e4m3fn}
INT8 = {**BFLOAT16, "dtype": torch.int8, "out_dtype": torch.int32}
PLAIN = {"dtype": torch.bfloat16, "channels_last": True}
FUSED = {"activation": "silu", "residual": "before", "scale": True}
DEFORMED = {"deform": True, "offset_groups": 1, "mask": True}
CHUNK = {**BFLOAT16, "context": 2}
# Branches are shapes of filters and their options: DeepLabV3's, two filters that are summed, SKNet's.
PYRAMID = (
    ((256, 2048, 1, 1), {}),
    *(((256, 2048, 3, 3), {"padding": rate, "dilation": rate}) for rate in (6, 12, 18)),
)
KERNELS = (((128, 128, 3, 3), {"padding": 1}), ((128, 128, 5, 5), {"padding": 2}))
SELECTED = tuple(((128, 4, 3, 3), {"padding": rate, "dilation": rate, "groups": 32}) for rate in (1, 2))
CAUSAL = {"causal": True, "dtype": torch.bfloat16, "channels_last": False, "activation": "silu"}

LAYERS = {
    "3x3": Layer((32, 256, 56, 56), (256, 256, 3, 3), BFLOAT16),
    "3x3 float16": Layer((32, 256, 56, 56), (256, 256, 3, 3), FLOAT16),
    "3x3 small image": Layer((32, 512, 7, 7), (512, 512, 3, 3), BFLOAT16),
    "3x3 stride 2": Layer((32, 256, 56, 56), (512, 256, 3, 3), {**BFLOAT16, "stride": 2}),
    "3x3 dilated": Layer((8, 256, 64, 64), (256, 256, 3, 3), {**BFLOAT16, "padding": 2, "dilation": 2}),
    "3x3 contiguous": Layer((32, 256, 56, 56), (256, 256, 3, 3), {**BFLOAT16, "channels_last": False}),
    "3x3 circular": Layer((32, 256, 56, 56), (256, 256, 3, 3), {**BFLOAT16, "padding_mode": "circular"}),
    "1x1": Layer((32, 256, 56, 56), (64, 256, 1, 1), {**BFLOAT16, "padding": 0}),
    "1x1 stride 2": Layer((32, 256, 56, 56), (512, 256, 1, 1), {**BFLOAT16, "padding": 0, "stride": 2}),
    "stem": Layer((32, 3, 224, 224), (64, 3, 7, 7), {**BFLOAT16, "stride": 2, "padding": 3}),
    "patches": Layer((32, 3, 224, 224), (768, 3, 16, 16), {**BFLOAT16, "stride": 16, "padding": 0}),
    "patches of 64 channels": Layer((32, 64, 56, 56), (128, 64, 2, 2), {**BFLOAT16, "stride": 2, "padding": 0}),
    "24 channels": Layer((32, 24, 56, 56), (24, 24, 3, 3), BFLOAT16),
    "72 to 200 channels": Layer((32, 72, 56, 56), (200, 72, 3, 3), BFLOAT16),
    "odd channels": Layer((32, 65, 56, 56), (33, 65, 3, 3), BFLOAT16),
    "grouped": Layer((32, 128, 56, 56), (128, 4, 3, 3), {**BFLOAT16, "groups": 32}),
    "depthwise": Layer((32, 256, 56, 56), (256, 1, 3, 3), {**BFLOAT16, "groups": 256}),
    "depthwise contiguous": Layer(
        (32, 256, 56, 56), (256, 1, 3, 3), {**BFLOAT16, "groups": 256, "channels_last": False}
    ),
    "depthwise stride 2": Layer((32, 96, 112, 112), (96, 1, 3, 3), {**BFLOAT16, "groups": 96, "stride": 2}),
    "depthwise stride 2 contiguous": Layer(
        (32, 96, 112, 112), (96, 1, 3, 3), {**BFLOAT16, "groups": 96, "stride": 2, "channels_last": False}
    ),
    "depthwise 5x5": Layer((32, 240, 28, 28), (240, 1, 5, 5), {**FLOAT16, "groups": 240, "padding": 2}),
    "depthwise 7x7": Layer((32, 384, 14, 14), (384, 1, 7, 7), {**BFLOAT16, "groups": 384, "padding": 3}),
    "depthwise 7x7 contiguous": Layer(
        (32, 96, 56, 56), (96, 1, 7, 7), {**BFLOAT16, "groups": 96, "padding": 3, "channels_last": False}
    ),
    "depthwise 31x31": Layer((32, 64, 28, 28), (64, 1, 31, 31), {**BFLOAT16, "groups": 64, "padding": 15}),
    "depthwise 31x31 contiguous": Layer(
        (32, 128, 56, 56), (128, 1, 31, 31), {**BFLOAT16, "groups": 128, "padding": 15, "channels_last": False}
    ),
    "depthwise 31x31 circular": Layer(
        (32, 128, 56, 56), (128, 1, 31, 31), {**BFLOAT16, "groups": 128, "padding": 15, "padding_mode": "circular"}
    ),
    "depthwise 31x31 float32 tf32": Layer(
        (32, 64, 56, 56), (64, 1, 31, 31), {**FLOAT32, "groups": 64, "padding": 15, "precision": "tf32"}
    ),
    "depthwise 31x31 float32 ieee": Layer(
        (32, 64, 28, 28), (64, 1, 31, 31), {**FLOAT32, "groups": 64, "padding": 15, "precision": "ieee"}
    ),
    "depthwise 13x13": Layer((32, 384, 14, 14), (384, 1, 13, 13), {**FLOAT16, "groups": 384, "padding": 6}),
    "depthwise 51x5": Layer(
        (32, 96, 56, 56), (96, 1, 5, 51), {**BFLOAT16, "groups": 96, "padding": (2, 25), "channels_last": False}
    ),
    "depthwise long audio": Layer(
        (8, 512, 4096), (512, 1, 64), {**BFLOAT16, "groups": 512, "padding": ((63, 0),), "channels_last": False}
    ),
    "depthwise float32": Layer((32, 64, 56, 56), (64, 1, 3, 3), {**FLOAT32, "groups": 64}),
    "depthwise float64": Layer(
        (8, 64, 28, 28), (64, 1, 3, 3), {**BFLOAT16, "dtype": torch.float64, "groups": 64, "padding_mode": "circular"}
    ),
    "depthwise video": Layer(
        (2, 64, 8, 28, 28), (64, 1, 3, 3, 3), {**BFLOAT16, "groups": 64, "padding": ((2, 0), 1, 1)}
    ),
    "depthwise audio": Layer(
        (8, 1024, 4096), (1024, 1, 4), {**BFLOAT16, "groups": 1024, "padding": ((3, 0),), "channels_last": False}
    ),
    "two filters a channel": Layer((32, 64, 56, 56), (128, 1, 3, 3), {**BFLOAT16, "groups": 64}),
    "separable": Layer((32, 128, 56, 56), (128, 1, 3, 3), {**BFLOAT16, "pointwise": 128}),
    "separable 7x7": Layer((32, 96, 56, 56), (96, 1, 7, 7), {**FLOAT16, "pointwise": 384, "padding": 3}),
    "separable contiguous": Layer(
        (32, 64, 56, 56), (128, 1, 3, 3), {**BFLOAT16, "pointwise": 64, "channels_last": False}
    ),
    "separable float32": Layer((32, 64, 56, 56), (64, 1, 5, 5), {**FLOAT32, "pointwise": 64, "padding": 2}),
    "separable float64": Layer((8, 64, 28, 28), (64, 1, 3, 3), {**BFLOAT16, "dtype": torch.float64, "pointwise": 64}),
    "separable video": Layer(
        (2, 64, 8, 28, 28), (64, 1, 3, 3, 3), {**BFLOAT16, "pointwise": 128, "padding_mode": "replicate"}
    ),
    "transposed 4x4": Layer((32, 256, 28, 28), (256, 128, 4, 4), {**BFLOAT16, "transposed": True, "stride": 2}),
    "transposed 2x2": Layer(
        (32, 128, 28, 28), (128, 64, 2, 2), {**BFLOAT16, "transposed": True, "stride": 2, "padding": 0}
    ),
    "video": Layer((2, 64, 16, 56, 56), (64, 64, 3, 3, 3), BFLOAT16),
    "causal video": Layer((2, 128, 9, 64, 64), (128, 128, 3, 3, 3), {**BFLOAT16, "padding": ((2, 0), 1, 1)}),
    "audio": Layer((8, 80, 3000), (512, 80, 3), {**BFLOAT16, "channels_last": False}),
    "float32 tf32": Layer((32, 256, 56, 56), (256, 256, 3, 3), {**FLOAT32, "precision": "tf32"}),
    "float32 tf32x3": Layer((32, 256, 56, 56), (256, 256, 3, 3), {**FLOAT32, "precision": "tf32x3"}),
    "float32 ieee": Layer((32, 256, 56, 56), (256, 256, 3, 3), {**FLOAT32, "precision": "ieee"}),
    "float64": Layer((32, 256, 56, 56), (256, 256, 3, 3), {**BFLOAT16, "dtype": torch.float64}),
    "float8": Layer((32, 256, 56, 56), (256, 256, 3, 3), FLOAT8, since=90),
    "float8 stride 2": Layer((32, 128, 56, 56), (256, 128, 3, 3), {**FLOAT8, "stride": 2}, since=90),
    "float8 circular": Layer((32, 128, 56, 56), (256, 128, 3, 3), {**FLOAT8, "padding_mode": "circular"}, since=90),
    "int8": Layer((32, 256, 56, 56), (256, 256, 3, 3), INT8),
    "int8 circular": Layer((32, 128, 56, 56), (256, 128, 3, 3), {**INT8, "padding_mode": "circular"}),
    "int64": Layer((32, 64, 56, 56), (64, 64, 3, 3), {**BFLOAT16, "dtype": torch.int64}),
    "causal": Layer((2, 12288, 16384), (12288, 4), {**CAUSAL, "channels_last": True}),
    "causal contiguous": Layer((2, 12288, 16384), (12288, 4), CAUSAL),
    "causal state": Layer((2, 5120, 2048), (5120, 4), {**CAUSAL, "channels_last": True, "initial_state": True}),
    "causal state contiguous": Layer((2, 5120, 2048), (5120, 4), {**CAUSAL, "initial_state": True}),
    "causal float32": Layer(
        (8, 2048, 4096), (2048, 3), {**CAUSAL, "dtype": torch.float32, "channels_last": True, "activation": None}
    ),
    "causal 8 taps": Layer((8, 2048, 4096), (2048, 8), {**CAUSAL, "dtype": torch.float16, "channels_last": True}),
    "causal 8 taps contiguous": Layer((8, 2048, 4096), (2048, 8), {**CAUSAL, "dtype": torch.float16}),
    "3x3 fused": Layer((32, 256, 56, 56), (256, 256, 3, 3), {**BFLOAT16, **FUSED}),
    "3x3 fused contiguous": Layer((32, 256, 56, 56), (256, 256, 3, 3), {**BFLOAT16, **FUSED, "channels_last": False}),
    "3x3 fused circular": Layer(
        (32, 256, 56, 56), (256, 256, 3, 3), {**BFLOAT16, **FUSED, "activation": "gelu", "padding_mode": "circular"}
    ),
    "1x1 fused": Layer(
        (32, 64, 56, 56), (256, 64, 1, 1), {**BFLOAT16, "padding": 0, "activation": "relu", "residual": "before"}
    ),
    "float32 tf32 fused": Layer((32, 256, 56, 56), (256, 256, 3, 3), {**FLOAT32, **FUSED, "precision": "tf32"}),
    "float64 fused": Layer((32, 64, 28, 28), (64, 64, 3, 3), {**BFLOAT16, **FUSED, "dtype": torch.float64}),
    "transposed 4x4 fused": Layer(
        (32, 256, 28, 28),
        (256, 128, 4, 4),
        {**BFLOAT16, **FUSED, "transposed": True, "stride": 2, "residual": "after"},
    ),
    "depthwise 7x7 fused": Layer(
        (32, 384, 14, 14), (384, 1, 7, 7), {**BFLOAT16, **FUSED, "groups": 384, "padding": 3, "activation": "gelu"}
    ),
    "depthwise 31x31 fused": Layer(
        (32, 128, 56, 56), (128, 1, 31, 31), {**BFLOAT16, **FUSED, "groups": 128, "padding": 15, "channels_last": False}
    ),
    "pyramid": Layer((16, 2048, 33, 33), (256, 2048, 1, 1), {**PLAIN, "branches": PYRAMID}),
    "pyramid contiguous": Layer(
        (16, 2048, 33, 33), (256, 2048, 1, 1), {**PLAIN, "branches": PYRAMID, "channels_last": False}
    ),
    "pyramid float32 tf32": Layer(
        (16, 2048, 33, 33),
        (256, 2048, 1, 1),
        {**PLAIN, "branches": PYRAMID, "dtype": torch.float32, "precision": "tf32"},
    ),
    "pyramid float32 ieee": Layer(
        (16, 2048, 33, 33),
        (256, 2048, 1, 1),
        {**PLAIN, "branches": PYRAMID, "dtype": torch.float32, "precision": "ieee"},
    ),
    "summed branches": Layer((32, 128, 56, 56), (128, 128, 3, 3), {**PLAIN, "branches": KERNELS, "combine": "sum"}),
    "summed branches float64": Layer(
        (8, 128, 56, 56), (128, 128, 3, 3), {**PLAIN, "branches": KERNELS, "combine": "sum", "dtype": torch.float64}
    ),
    "grouped branches": Layer((64, 128, 56, 56), (128, 4, 3, 3), {**PLAIN, "branches": SELECTED}),
    "deformable": Layer((2, 256, 50, 84), (256, 256, 3, 3), {**FLOAT16, **DEFORMED}),
    "deformable contiguous": Layer(
        (2, 256, 50, 84), (256, 256, 3, 3), {**BFLOAT16, **DEFORMED, "channels_last": False}
    ),
    "deformable without mask": Layer((2, 128, 100, 168), (128, 128, 3, 3), {**BFLOAT16, **DEFORMED, "mask": False}),
    "deformable stride 2": Layer((2, 512, 50, 84), (512, 512, 3, 3), {**FLOAT16, **DEFORMED, "stride": 2}),
    "deformable groups": Layer((8, 128, 56, 56), (128, 32, 3, 3), {**BFLOAT16, **DEFORMED, "offset_groups": 8}),
    "deformable narrow": Layer((8, 64, 56, 56), (64, 1, 3, 3), {**BFLOAT16, **DEFORMED, "offset_groups": 64}),
    "deformable float32 tf32": Layer((2, 256, 50, 84), (256, 256, 3, 3), {**FLOAT32, **DEFORMED, "precision": "tf32"}),
    "deformable float32 ieee": Layer((2, 256, 50, 84), (256, 256, 3, 3), {**FLOAT32, **DEFORMED, "precision": "ieee"}),
    "deformable float64": Layer((2, 64, 50, 84), (64, 64, 3, 3), {**BFLOAT16, **DEFORMED, "dtype": torch.float64}),
    "chunk": Layer((1, 384, 4, 60, 104), (384, 384, 3, 3, 3), CHUNK),
    "chunk contiguous": Layer((1, 384, 4, 60, 104), (384, 384, 3, 3, 3), {**CHUNK, "channels_last": False}),
    "chunk reflect": Layer((1, 128, 1, 128, 192), (128, 128, 3, 3, 3), {**CHUNK, "padding_mode": "reflect"}),
    "chunk 3x1x1": Layer((1, 384, 2, 60, 104), (768, 384, 3, 1, 1), {**CHUNK, "padding": 0}),
    "chunk float32 tf32": Layer(
        (1, 96, 4, 120, 208), (96, 96, 3, 3, 3), {**CHUNK, "dtype": torch.float32, "precision": "tf32"}
    ),
    "chunk float32 ieee": Layer(
        (1, 96, 4, 120, 208), (96, 96, 3, 3, 3), {**CHUNK, "dtype": torch.float32, "precision": "ieee"}
    ),
    "chunk float64": Layer((1, 64, 2, 30, 52), (64, 64, 3, 3, 3), {**CHUNK, "dtype": torch.float64}),
    "chunk of audio": Layer(
        (8, 512, 480), (512, 512, 7), {"dtype": torch.bfloat16, "channels_last": False, "context": 6}
    ),
}
