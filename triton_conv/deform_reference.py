"""Deformable convolution and its gradients in plain torch, on any device, differentiable any number of times.

This is what runs on a CPU, and what gradients of gradients are taken of. It goes tap by tap, so that no more than one
tap's samples lie in memory at a time. Sums are float32, in float64 float64.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from .geometry import ConvGeometry
from .reference import _wide


class _Tap(NamedTuple):
    """Where one tap samples: for each of N, offset groups and PQ, four corners of a pixel and how far it is between.

    rows: of the corners (upper left, upper right, lower left, lower right), in the image's rows. fractions: from the
    upper corners and from the left ones, (N, OG, PQ, 1).
    """

    rows: tuple[Tensor, Tensor, Tensor, Tensor]
    fractions: tuple[Tensor, Tensor]

    def weights(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        lower, right = self.fractions
        upper, left = 1 - lower, 1 - right
        return upper * left, upper * right, lower * left, lower * right

    def corners(self, image: Tensor) -> tuple[Tensor, ...]:
        """(N, OG, PQ, C / OG) each. The gradient of an embedding sums in the same order every time, on a GPU too."""
        return tuple(functional.embedding(r, image) for r in self.rows)


def forward(
    x: Tensor,
    offset: Tensor,
    w: Tensor,
    mask: Tensor | None,
    bias: Tensor | None,
    geometry: ConvGeometry,
    offset_groups: int,
) -> Tensor:
    """y (N, K, P, Q), not yet rounded to the dtype of x."""
    wide = _wide(x.dtype)
    image, filters = _rows(x.to(wide), offset_groups), _filters(w.to(wide), geometry)
    scales = _scales(mask, geometry, offset_groups, wide)
    sums = None
    for i, tap in enumerate(_taps(offset.to(wide), geometry, offset_groups)):
        samples = _sum(a * v for a, v in zip(tap.weights(), tap.corners(image), strict=True))
        if scales is not None:
            samples = scales[i] * samples
        products = torch.einsum("ngpc,gkc->ngkp", _grouped(samples, geometry), filters[i])
        sums = products if sums is None else sums + products
    assert sums is not None
    _, P, Q = geometry.output
    y = sums.reshape(geometry.N, geometry.K, P, Q)
    return y if bias is None else y + bias.to(wide).view(1, -1, 1, 1)


def gradients(
    dy: Tensor,
    x: Tensor,
    offset: Tensor,
    w: Tensor,
    mask: Tensor | None,
    geometry: ConvGeometry,
    offset_groups: int,
    wanted: Sequence[bool] = (True, True, True, True),
) -> tuple[Tensor | None, ...]:
    """Those of x, offset, mask and w as far as wanted, not yet rounded; None for the others."""
    g, wide = geometry, _wide(x.dtype)
    image, filters = _rows(x.to(wide), offset_groups), _filters(w.to(wide), g)
    scales = _scales(mask, g, offset_groups, wide)
    given = dy.to(wide).reshape(g.N, g.groups, g.K // g.groups, g.output[1] * g.output[2])
    to_x, to_offset, to_mask, to_w = wanted
    dimage, moves, dscales, dfilters = None, [], [], []
    for i, tap in enumerate(_taps(offset.to(wide), g, offset_groups)):
        corners, weights = tap.corners(image), tap.weights()
        samples = _sum(a * v for a, v in zip(weights, corners, strict=True))
        if to_w:
            scaled = samples if scales is None else scales[i] * samples
            dfilters.append(torch.einsum("ngkp,ngpc->gkc", given, _grouped(scaled, g)))
        dsamples = _by_offset_group(torch.einsum("ngkp,gkc->ngpc", given, filters[i]), g, offset_groups)
        if to_mask and scales is not None:
            dscales.append((dsamples * samples).sum(3))
        if scales is not None:
            dsamples = scales[i] * dsamples
        if to_offset:
            (a, b, c, d), (lower, right) = corners, tap.fractions
            down = (1 - right) * (c - a) + right * (d - b)
            along = (1 - lower) * (b - a) + lower * (d - c)
            moves += [(dsamples * down).sum(3), (dsamples * along).sum(3)]
        if to_x:
            parts = [_put(r, a * dsamples, image) for r, a in zip(tap.rows, weights, strict=True)]
            dimage = _sum(parts if dimage is None else [dimage, *parts])
    return (
        None if dimage is None else _image(dimage, g, offset_groups),
        _stacked(moves, g) if to_offset else None,
        _stacked(dscales, g) if dscales else None,
        torch.stack(dfilters, 3).reshape(w.shape) if to_w else None,
    )


def _taps(offset: Tensor, g: ConvGeometry, offset_groups: int) -> Iterator[_Tap]:
    (_, H, W), (_, R, S), (_, P, Q) = g.input, g.filter, g.output
    moves = offset.reshape(g.N, offset_groups, R * S, 2, P, Q)
    images = torch.arange(g.N * offset_groups, device=offset.device).view(g.N, offset_groups, 1, 1) * (H * W)
    for r in range(R):
        for s in range(S):
            y, below = _between(moves[:, :, r * S + s, 0], g, 1, r)
            x, beside = _between(moves[:, :, r * S + s, 1], g, 2, s)
            rows = []
            for dy in (0, 1):
                for dx in (0, 1):
                    inside = (y >= -dy) & (y < H - dy) & (x >= -dx) & (x < W - dx)
                    there = torch.where(inside, (y + dy) * W + x + dx, 0).long()
                    rows.append(torch.where(inside, images + there, g.N * offset_groups * H * W).flatten(2))
            a, b, c, d = rows
            yield _Tap((a, b, c, d), (below.flatten(2).unsqueeze(3), beside.flatten(2).unsqueeze(3)))


def _between(move: Tensor, g: ConvGeometry, axis: int, tap: int) -> tuple[Tensor, Tensor]:
    """The pixel below the positions of a tap on an axis, and how far they are from it; of 0 outside the image."""
    first = tap * g.dilation[axis] - g.padding[axis][0]
    places = torch.arange(g.output[axis], device=move.device, dtype=move.dtype) * g.stride[axis] + first
    position = move + (places.unsqueeze(1) if axis == 1 else places)
    pixel = position.detach().floor()
    outside = (position < -1) | (position >= g.input[axis])  # infinity has no fraction; NaN is to stay NaN
    return pixel, torch.where(outside, 0, position - pixel)


def _rows(x: Tensor, offset_groups: int) -> Tensor:
    """(N * OG * H * W, C / OG), and a row of zeros, which is what lies outside of the image."""
    N, C, H, W = x.shape
    rows = x.reshape(N, offset_groups, C // offset_groups, H * W).transpose(2, 3)
    return functional.pad(rows.reshape(-1, C // offset_groups), (0, 0, 0, 1))


def _image(rows: Tensor, g: ConvGeometry, offset_groups: int) -> Tensor:
    _, H, W = g.input
    return rows[:-1].reshape(g.N, offset_groups, H * W, g.C // offset_groups).transpose(2, 3).reshape(g.N, g.C, H, W)


def _put(rows: Tensor, values: Tensor, image: Tensor) -> Tensor:
    """The transpose of an embedding."""
    return torch.ops.aten.embedding_dense_backward(values, rows, image.shape[0], -1, False)


def _filters(w: Tensor, g: ConvGeometry) -> list[Tensor]:
    """Those of each tap: (groups, K / groups, C / groups)."""
    return list(w.flatten(2).unflatten(0, (g.groups, g.K // g.groups)).unbind(3))


def _scales(mask: Tensor | None, g: ConvGeometry, offset_groups: int, wide: torch.dtype) -> list[Tensor] | None:
    """Those of each tap: (N, OG, PQ, 1)."""
    if mask is None:
        return None
    return list(mask.to(wide).flatten(2).unsqueeze(3).unflatten(1, (offset_groups, g.taps)).unbind(2))


def _grouped(samples: Tensor, g: ConvGeometry) -> Tensor:
    """(N, OG, PQ, C / OG) as (N, groups, PQ, C / groups)."""
    return samples.transpose(1, 2).flatten(2).unflatten(2, (g.groups, g.C // g.groups)).transpose(1, 2)


def _by_offset_group(samples: Tensor, g: ConvGeometry, offset_groups: int) -> Tensor:
    """And back."""
    return samples.transpose(1, 2).flatten(2).unflatten(2, (offset_groups, g.C // offset_groups)).transpose(1, 2)


def _stacked(values: Sequence[Tensor], g: ConvGeometry) -> Tensor:
    """(N, OG, PQ) of each channel of an offset group, as (N, channels, P, Q)."""
    return torch.stack(tuple(values), 2).flatten(1, 2).unflatten(2, g.output[1:])


def _sum(parts) -> Tensor:
    first, *rest = parts
    for p in rest:
        first = first + p
    return first
