"""What modules add to a convolution in the same kernel; see `triton_conv.fused`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import fused


class Fusing:
    """The options of a module. `convert` swaps classes alone, so every attribute here has a default.

    The scale is a parameter, and an attribute only of modules that have one.
    """

    activation: str | None = None
    negative_slope: float = 0.01
    residual_after_activation: bool = False
    has_scale: bool = False
    scale: Any

    def _check_fusion(self, activation: Any, negative_slope: Any, residual_after_activation: Any, scale: Any) -> None:
        name = type(self).__name__
        fused.check(name, activation, negative_slope, residual_after_activation)
        if not isinstance(scale, bool):
            raise TypeError(f"{name}(): argument 'scale' must be bool, not {type(scale).__name__}")

    def _set_fusion(
        self,
        activation: str | None,
        negative_slope: float,
        residual_after_activation: bool,
        scale: bool,
        channels: int,
        device: Any,
        dtype: torch.dtype | None,
    ) -> None:
        """Once there is a module to set it of."""
        given = {"activation": activation, "negative_slope": negative_slope}
        given |= {"residual_after_activation": residual_after_activation, "has_scale": scale}
        for name, value in given.items():
            if value != getattr(Fusing, name):
                setattr(self, name, value)
        if scale:
            self.scale = torch.nn.Parameter(torch.ones(channels, device=device, dtype=dtype))

    def _fusion(self, residual: Tensor | None) -> dict[str, Any]:
        """Keywords of the function that is called; none where nothing is asked for."""
        keywords: dict[str, Any] = {}
        if self.activation is not None:
            keywords |= {"activation": self.activation, "negative_slope": self.negative_slope}
        if residual is not None:
            keywords |= {"residual": residual, "residual_after_activation": self.residual_after_activation}
        if self.has_scale:
            keywords["scale"] = self.scale
        return keywords

    def _fusion_repr(self) -> str:
        text = "" if self.activation is None else f", activation={self.activation}"
        if self.activation == "leaky_relu":
            text += f", negative_slope={self.negative_slope}"
        if self.residual_after_activation:
            text += ", residual_after_activation=True"
        return text + (", scale=True" if self.has_scale else "")

    def reset_parameters(self) -> None:
        """As torch's, and ones for the scale."""
        super().reset_parameters()  # type: ignore[misc]
        if self.has_scale:
            torch.nn.init.ones_(self.scale)
