"""Deformable convolutions in numbers: what a launch depends on, and its tiles, by rule.

Letters are geometry's, in two dimensions: x N C H W, w K C R S, y N K P Q. An offset group's channels share their
offsets. A *segment* is a run of channels that lie in one group and in one offset group.
"""

from __future__ import annotations

from dataclasses import replace
from enum import Enum
from math import gcd, prod
from typing import NamedTuple

from .config import ITEM_BYTES, LARGEST_TILE, Config, Numerics, most_splits
from .devices import Device
from .geometry import ConvGeometry, Strides
from .tiles import ceil_div


class DeformRole(Enum):
    """What is computed: y; the gradient of x; those of offset and mask; that of w."""

    FORWARD = "forward"
    INPUT = "input gradient"
    OFFSET = "offset and mask gradient"
    WEIGHT = "weight gradient"


class DeformProblem(NamedTuple):
    """What a plan depends on.

    Strides count elements along five axes, as geometry's, for gradients as for what they are gradients of: in INPUT x
    is the gradient that is written and y the one that is read, in WEIGHT w is written, in OFFSET the gradients of
    offset and mask have the strides of these. `mask` is () where there is none. offset and mask have `offset_dtype`.
    """

    role: DeformRole
    geometry: ConvGeometry
    offset_groups: int
    dtype: str
    precision: str
    strides: Strides
    offset: tuple[int, ...]
    mask: tuple[int, ...]
    has_bias: bool
    device: Device
    offset_dtype: str

    @property
    def has_mask(self) -> bool:
        return bool(self.mask)

    @property
    def segment(self) -> int:
        """Channels of a segment."""
        return gcd(self.geometry.C // self.geometry.groups, self.geometry.C // self.offset_groups)

    @property
    def item_bytes(self) -> int:
        return ITEM_BYTES[self.dtype]

    def __str__(self) -> str:
        mask = ", mask" if self.has_mask else ""
        return f"{self.geometry}  offset groups {self.offset_groups}{mask}"
