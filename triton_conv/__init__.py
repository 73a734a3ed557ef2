"""Convolutions for NVIDIA GPUs in Triton, drop-in for torch.nn.functional and torch.nn."""

from . import nn
from .causal import causal_conv1d, causal_conv1d_update
from .functional import (
    conv1d,
    conv2d,
    conv3d,
    conv_transpose1d,
    conv_transpose2d,
    conv_transpose3d,
    int_conv1d,
    int_conv2d,
    int_conv3d,
    scaled_conv1d,
    scaled_conv2d,
    scaled_conv3d,
)
from .nn import convert
from .override import override
from .separable import separable_conv1d, separable_conv2d, separable_conv3d
from .version import VERSION as __version__  # noqa: F401, N811

__all__ = [
    "causal_conv1d",
    "causal_conv1d_update",
    "conv1d",
    "conv2d",
    "conv3d",
    "conv_transpose1d",
    "conv_transpose2d",
    "conv_transpose3d",
    "convert",
    "int_conv1d",
    "int_conv2d",
    "int_conv3d",
    "nn",
    "override",
    "scaled_conv1d",
    "scaled_conv2d",
    "scaled_conv3d",
    "separable_conv1d",
    "separable_conv2d",
    "separable_conv3d",
]
