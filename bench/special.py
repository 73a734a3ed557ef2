"""Where infinities and NaN go, kernel by kernel, what overflows, and activations at their corners.

One value that is not finite is put somewhere into one operand. Outputs that a tap connects to it become what plain
PyTorch makes of them in float64; of the others those stay finite that `Layer.beyond` does not name, which is the table
under "Special values" in the README. Interpreted kernels lose denormals of bfloat16, which are left out.
"""

from __future__ import annotations

import random
from math import inf, nan
from typing import Any

import torch
from torch import Tensor

import triton_conv
from triton_conv import activation, config, reference
from triton_conv.geometry import Role

from .special_layers import ALL, BRAIN, CHANNEL, DOUBLE, FILTER, HALF, LAYERS, SINGLE, Layer

FLOATS = (SINGLE, HALF, BRAIN, DOUBLE)


def results(function, operands, without: str = "") -> dict[str, Tensor]:
    """The output "y" and the gradients, each called "d" and its operand's name; those that an operand does not reach
    are left out: its own gradient, and that of "dy" is the output."""
    leaves = {name: t.detach().requires_grad_(name != without) for name, t in operands.items() if name != "dy"}
    y = function(**leaves)
    wanted = {name: t for name, t in leaves.items() if t.requires_grad and y.requires_grad and without != "bias"}
    found = torch.autograd.grad(y, list(wanted.values()), operands["dy"]) if wanted else ()
    gradients = {f"d{name}": t for name, t in zip(wanted, found, strict=True)}
    return gradients if without == "dy" and gradients else {"y": y.detach(), **gradients}


def laid_out(t: Tensor, last: bool) -> Tensor:
    if last and t.dim() == 3:
        return t.transpose(1, 2).contiguous().transpose(1, 2)
    formats = {4: torch.channels_last, 5: torch.channels_last_3d}
    return t.contiguous(memory_format=formats[t.dim()]) if last and t.dim() in formats else t.contiguous()


def spread(mask: Tensor, how: str) -> Tensor:
    if how == ALL:  # also where a tap connects it to nothing
        return torch.ones_like(mask)
    axes = range(mask.dim())
    found = {CHANNEL: [a for a in axes if a != 1], FILTER: axes[min(2, mask.dim() - 1) :], "": ()}[how]
    return mask.any(tuple(found), keepdim=True).expand_as(mask) if found else mask


def connected(layer: Layer, values: dict[str, Tensor], name: str, position: tuple[int, ...]) -> dict[str, Tensor]:
    """Which elements of which outputs a tap connects to this element; all are linear in each operand."""

    def ones(t: Tensor, of: str) -> Tensor:
        return t if of in layer.fixed else torch.ones_like(t)

    plain = {of: ones(t, of) for of, t in values.items()}
    without, beside = dict(plain), dict(plain)
    without[name] = torch.zeros_like(values[name])
    beside[name] = without[name].clone()
    beside[name][position] = 1
    first, second = (results(layer.theirs, d, name) for d in (without, beside))
    return {of: first[of] != second[of] for of in first}


def drawn(layer: Layer, generator: torch.Generator) -> dict[str, Tensor]:
    """Operands and the output's gradient, in the layer's dtype; none is zero."""

    def random_of(shape) -> Tensor:
        t = torch.randn(shape, generator=generator, dtype=DOUBLE)
        return (t + t.sign() * 0.1).to(layer.dtype)

    values = {name: random_of(shape) for name, shape in layer.shapes.items()}
    y = layer.theirs(**{name: t.double() for name, t in values.items()})
    return {**values, "dy": random_of(y.shape)}


def escapes(name: str, where: torch.device, seed: int = 0) -> list[str]:
    """What a value that is not finite does in a layer that it should not, in words.

    >>> escapes("pointwise", torch.device("cpu"))
    []
    """
    layer, rng, wrong = LAYERS[name], random.Random(f"{name} {seed}"), []
    values = drawn(layer, torch.Generator().manual_seed(seed))
    for operand in values:
        if operand in layer.fixed:
            continue
        position = tuple(rng.randrange(n) for n in values[operand].shape)
        given = {of: t.clone() for of, t in values.items()}
        given[operand][position] = rng.choice((inf, -inf, nan))
        on_device = {of: laid_out(t.to(where), layer.last) for of, t in given.items()}
        with config.explicit(_tiles(layer, where)):
            got = results(layer.ours, on_device, operand)
        want = results(layer.theirs, {of: t.double() for of, t in given.items()}, operand)
        reached = connected(layer, {of: t.double() for of, t in values.items()}, operand, position)
        for output in got:
            found, right, mine = got[output].cpu().double(), want[output], reached[output]
            beyond = layer.beyond.get((operand, output), "")
            allowed = spread(mine, beyond)
            faults = {
                "stays finite": (mine & found.isfinite()).any(),
                "goes too far": (~allowed & ~found.isfinite()).any(),
                "is another value": not beyond
                and not torch.equal(found[mine].nan_to_num(0), right[mine].nan_to_num(0)),
                "changes others": not _close(found[~allowed], right[~allowed], layer.dtype),
            }
            what = f"{float(given[operand][position])} at {operand}{list(position)} in {output}"
            wrong += [f"{what} {fault}" for fault, there in faults.items() if there]
    return wrong


def _tiles(layer: Layer, where: torch.device) -> dict[Role, Any]:
    """The layer's own, which GPUs before Hopper may not have kernels for."""
    old = where.type == "cuda" and torch.cuda.get_device_capability(where) < (9, 0)
    return {} if old else dict(layer.tiles)


def _close(found: Tensor, right: Tensor, dtype: torch.dtype) -> bool:
    """As far as what is between two kernels, and TF32, leave them; `triton-conv check` is for tolerances."""
    eps = max(torch.finfo(dtype).eps, 2.0**-9)
    return bool(((found - right).abs() <= eps * (2 * right.abs() + 50)).all())


def overflows(name: str, where: torch.device) -> list[str]:
    """Outputs that are infinite in float16 and should not be, or should be and are not, though products always are.

    >>> overflows("transposed", torch.device("cpu"))
    []
    """
    layer, wrong = LAYERS[name]._replace(dtype=HALF), []
    values = drawn(layer, torch.Generator().manual_seed(3))
    for large, small in (("x", "w"), ("dy", "w"), ("dy", "x")):
        given = {of: t.clone() for of, t in values.items()}
        given[large] = (given[large] * 3e4).clamp(-6e4, 6e4)  # sums of them are beyond float16
        given[small] *= 1e-4
        with config.explicit(_tiles(layer, where)):
            got = results(layer.ours, {of: laid_out(t.to(where), layer.last) for of, t in given.items()})
        want = results(layer.theirs, {of: t.double() for of, t in given.items()})
        for output, right in want.items():
            clear = (right.abs() < 6.5e4) | (right.abs() > 6.6e4)  # of the largest float16
            found, rounded = got[output].cpu()[clear], right.to(HALF)[clear]
            if found.isnan().any() or not torch.equal(
                found.clamp(-1, 1)[found.isinf()], rounded.sign()[rounded.isinf()]
            ):
                wrong.append(f"{output} of large {large}")
    return wrong


def denormals(dtype: torch.dtype, groups: int, where: torch.device) -> list[str]:
    """What becomes of denormals in sums of 16 / groups of them, forward and in both gradients."""
    tiny, count = torch.finfo(dtype).smallest_normal, 16 // groups
    x = laid_out(torch.full((1, 16, 3, 4), tiny / 4, dtype=dtype, device=where), True)
    w = laid_out(torch.ones(16, count, 1, 1, dtype=dtype, device=where), True)
    x, w = (t.requires_grad_() for t in (x, w))
    y = triton_conv.conv2d(x, w, groups=groups, activation="relu", precision="ieee" if dtype is SINGLE else None)
    dx, dw = torch.autograd.grad(y, (x, w), torch.full_like(y, tiny / 8))
    expected = {"y": (y, tiny / 4 * count), "dx": (dx, tiny / 8 * count), "dw": (dw, 0)}
    return [f"{name} is {float(t.flatten()[0])}, not {v}" for name, (t, v) in expected.items() if not (t == v).all()]


def points(dtype: torch.dtype) -> Tensor:
    """Around zero, the corners of activations, where exponentials overflow, and the largest."""
    limits = torch.finfo(dtype)
    near = [0.0, limits.smallest_normal, 0.5, 1, 2.5, 3, 6, 6.5, 20, 87, 88.5, 89, 104, 300, 710, 746, 1e4, limits.max]
    if dtype is not BRAIN:  # whose denormals interpreted kernels lose
        near.append(limits.smallest_normal / 4)
    return torch.tensor([s * v for v in (*near, inf) for s in (1, -1)] + [nan], dtype=DOUBLE).to(dtype)


def same(found: Tensor, right: Tensor, dtype: torch.dtype) -> Tensor:
    """Alike where both are infinite or NaN, else to a few roundings, in float32, of the larger of 1 and the result."""
    eps = 4 * torch.finfo(dtype).eps
    near = (found - right).abs() <= eps * right.abs().clamp(min=1)
    return torch.where(right.isfinite(), near, (found == right) | (found.isnan() & right.isnan()))


def corners(name: str, dtype: torch.dtype, where: torch.device) -> list[str]:
    """Where an activation in a kernel, or the kernel of its gradient, is not what PyTorch has in float64.

    Four things are known: beyond a sixth of the largest number hardswish overflows, and in float32 the cube of z in the
    slope of gelu_tanh, both as in PyTorch; at NaN the slope of hardswish is NaN, of which PyTorch makes 1.
    """
    x = points(dtype)
    one = torch.ones(1, 1, 1, 1, dtype=dtype)
    y = triton_conv.conv2d(x.view(1, 1, 1, -1).to(where), one.to(where), activation=name).flatten().cpu()
    z = x.double().requires_grad_()
    want = reference.activated(z, name)
    (slope,) = torch.autograd.grad(want, z, torch.ones_like(z))
    dz = activation.backward(torch.ones_like(x).to(where), x.to(where), name, 0.01, False).cpu()
    extreme = (x.abs() == torch.finfo(dtype).max) & (dtype is not HALF)
    right = same(y.double(), want.detach().to(dtype).double(), dtype)
    right |= (name == "hardswish") & extreme & (y == inf)
    wrong = [f"{name}({float(v)}) is {float(found)}" for v, found in zip(x[~right], y[~right], strict=True)]
    right = same(dz.double(), slope.to(dtype).double(), dtype)
    right |= (name == "gelu_tanh") & extreme & dz.isnan()
    right |= (name == "hardswish") & x.isnan() & dz.isnan()
    return wrong + [f"{name}'({float(v)}) is {float(found)}" for v, found in zip(x[~right], dz[~right], strict=True)]
