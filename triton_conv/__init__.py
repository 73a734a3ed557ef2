"""Convolutions for NVIDIA GPUs in Triton, drop-in for torch.nn.functional and torch.nn."""

from typing import TYPE_CHECKING, Any

from . import nn
from . import sharding as _sharding  # noqa: F401
from .backends import backend
from .branches import Branch, multi_conv2d
from .causal import causal_conv1d, causal_conv1d_update
from .convert import convert
from .deform import deform_conv2d
from .fold import fold_batchnorm
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
from .fusion import fuse
from .invariance import batch_invariant
from .override import override
from .separable import separable_conv1d, separable_conv2d, separable_conv3d
from .streaming import causal_conv3d
from .version import VERSION as __version__  # noqa: F401, N811

if TYPE_CHECKING:
    from .tuning.training import autotune

__all__ = [
    "Branch",
    "autotune",
    "backend",
    "batch_invariant",
    "causal_conv1d",
    "causal_conv1d_update",
    "causal_conv3d",
    "conv1d",
    "conv2d",
    "conv3d",
    "conv_transpose1d",
    "conv_transpose2d",
    "conv_transpose3d",
    "convert",
    "deform_conv2d",
    "fold_batchnorm",
    "fuse",
    "int_conv1d",
    "int_conv2d",
    "int_conv3d",
    "multi_conv2d",
    "nn",
    "override",
    "scaled_conv1d",
    "scaled_conv2d",
    "scaled_conv3d",
    "separable_conv1d",
    "separable_conv2d",
    "separable_conv3d",
]


def __getattr__(name: str) -> Any:
    if name == "autotune":  # loads the tuning package
        from .tuning.training import autotune

        return autotune
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
