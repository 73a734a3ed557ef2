"""Kernels of deformable convolutions, against a direct definition in float64."""

from typing import NamedTuple

import pytest
import torch

from triton_conv import check, deform_run, execute
from triton_conv.geometry import ConvGeometry

HALF, BRAIN, SINGLE, DOUBLE = torch.float16, torch.bfloat16, torch.float32, torch.float64


class Case(NamedTuple):
    """A problem: x is N C H W, w is K C/groups R S."""

    x: tuple[int, int, int, int] = (2, 4, 5, 6)
    w: tuple[int, int, int, int] = (6, 4, 3, 2)
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (1, 1)
    dilation: tuple[int, int] = (1, 1)
    offset_groups: int = 1
    mask: bool = True
    bias: bool = True
    spread: float = 1.0
    last: bool = True
    dtype: torch.dtype = DOUBLE
    precision: str = "ieee"

    @property
    def geometry(self) -> ConvGeometry:
        padding = [(side, side) for side in self.padding]
        return ConvGeometry.forward(self.x, self.w, self.stride, padding, self.dilation, groups=self.x[1] // self.w[1])


def definition(x, offset, w, mask, bias, case):
    """y by a sum over taps of samples, each of which is a sum over four corners."""
    g, OG = case.geometry, case.offset_groups
    (N, C, H, W), (K, _, R, S), (_, P, Q) = case.x, case.w, g.output
    x = torch.nn.functional.pad(x, (1, 1, 1, 1)).view(N, OG, C // OG, H + 2, W + 2)  # zeros around it
    image, group = torch.arange(N).view(N, 1, 1, 1), torch.arange(OG).view(1, OG, 1, 1)
    y = torch.zeros(N, K, P, Q, dtype=x.dtype)
    for r in range(R):
        for s in range(S):
            d = offset.view(N, OG, R, S, 2, P, Q)[:, :, r, s]
            h = d[:, :, 0] + (torch.arange(P) * case.stride[0] - case.padding[0] + r * case.dilation[0]).view(P, 1)
            v = d[:, :, 1] + torch.arange(Q) * case.stride[1] - case.padding[1] + s * case.dilation[1]
            samples = 0
            for up in (0, 1):
                for right in (0, 1):
                    row, column = h.detach().floor() + up, v.detach().floor() + right
                    weight = (1 - (h - row).abs()) * (1 - (v - column).abs())  # N OG P Q
                    row, column = ((t + 1).clamp(0, n + 1).long() for t, n in ((row, H), (column, W)))
                    samples = samples + weight.unsqueeze(-1) * x[image, group, :, row, column]  # N OG P Q C/OG
            if mask is not None:
                samples = samples * mask.view(N, OG, R, S, P, Q)[:, :, r, s].unsqueeze(-1)
            samples = samples.permute(0, 1, 4, 2, 3).reshape(N, g.groups, C // g.groups, P, Q)
            tap = w[:, :, r, s].view(g.groups, K // g.groups, C // g.groups)
            y = y + torch.einsum("ngcpq,gkc->ngkpq", samples, tap).reshape(N, K, P, Q)
    return y if bias is None else y + bias[:, None, None]


def operands(case, seed=0):
    generator = torch.Generator().manual_seed(seed)

    def random(*shape):
        return torch.randn(shape, generator=generator, dtype=DOUBLE)

    g, taps = case.geometry, case.w[2] * case.w[3]
    P, Q = g.output[1:]
    offset = case.spread * random(case.x[0], 2 * case.offset_groups * taps, P, Q)
    mask = random(case.x[0], case.offset_groups * taps, P, Q) if case.mask else None
    made = random(*case.x), offset, random(*case.w), mask, random(case.w[0]) if case.bias else None
    made = (*made, random(case.x[0], case.w[0], P, Q))
    return [laid(t, case) for t in made]


def laid(t, case):
    t = t if t is None else t.to(case.dtype)
    return t.contiguous(memory_format=torch.channels_last) if t is not None and t.dim() == 4 and case.last else t


def computed(case, x, offset, w, mask, bias, dy):
    """y and all gradients but bias', by kernels."""
    device = execute.device_of(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    x, offset, w, mask, bias, dy = (
        t if t is None or not torch.cuda.is_available() else t.cuda() for t in (x, offset, w, mask, bias, dy)
    )
    how = (case.geometry, case.offset_groups, case.precision, device)
    y = deform_run.forward(x, offset, w, mask, bias, *how, torch.empty_like(dy))
    dx = deform_run.input_gradient(dy, offset, w, mask, *how, torch.empty_like(x))
    doffset, dmask = deform_run.offset_gradients(dy, x, offset, w, mask, *how)
    dw = deform_run.weight_gradient(dy, x, offset, mask, *how, torch.empty_like(w))
    return {"y": y, "dx": dx, "doffset": doffset, "dmask": dmask, "dw": dw}


def wanted(case, x, offset, w, mask, bias, dy):
    leaves = [t if t is None else t.to(DOUBLE).detach().requires_grad_() for t in (x, offset, w, mask, bias)]
    y = definition(*leaves, case)
    there = [t for t in leaves[:4] if t is not None]
    grads = iter(torch.autograd.grad(y, there, dy.to(DOUBLE)))
    dx, doffset, dw = next(grads), next(grads), next(grads)
    return {"y": y.detach(), "dx": dx, "doffset": doffset, "dmask": next(grads) if case.mask else None, "dw": dw}


def depths(case):
    """How many products sum up to an element of each result."""
    g, (_, P, Q) = case.geometry, case.geometry.output
    K, C = g.K // g.groups, g.C // g.groups
    over = g.C // case.offset_groups * K * 4
    return {"y": C * g.taps * 4, "dx": K * g.taps * 16, "doffset": over, "dmask": over, "dw": g.N * P * Q * 4}


def compare(case, given):
    got, want = computed(case, *given), wanted(case, *given)
    for name, depth in depths(case).items():
        if want[name] is None:
            assert got[name] is None
            continue
        assert got[name].dtype is case.dtype and got[name].shape == want[name].shape
        error = (got[name].cpu().to(DOUBLE) - want[name]).abs()
        # samples are rounded to the operands' dtype before they are multiplied
        rounded = torch.finfo(case.dtype).eps * depth**0.5 * want[name].abs().amax()
        allowed = check.tolerance(want[name], depth, case.dtype, case.precision, given[0].device) + rounded
        worst = (error - allowed).argmax()
        assert (error <= allowed).all(), (name, float(error.flatten()[worst]), float(allowed.flatten()[worst]))
    return got


@pytest.mark.parametrize("case", [Case(), Case(last=False)])
def test_first(case, kernels, poisoned):
    compare(case, operands(case))
