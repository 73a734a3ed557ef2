"""Random operands of a job, what it should compute from them, and how far off a result is."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

import torch
from torch import Tensor

from triton_conv import backends, check, execute, explain
from triton_conv.geometry import Role
from triton_conv.tuning import operands as of_problems

from .jobs import Job
from .kinds import Kind
from .subjects import Operands, Subject
from .subjects import results as results_of

_MARGIN = 256  # elements around an operand, which nobody may read: NaN
_CHUNK = 2**25  # elements that are compared at a time
_TITLES = {"y": "forward", "dx": "input gradient", "dw": "weight gradient"}
_OUTPUTS = ("y", "residual")  # what lies as a convolution lays out its results
_ROUNDED_BETWEEN = 4  # steps of the dtype, of an element's usual size: each of two roundings is half of one


def shapes(job: Job) -> dict[str, tuple[int, ...]]:
    """Of input, weight, whatever else is computed from, and the output, by name: "x", "w" and so on, then "y"."""
    x, w, options = job.layer.input, job.layer.weight, job.layer.options
    if job.kind is not None:
        return {**job.kind.shapes(job.layer), "y": job.kind.output(job.layer)}
    problem = explain.problems(x, w, **options)["forward"]
    y = problem.geometry.shape("x" if problem.role is Role.DGRAD else "y")
    return {"x": x, "w": w, "y": (*y[:2], *y[5 - (len(w) - 2) :])}


def bytes_of(job: Job) -> int:
    """Of input, weight and output: every operation touches tensors of these sizes."""
    return sum(map(prod, shapes(job).values())) * job.layer.options["dtype"].itemsize


def operands(job: Job, channels_last: bool, device: torch.device, seed: int) -> Operands:
    """Standard normal ones, contiguous or channels-last, surrounded by NaN; values are a matter of the seed alone."""
    generator, dtype = torch.Generator(device).manual_seed(seed), job.layer.options["dtype"]

    def placed(name: str, shape: tuple[int, ...]) -> Tensor:
        flat = torch.full((prod(shape) + 2 * _MARGIN,), torch.nan, dtype=dtype, device=device)
        t = flat.as_strided(shape, _strides(shape, channels_last, name in _OUTPUTS), _MARGIN)
        normal = torch.randn(shape, generator=generator, dtype=dtype, device=device)
        return t.copy_(normal if job.kind is None else job.kind.drawn(job.layer, job.op, name, normal))

    placed_ones = {name: placed(name, shape) for name, shape in shapes(job).items()}
    x, w, dy = (placed_ones.pop(name) for name in ("x", "w", "y"))
    return Operands(x, w, dy, placed_ones)


def _strides(shape: tuple[int, ...], channels_last: bool, output: bool) -> tuple[int, ...]:
    """As PyTorch lays such a tensor out; extents of 1 have other strides in outputs than in what was converted."""
    t = torch.empty(shape, device="meta")
    if not channels_last or t.dim() <= 2:
        return t.stride()
    if t.dim() == 3:
        return t.transpose(1, 2).contiguous().transpose(1, 2).stride()
    memory_format = torch.channels_last if t.dim() == 4 else torch.channels_last_3d
    if output:
        return torch.empty(shape, device="meta", memory_format=memory_format).stride()
    return t.contiguous(memory_format=memory_format).stride()


def expected(job: Job, t: Operands, name: str) -> Tensor:
    """ "y", "dx" or "dw" of a plain convolution in float64, by plain PyTorch without cuDNN."""
    problem = explain.problems(job.layer.input, job.layer.weight, **job.layer.options)[_TITLES[name]]
    x, w, dy = (t.x, t.w, t.dy) if not job.layer.options.get("transposed") else (t.dy, t.w, t.x)
    a, b = {Role.FPROP: (x, w), Role.DGRAD: (dy, w), Role.WGRAD: (dy, x)}[problem.role]
    pair = (execute._five(a), execute._five(b))
    call = execute.Call(problem.role, problem.geometry, *pair, None, problem.precision)
    return of_problems.expected(problem, call)


def wanted(job: Job, t: Operands, names: Sequence[str]) -> dict[str, Tensor]:
    """Results of a job in float64, by plain PyTorch without cuDNN: some of those that `subjects.results` names."""
    if job.kind is None:
        return {name: expected(job, t, name) for name in names}
    return _by_kind(job, job.kind, t, names)


def _by_kind(job: Job, kind: Kind, t: Operands, names: Sequence[str]) -> dict[str, Tensor]:
    gradients = any(name != "y" for name in names)
    leaves = {name: tensor.double().requires_grad_(gradients) for name, tensor in t.named.items()}
    with backends.cudnn(enabled=False), torch.set_grad_enabled(gradients):
        y = kind.plain(job.layer, leaves)
        found = {"y": y.detach()}
        if gradients:
            all_of_them = torch.autograd.grad(y, tuple(leaves.values()), t.dy.double())
            found |= {f"d{name}": gradient for name, gradient in zip(leaves, all_of_them, strict=True)}
    return {name: found[name] for name in names}


def share(job: Job, subject: Subject, name: str, got: Tensor, want: Tensor) -> tuple[float, str]:
    """`off` of a result of a job."""
    return off(name, got, want, _depth(job, name), job.layer.options.get("precision"), subject.between)


def off(
    name: str, got: Tensor, want: Tensor, depth: int, precision: str | None, between: bool = False
) -> tuple[float, str]:
    """(the worst error as a share of its tolerance, what is wrong in words or ""): `triton_conv.check` has the formula.

    Results that are rounded `between` two kernels may be off by that much more.
    """
    dtype = got.dtype
    more = _ROUNDED_BETWEEN * torch.finfo(dtype).eps * depth**0.5 if between else 0.0
    flat, exact = got.reshape(-1), want.reshape(-1)
    if flat.shape != exact.shape:
        return torch.inf, f"wrong: {name} is of size {list(got.shape)}"
    worst, beyond = 0.0, 0
    for first in range(0, exact.numel(), _CHUNK):
        piece = exact[first : first + _CHUNK]
        bound = check.tolerance(piece, depth, dtype, precision, got.device) + more
        error = (flat[first : first + _CHUNK].double() - piece).abs()
        shares = torch.nan_to_num(error / bound, nan=torch.inf, posinf=torch.inf)
        worst, beyond = max(worst, float(shares.max())), beyond + int((shares > 1).sum())
    if not beyond:
        return worst, ""
    return worst, f"wrong: {beyond} of {exact.numel()} elements of {name}, the worst by {worst:.3g} tolerances"


def _depth(job: Job, name: str) -> int:
    if job.kind is not None:
        return job.kind.depth(job.layer, name)
    problem = explain.problems(job.layer.input, job.layer.weight, **job.layer.options)[_TITLES[name]]
    return check.depth(problem.geometry, problem.role)


def checked(job: Job, subject: Subject, results: tuple[Tensor, ...], wants: dict[str, Tensor]) -> tuple[float, str]:
    """The worst of `share` over all results of the job's operation."""
    found = [share(job, subject, n, r, wants[n]) for n, r in zip(results_of(job), results, strict=True)]
    return max(found)
