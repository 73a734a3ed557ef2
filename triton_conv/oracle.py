"""What a convolution should be, by torch.nn.functional in float64: nothing here shares a formula with the package."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from .cases import INTEGERS, QUANTITIES, Case, Operands, differentiate


def expected(case: Case, operands: Operands, quantities: Sequence[str] = QUANTITIES) -> dict[str, Tensor]:
    """The output and the gradients asked for, by PyTorch in float64 or complex128 on the CPU.

        >>> case = Case.of(4, 2, N=1, C=1, K=1, bias=False)
        >>> x, w = torch.arange(4.0).view(1, 1, 4), torch.ones(1, 1, 2)
        >>> expected(case, Operands(x, w, None, torch.ones(1, 1, 3)))["y"]
        tensor([[[1., 3., 5.]]], dtype=torch.float64)

    Integers are computed in float64, which is exact for the values of `Case.operands`, and come back in the case's
    dtype, wrapped. Zero padding of transposed convolutions is PyTorch's; their other modes, which PyTorch lacks, are
    what autograd gives for the input gradient of the padded forward convolution.
    """
    wide = torch.complex128 if case.dtype.is_complex else torch.float64
    doubles = Operands(*[None if t is None else t.detach().to("cpu", wide) for t in operands])  # type: ignore[arg-type]
    wanted = [name for name in case.quantities() if name in quantities]
    results = differentiate(lambda x, w, bias: convolved(case, x, w, bias), doubles, wanted)
    if case.dtype in INTEGERS:
        return {name: t.to(torch.int64).to(case.dtype) for name, t in results.items()}
    return results


def convolved(case: Case, x: Tensor, w: Tensor, bias: Tensor | None) -> Tensor:
    """The convolution of a case by PyTorch, in the dtype of the tensors; autograd can follow it."""
    return (_torch_transposed if case.transposed else _torch_forward)(case, x, w, bias)


def _torch_forward(case: Case, x: Tensor, w: Tensor, bias: Tensor | None) -> Tensor:
    function = getattr(torch.nn.functional, f"conv{case.rank}d")
    for axis, (pair, mode) in enumerate(zip(case.padding, case.modes, strict=True), start=2):
        x = padded_axis(x, axis, pair, mode)
    if x.shape[1] == 0:  # PyTorch answers with the wrong shape; a channel of zeros adds nothing
        x = torch.cat([x, x.new_zeros(x.shape[0], 1, *x.shape[2:])], dim=1)
        w = torch.cat([w, w.new_zeros(w.shape[0], 1, *w.shape[2:])], dim=1)
    return function(x, w, bias, case.stride, 0, case.dilation, case.groups)


def _torch_transposed(case: Case, x: Tensor, w: Tensor, bias: Tensor | None) -> Tensor:
    zeros = all(mode == "zeros" or pair == (0, 0) for pair, mode in zip(case.padding, case.modes, strict=True))
    if zeros or case.N == 0:
        function = getattr(torch.nn.functional, f"conv_transpose{case.rank}d")
        # PyTorch takes one padding for both sides: the smaller one, and the rest is cut away
        both = [min(pair) for pair in case.padding]
        y = function(x, w, bias, case.stride, both, case.output_padding, case.groups, case.dilation)
        for axis, ((lower, upper), taken) in enumerate(zip(case.padding, both, strict=True), start=2):
            y = y.narrow(axis, lower - taken, y.shape[axis] - (lower - taken) - (upper - taken))
        return y
    image = x.new_zeros(case.N, case.K, *case.output_spatial, requires_grad=True)
    forward = replace(case, transposed=False, C=case.K, K=case.C, spatial=case.output_spatial)
    y = _torch_forward(forward, image, w.conj(), None)
    for axis, extent in enumerate(case.spatial, start=2):
        y = y.narrow(axis, 0, extent)
    # the graph is needed for the gradients of this gradient, and x must be part of it even where it needs none
    with torch.enable_grad():
        (result,) = torch.autograd.grad(y, image, x, create_graph=True)
    return result if bias is None else result + bias.view(1, -1, *(1,) * case.rank)


def padded_axis(x: Tensor, axis: int, pair: tuple[int, int], mode: str) -> Tensor:
    """One axis padded by torch.nn.functional.pad, which knows each mode for the last axis of a 3-D tensor."""
    rows = x.movedim(axis, -1)
    flat = rows.reshape(-1, 1, rows.shape[-1])
    flat = torch.nn.functional.pad(flat, pair, mode="constant" if mode == "zeros" else mode)
    return flat.reshape(*rows.shape[:-1], flat.shape[-1]).movedim(-1, axis)
