"""Deformable convolutions on tensors by their kernels: allocates outputs and workspace, sorts, runs plans.

Tensors have four axes, N C H W. All functions take any strides and give the same bits every time.
"""

from __future__ import annotations

from torch import Tensor

from .devices import Device
from .geometry import ConvGeometry


def forward(
    x: Tensor,
    offset: Tensor,
    w: Tensor,
    mask: Tensor | None,
    bias: Tensor | None,
    geometry: ConvGeometry,
    offset_groups: int,
    precision: str | None,
    device: Device,
    y: Tensor,
) -> Tensor:
    """y, written where it is given."""
    raise NotImplementedError


def input_gradient(
    dy: Tensor,
    offset: Tensor,
    w: Tensor,
    mask: Tensor | None,
    geometry: ConvGeometry,
    offset_groups: int,
    precision: str | None,
    device: Device,
    dx: Tensor,
) -> Tensor:
    """dx, written where it is given."""
    raise NotImplementedError


def offset_gradients(
    dy: Tensor,
    x: Tensor,
    offset: Tensor,
    w: Tensor,
    mask: Tensor | None,
    geometry: ConvGeometry,
    offset_groups: int,
    precision: str | None,
    device: Device,
) -> tuple[Tensor, Tensor | None]:
    """The gradients of offset and of mask, None without a mask."""
    raise NotImplementedError


def weight_gradient(
    dy: Tensor,
    x: Tensor,
    offset: Tensor,
    mask: Tensor | None,
    geometry: ConvGeometry,
    offset_groups: int,
    precision: str | None,
    device: Device,
    dw: Tensor,
) -> Tensor:
    """dw, written where it is given: dense, in any memory format."""
    raise NotImplementedError
