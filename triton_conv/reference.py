"""The three primitives in plain torch, on any device and dtype torch accepts.

This is what runs on a CPU, and, in float64, the oracle that kernels are checked against. Only zero padding,
equal on both sides, is left to `torch.convolution`; every other border is built, or summed back, by an index.
16-bit floats are computed in float32 and rounded once, which torch's own CPU convolutions do not do. Integers are
computed in int64 and narrowed, which is exact in the wrapping arithmetic torch uses.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor
from torch.nn import functional

from .epilogue import Epilogue
from .geometry import ConvGeometry, output_extent, transposed_extent


def fprop(x: Tensor, w: Tensor, bias: Tensor | None, geometry: ConvGeometry) -> Tensor:
    """y = x * w + bias, all in five dimensions: x (N, C, D, H, W), w (K, C / groups, T, R, S), bias (K)."""
    if x.is_complex():
        return complex_as_real(lambda a, b: fprop(a, b, None, geometry), x, w, bias)
    wide, dtype = wide_of(x.dtype), x.dtype
    x, inner = _with_border(x, geometry)
    if 0 in (inner.N, inner.C):
        return add_bias(x.new_zeros((inner.N, inner.K, *inner.output)), bias)
    y = torch.convolution(
        x.to(wide),
        w.to(wide),
        None if bias is None else bias.to(wide),
        inner.stride,
        _lower(inner),
        inner.dilation,
        False,
        (0, 0, 0),
        inner.groups,
    )
    z, p, q = inner.output
    return y[:, :, :z, :p, :q].to(dtype)


def low_precision_fprop(
    x: Tensor,
    w: Tensor,
    scales: tuple[Tensor, Tensor] | None,
    bias: Tensor | None,
    geometry: ConvGeometry,
    out_dtype: torch.dtype,
) -> Tensor:
    """y of 8-bit operands: x * w * scales[0] * scales[1] + bias in float32, rounded once; without scales, integers."""
    if scales is None:
        return fprop(x.to(out_dtype), w.to(out_dtype), bias, geometry)
    y = fprop(x.float(), w.float(), None, geometry) * (scales[0].reshape(()) * scales[1].reshape(()))
    return add_bias(y, None if bias is None else bias.float()).to(out_dtype)


def dgrad(dy: Tensor, w: Tensor, bias: Tensor | None, geometry: ConvGeometry) -> Tensor:
    """dx (N, C, D, H, W) from dy (N, K, Z, P, Q); with bias (C), the transposed convolution of dy."""
    if dy.is_complex():
        return complex_as_real(lambda a, b: dgrad(a, b, None, geometry), dy, w, bias)
    wide, dtype = wide_of(dy.dtype), dy.dtype
    inner = _bordered(geometry)
    padding = _lower(inner)
    if 0 in (inner.N, inner.K, inner.C):
        dx = dy.new_zeros((inner.N, inner.C, *inner.input), dtype=wide)
    else:
        dy = _with_all_outputs(dy.to(wide), inner)
        rest = [
            i - transposed_extent(o, p, p, f, s, d, 0)
            for i, o, p, f, s, d in zip(
                inner.input, dy.shape[2:], padding, inner.filter, inner.stride, inner.dilation, strict=True
            )
        ]
        dx = torch.convolution(dy, w.to(wide), None, inner.stride, padding, inner.dilation, True, rest, inner.groups)
    return add_bias(_fold_border(dx, geometry), bias).to(dtype)


def activated(t: Tensor, activation: str, slope: float = 0.01) -> Tensor:
    """An activation of `epilogue.ACTIVATIONS` by PyTorch's own function, or t itself for ""."""
    if not activation:
        return t
    if activation == "leaky_relu":
        return functional.leaky_relu(t, slope)
    if activation == "gelu_tanh":
        return functional.gelu(t, approximate="tanh")
    return torch.sigmoid(t) if activation == "sigmoid" else getattr(functional, activation)(t)


def finished(
    sums: Tensor, scale: Tensor | None, bias: Tensor | None, residual: Tensor | None, epilogue: Epilogue
) -> tuple[Tensor, Tensor]:
    """(output, what its activation is applied to) of sums (N, K, ...), in their dtype; scale and bias are (K)."""
    if scale is not None:
        sums = sums * scale.to(sums.dtype).view(1, -1, *(1,) * (sums.dim() - 2))
    y = add_bias(sums, None if bias is None else bias.to(sums.dtype))
    if residual is not None and epilogue.residual == "before":
        y = y + residual.to(y.dtype)
    out = activated(y, epilogue.activation, epilogue.slope)
    if residual is not None and epilogue.residual == "after":
        out = out + residual.to(y.dtype)
    return out, y


def wgrad(dy: Tensor, x: Tensor, geometry: ConvGeometry) -> Tensor:
    """dw (K, C / groups, T, R, S) from dy (N, K, Z, P, Q) and x (N, C, D, H, W)."""
    if x.is_complex():
        return complex_as_real(lambda a, b: wgrad(a, b, geometry), dy, x)
    size = (geometry.K, geometry.C // geometry.groups, *geometry.filter)
    if 0 in (geometry.N, geometry.C, geometry.K):
        return x.new_zeros(size)
    x, inner = _with_border(x, geometry)
    wide = wide_of(x.dtype)
    if wide is torch.int64:  # torch has no integer gradients
        return _wgrad_as_fprop(dy.to(wide), x.to(wide), inner).to(x.dtype)
    _, dw, _ = torch.ops.aten.convolution_backward(
        _with_all_outputs(dy.to(wide), inner),
        x.to(wide),
        x.new_empty(size, dtype=wide),
        None,
        inner.stride,
        _lower(inner),
        inner.dilation,
        False,
        (0, 0, 0),
        inner.groups,
        (False, True, False),
    )
    return dw.to(x.dtype)


def _wgrad_as_fprop(dy: Tensor, x: Tensor, inner: ConvGeometry) -> Tensor:
    """x convolved with dy as its filter: batch and channels change places, and so do stride and dilation."""
    groups, shape = inner.groups, inner.input
    swapped = x.unflatten(1, (groups, -1)).permute(2, 1, 0, 3, 4, 5).reshape(inner.C // groups, -1, *shape)
    dw = torch.convolution(
        swapped, dy.transpose(0, 1), None, inner.dilation, _lower(inner), inner.stride, False, (0, 0, 0), groups
    )
    t, r, s = inner.filter
    return dw[:, :, :t, :r, :s].transpose(0, 1)


def complex_as_real(
    primitive: Callable[[Tensor, Tensor], Tensor], a: Tensor, b: Tensor, bias: Tensor | None = None
) -> Tensor:
    """A bilinear primitive of complex tensors as four of real ones, without conjugation."""
    if a.dtype is torch.complex32:  # so that its four products are not each rounded, or overflow, before they are added
        wide = complex_as_real(primitive, a.to(torch.complex64), b.to(torch.complex64))
        return add_bias(wide, None if bias is None else bias.to(torch.complex64)).to(a.dtype)
    real = primitive(a.real, b.real) - primitive(a.imag, b.imag)
    imag = primitive(a.real, b.imag) + primitive(a.imag, b.real)
    return add_bias(torch.complex(real, imag), bias)


def add_bias(y: Tensor, bias: Tensor | None) -> Tensor:
    """y (N, K, ...) with bias (K) added to every position."""
    return y if bias is None else y + bias.view(1, -1, *(1,) * (y.dim() - 2))


def _with_all_outputs(dy: Tensor, inner: ConvGeometry) -> Tensor:
    """dy with zeros for those outputs that the extents allow and the geometry leaves out."""
    rest = [
        output_extent(i, p, p, f, s, d) - o
        for i, p, f, s, d, o in zip(
            inner.input, _lower(inner), inner.filter, inner.stride, inner.dilation, inner.output, strict=True
        )
    ]
    return functional.pad(dy, [v for n in reversed(rest) for v in (0, n)]) if any(rest) else dy


def wide_of(dtype: torch.dtype) -> torch.dtype:
    """What sums of products of this dtype are computed in."""
    if dtype in (torch.float16, torch.bfloat16):
        return torch.float32
    if dtype is torch.complex32:
        return torch.complex64
    integer = not dtype.is_floating_point and not dtype.is_complex and dtype is not torch.bool
    return torch.int64 if integer else dtype


def _lower(geometry: ConvGeometry) -> list[int]:
    return [lower for lower, _ in geometry.padding]


def _needs_border(geometry: ConvGeometry) -> list[bool]:
    """Per axis: is the padding anything but zeros, equal on both sides, around a full set of outputs?"""
    return [
        mode != "zeros" or lower != upper for (lower, upper), mode in zip(geometry.padding, geometry.modes, strict=True)
    ]


def _bordered(geometry: ConvGeometry) -> ConvGeometry:
    """The geometry after `_with_border`: the axes that need a border have it in their extent."""
    need = _needs_border(geometry)
    named = tuple("replicate" if n else "zeros" for n in need)
    return replace(geometry, modes=named).padded()


def _with_border(x: Tensor, geometry: ConvGeometry) -> tuple[Tensor, ConvGeometry]:
    for axis, need in enumerate(_needs_border(geometry)):
        if need:
            index, inside = _border_index(geometry, axis, x.device)
            x = x.index_select(2 + axis, index)
            if geometry.modes[axis] == "zeros":
                x = x.masked_fill(~inside.view(-1, *(1,) * (2 - axis)), 0)
    return x, _bordered(geometry)


def _fold_border(dx: Tensor, geometry: ConvGeometry) -> Tensor:
    """The transpose of `_with_border`: what fell on the border goes back where it was read."""
    for axis, need in enumerate(_needs_border(geometry)):
        if not need:
            continue
        if geometry.modes[axis] == "zeros":
            dx = dx.narrow(2 + axis, geometry.padding[axis][0], geometry.input[axis])
        else:
            index, _ = _border_index(geometry, axis, dx.device)
            shape = list(dx.shape)
            shape[2 + axis] = geometry.input[axis]
            dx = dx.new_zeros(shape).index_add(2 + axis, index, dx)
    return dx


def _border_index(geometry: ConvGeometry, axis: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """For each position of the padded axis: the position of the input it shows, and whether it lies inside."""
    (lower, upper), extent, mode = geometry.padding[axis], geometry.input[axis], geometry.modes[axis]
    position = torch.arange(-lower, extent + upper, device=device)
    inside = (position >= 0) & (position < extent)
    if mode == "circular":
        return position % max(extent, 1), inside
    if mode == "reflect":
        position = (extent - 1) - ((extent - 1) - position.abs()).abs()
    return position.clamp(0, max(extent - 1, 0)), inside
