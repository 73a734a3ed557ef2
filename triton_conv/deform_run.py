"""Deformable convolutions on tensors by their kernels: allocates outputs and workspace, sorts, runs plans.

Tensors have four axes, N C H W, and any strides. Outputs have the same bits every time.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from . import deform_plan, recovery
from .backends import default_precision
from .deform_config import DeformProblem, DeformRole
from .deform_plan import DeformPlan
from .devices import Device
from .execute import _on_device, _strides
from .geometry import ConvGeometry, Strides


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
    """y, which is written."""
    if y.numel() == 0:
        return y
    if x.numel() == 0 or w.numel() == 0:
        return y.zero_() if bias is None else y.copy_(bias[:, None, None])
    how = (geometry, offset_groups, precision, device, bias is not None)
    make = partial(plan, DeformRole.FORWARD, x, w, y, offset, mask, *how)
    operands = _given(x=x, offset=offset, mask=mask, w=w, bias=None if bias is None else bias.contiguous(), y=y)
    recovery.run(make, partial(_written, operands))
    return y


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
    """dx, which is written."""
    if dx.numel() == 0 or dy.numel() == 0:
        return dx.zero_()
    make = partial(plan, DeformRole.INPUT, dx, w, dy, offset, mask, geometry, offset_groups, precision, device)
    recovery.run(make, partial(_written, _given(offset=offset, mask=mask, w=w, y=dy, x=dx)))
    return dx


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
    offset, doffset = _with_gradient(offset)
    mask, dmask = (None, None) if mask is None else _with_gradient(mask)
    if doffset.numel() == 0 or x.numel() == 0 or dy.numel() == 0:
        return doffset.zero_(), None if dmask is None else dmask.zero_()
    make = partial(plan, DeformRole.OFFSET, x, w, dy, offset, mask, geometry, offset_groups, precision, device)
    recovery.run(
        make, partial(_written, _given(x=x, offset=offset, mask=mask, w=w, y=dy, doffset=doffset, dmask=dmask))
    )
    return doffset, dmask


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
    """dw, which is written: dense, in any memory format."""
    if dw.numel() == 0 or x.numel() == 0 or dy.numel() == 0:
        return dw.zero_()
    make = partial(plan, DeformRole.WEIGHT, x, dw, dy, offset, mask, geometry, offset_groups, precision, device)
    recovery.run(make, partial(_written, _given(x=x, offset=offset, mask=mask, y=dy, w=dw)))
    return dw


def plan(
    role: DeformRole,
    x: Tensor,
    w: Tensor,
    y: Tensor,
    offset: Tensor,
    mask: Tensor | None,
    geometry: ConvGeometry,
    offset_groups: int,
    precision: str | None,
    device: Device,
    has_bias: bool = False,
) -> DeformPlan:
    """The plan of a role for tensors, real or fake; gradients stand for what they are gradients of."""
    dtype = str(x.dtype).removeprefix("torch.")
    problem = DeformProblem(
        role,
        geometry,
        offset_groups,
        dtype,
        (precision or default_precision()) if dtype == "float32" else "ieee",
        Strides(_strides(x), _strides(w), _strides(y)),
        _strides(offset),
        () if mask is None else _strides(mask),
        has_bias,
        device,
        str(offset.dtype).removeprefix("torch."),
    )
    return deform_plan.make(problem)


def _written(tensors: dict[str, Tensor], p: DeformPlan) -> None:
    run(p, tensors)


def run(p: DeformPlan, tensors: dict[str, Tensor]) -> None:
    """Writes what a plan is for, on the operands of its role by name: x, offset, mask, w, bias, y, doffset, dmask."""
    with _on_device(tensors["offset"].device):
        taken = laid(p, tensors)
        launched(p, taken)
        if p.role is DeformRole.WEIGHT and "w" in p.packs:
            tensors["w"].copy_(taken["w"])


def laid(p: DeformPlan, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors as the plan's kernels take them."""
    return tensors | {name: tensors[name].contiguous(memory_format=torch.channels_last) for name in p.packs}


def launched(p: DeformPlan, tensors: dict[str, Tensor]) -> None:
    """The plan's kernels on tensors that are laid so, and for an input gradient the sort between them."""
    if p.role is not DeformRole.INPUT:
        if p.slabs_shape:
            dtype = getattr(torch, p.dtypes["workspace"])
            tensors = tensors | {"workspace": tensors["w"].new_empty(p.slabs_shape, dtype=dtype)}
        for launch in p.direct:
            launch.run(tensors)
        return
    cells, contributions = p.direct
    (lists, pixels, ends), offset = p.lists_shape, tensors["offset"]
    keys = torch.empty((lists, pixels), dtype=torch.int32, device=offset.device)
    cells.run({"offset": offset, "cells": keys})
    keys, order = keys.sort(dim=1, stable=True)
    numbers = torch.arange(ends, dtype=torch.int32, device=offset.device).repeat(lists, 1)
    first = torch.searchsorted(keys, numbers, out_int32=True)
    contributions.run(tensors | {"order": order, "first": first})


def _given(**tensors: Tensor | None) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in tensors.items() if tensor is not None}


def _with_gradient(t: Tensor) -> tuple[Tensor, Tensor]:
    """(a dense tensor of the same numbers, an uninitialised one of the same strides)."""
    gradient = torch.empty_like(t)
    return t if gradient.stride() == t.stride() else torch.empty_like(t).copy_(t), gradient
