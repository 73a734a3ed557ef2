"""What is drawn, by name."""

from __future__ import annotations

import random
from collections.abc import Callable

from . import causal, compound, convolutions, deforming
from .drawn import Drawn

FAMILIES: dict[str, Callable[[random.Random], Drawn]] = {
    "conv": convolutions.conv,
    "conv_transpose": convolutions.conv_transpose,
    "fused": convolutions.fused,
    "depthwise": convolutions.depthwise,
    "separable": compound.separable_of,
    "causal": causal.causal,
    "streaming": causal.streamed,
    "branches": compound.branches_of,
    "deform": deforming.deformable,
    "scaled": convolutions.scaled,
    "integer": convolutions.integer,
}
