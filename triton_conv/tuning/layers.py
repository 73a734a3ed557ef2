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
}
