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
from .reference import wide_of


class _Tap(NamedTuple):
    """Where one tap samples: the four pixels around each position, of which the second and the last lie to the right.

    rows: those of the pixels in the image, (4, N, OG, PQ). lower, right: how far positions are from the first pixel,
    (N, OG, PQ, 1).
    """

    rows: Tensor
    lower: Tensor
    right: Tensor

    def weights(self) -> Tensor:
        """Of the pixels in a sample, (4, N, OG, PQ, 1)."""
        upper, left = 1 - self.lower, 1 - self.right
        return torch.stack((upper * left, upper * self.right, self.lower * left, self.lower * self.right))

    def slopes(self) -> tuple[Tensor, Tensor]:
        """Of these weights as the position moves down, and to the right."""
        upper, left = 1 - self.lower, 1 - self.right
        down = torch.stack((-left, -self.right, left, self.right))
        return down, torch.stack((-upper, upper, -self.lower, self.lower))

    def pixels(self, image: Tensor) -> Tensor:
        """(4, N, OG, PQ, C / OG). The gradient of an embedding is summed in the same order every time, on GPUs too."""
        return functional.embedding(self.rows, image)


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
    wide = wide_of(x.dtype)
    image, filters = _rows(x.to(wide), offset_groups), _filters(w.to(wide), geometry)
    scales = _scales(mask, geometry, offset_groups, wide)
    sums = None
    for i, tap in enumerate(_taps(offset.to(wide), geometry, offset_groups)):
        samples = (tap.weights() * tap.pixels(image)).sum(0)
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
    g, wide = geometry, wide_of(x.dtype)
    image, filters = _rows(x.to(wide), offset_groups), _filters(w.to(wide), g)
    scales = _scales(mask, g, offset_groups, wide)
    given = dy.to(wide).reshape(g.N, g.groups, g.K // g.groups, g.output[1] * g.output[2])
    to_x, to_offset, to_mask, to_w = wanted
    dimage, moves, dscales, dfilters = None, [], [], []
    for i, tap in enumerate(_taps(offset.to(wide), g, offset_groups)):
        pixels, weights = tap.pixels(image), tap.weights()
        samples = (weights * pixels).sum(0)
        if to_w:
            scaled = samples if scales is None else scales[i] * samples
            dfilters.append(torch.einsum("ngkp,ngpc->gkc", given, _grouped(scaled, g)))
        dsamples = _by_offset_group(torch.einsum("ngkp,gkc->ngpc", given, filters[i]), g, offset_groups)
        if to_mask and scales is not None:
            dscales.append((dsamples * samples).sum(3))
        if scales is not None:
            dsamples = scales[i] * dsamples
        if to_offset:
            moves += [(dsamples * (slope * pixels).sum(0)).sum(3) for slope in tap.slopes()]
        if to_x:
            part = _put(tap.rows, weights * dsamples, image)
            dimage = part if dimage is None else dimage + part
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
            y, lower = _between(moves[:, :, r * S + s, 0], g, 1, r)
            x, right = _between(moves[:, :, r * S + s, 1], g, 2, s)
            rows = []
            for dy, dx in ((0, 0), (0, 1), (1, 0), (1, 1)):
                inside = (y >= -dy) & (y < H - dy) & (x >= -dx) & (x < W - dx)
                there = torch.where(inside, (y + dy) * W + x + dx, 0).long()
                rows.append(torch.where(inside, images + there, g.N * offset_groups * H * W))
            yield _Tap(torch.stack(rows).flatten(3), *(t.flatten(2).unsqueeze(3) for t in (lower, right)))


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
