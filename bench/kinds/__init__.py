"""Kinds of layers that are more than one plain convolution."""

from __future__ import annotations

from triton_conv.tuning.compound import EPILOGUE
from triton_conv.tuning.layers import Layer

from .branches import Branches
from .causal import Causal
from .deform import Deformable
from .fused import Fused
from .kind import Kind
from .streaming import Streaming

# By the option that says so; the first that a layer has counts.
_KINDS: dict[str, Kind] = {
    "causal": Causal(),
    "branches": Branches(),
    "deform": Deformable(),
    "context": Streaming(),
    **dict.fromkeys(EPILOGUE, Fused()),
}


def of(layer: Layer) -> Kind | None:
    """The kind of a layer, None for a plain convolution."""
    return next((kind for option, kind in _KINDS.items() if layer.options.get(option)), None)
