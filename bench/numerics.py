"""How the error of a sum grows with GEMM_K, the number of its products, in every precision and beside PyTorch's.

    python -m bench.numerics [--longest 1048576] [--modes float16,tf32]

One forward pass and one weight gradient for each length: a 1x1 filter over GEMM_K channels, and over GEMM_K pixels.
Operands are normal, so that a sum is about sqrt(GEMM_K), or uniform in [0, 1), so that it is a quarter of GEMM_K and
all partial sums have one sign. What is shown is the largest error of an element as a share of that size, against sums
in extended precision of the very operands.

Without a GPU the kernels are interpreted: their steps, slabs and roundings are what they are, but within a step numpy
multiplies, which adds float32 up in another order and rounds every addition. Matrix units do not, so that what errors
are on a GPU is for a GPU to show. Of TF32 the interpreter knows nothing: its operands are cut to 11 bits before, as the
hardware does it, and tf32x3, which would be the same as ieee, is left out. It also cuts what it stores as bfloat16,
where GPUs round.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterator, Sequence
from math import sqrt
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from triton_conv import backends, check, config, execute, plan
from triton_conv.config import Config
from triton_conv.geometry import ConvGeometry, Role

CHANNELS, PIXELS = 16, 16  # of the output: so many elements are compared
DEPTHS = (16, 256, 4096, 2**16, 2**20)
SLABS = (1, 4, 16, 64)
_ROW = 1024  # pixels of an image
_STEPS = 32  # of an interpreted loop, at most
_BYTES_SUM, _BYTES_BLOCK = 2.0**-13, 128  # Hopper's sums of 8-bit floats, and after how many float32 takes over


class Mode(NamedTuple):
    """How numbers are held: `sums` are those of 16-bit operands before they are rounded."""

    name: str
    dtype: torch.dtype
    precision: str = "ieee"
    sums: bool = False


MODES = (
    Mode("float64", torch.float64),
    Mode("float32 ieee", torch.float32),
    Mode("float32 tf32x3", torch.float32, "tf32x3"),
    Mode("float32 tf32", torch.float32, "tf32"),
    Mode("float16", torch.float16),
    Mode("float16, not rounded", torch.float16, sums=True),
    Mode("bfloat16", torch.bfloat16),
    Mode("bfloat16, not rounded", torch.bfloat16, sums=True),
    Mode("float8_e4m3fn", torch.float8_e4m3fn, sums=True),
)
ROLES = {"forward": Role.FPROP, "weight gradient": Role.WGRAD}


class Errors(NamedTuple):
    """The largest of one result, as shares of the size of its elements: ours, PyTorch's or None, and what may be."""

    mode: str
    operands: str
    role: str
    depth: int
    ours: float
    theirs: float | None
    bound: float

    @property
    def ok(self) -> bool:
        """Whether ours is within its bound."""
        return self.ours <= self.bound


def errors(
    mode: Mode, operands: str, role: str, depth: int, where: torch.device, splits: int = 0, rival: bool = True
) -> Errors:
    """Those of one sum length; the weight gradient in so many slabs, 0 for those of the plan.

    >>> errors(MODES[1], "normal", "forward", 16, torch.device("cpu")).ok
    True
    """
    forward = ROLES[role] is Role.FPROP
    interpreted = where.type != "cuda"
    g, shapes = _problem(forward, depth)
    generator = torch.Generator().manual_seed(depth)
    draw = torch.randn if operands == "normal" else torch.rand
    a, b = (draw(shape, generator=generator, dtype=torch.float64).to(mode.dtype) for shape in shapes)
    want, size = _exact(a, b, forward), sqrt(depth) if operands == "normal" else depth / 4
    given = [_cut(t) if interpreted and mode.precision == "tf32" else t for t in (a, b)]
    last = mode.dtype.itemsize <= 2
    x, y = (_placed(t, where, last) for t in given)
    call = _call(ROLES[role], g, x, y, mode)
    with config.explicit(_tiles(ROLES[role], depth if interpreted else 0, splits) if interpreted or splits else {}):
        got = _ours(call, mode, where)
    theirs = _theirs(forward, x, y, mode) if rival and mode.dtype is not torch.float8_e4m3fn else None

    def largest(found: Tensor) -> float:
        table = _as_table(found, forward)
        return float(np.abs(table.cpu().double().numpy().astype(np.longdouble) - want).max()) / size

    bound = _bound(torch.from_numpy(want.astype(np.float64)), mode, operands, depth) / size
    ours = largest(got)
    return Errors(mode.name, operands, role, depth, ours, None if theirs is None else largest(theirs), bound)


def _problem(forward: bool, depth: int) -> tuple[ConvGeometry, tuple[tuple[int, ...], tuple[int, ...]]]:
    """The geometry, and the shapes of x and w, or of dy and x."""
    if forward:
        x, w = (1, depth, 1, PIXELS), (CHANNELS, depth, 1, 1)
        return ConvGeometry.forward(x, w), (x, w)
    row = min(depth, _ROW)
    x, dy = (depth // row, PIXELS, 1, row), (depth // row, CHANNELS, 1, row)
    return ConvGeometry.forward(x, (CHANNELS, PIXELS, 1, 1)), (dy, x)


def _placed(t: Tensor, where: torch.device, last: bool) -> Tensor:
    return t.to(where).contiguous(memory_format=torch.channels_last if last else torch.contiguous_format)


def _call(role: Role, g: ConvGeometry, a: Tensor, b: Tensor, mode: Mode) -> execute.Call:
    scales, out = None, mode.dtype
    if mode.dtype is torch.float8_e4m3fn:
        one = torch.ones(1, device=a.device)
        scales, out = (one, one), torch.float32
    return execute.Call(role, g, a, b, None, mode.precision, (PIXELS, 1, 1, 1), scales=scales, out_dtype=out)


def _tiles(role: Role, depth: int, splits: int) -> dict:
    """For the interpreter, whose time is steps, and for so many slabs; `depth` is 0 on a device."""
    block = max(64, depth // _STEPS)
    if role is Role.FPROP:
        return {role: Config(16, 16, block)}
    return {role: Config(block, 16, 16, splits=max(splits, 1))}


def _ours(call: execute.Call, mode: Mode, where: torch.device) -> Tensor:
    output = execute.empty_output(call)
    device = execute.device_of(where)
    assert device is not None
    p = plan.make(execute.problem_of(call, device, output))
    stored = torch.empty_like(output, dtype=torch.float32) if mode.sums else output
    with check.poisoned():
        return execute.run(p, call, stored)


def _theirs(forward: bool, a: Tensor, b: Tensor, mode: Mode) -> Tensor | None:
    if mode.sums or mode.precision == "tf32x3" or (mode.precision == "tf32" and a.device.type != "cuda"):
        return None
    with backends.cudnn(precision=mode.precision):
        if forward:
            return functional.conv2d(a, b)
        w = a.new_zeros(CHANNELS, PIXELS, 1, 1).requires_grad_()
        return torch.autograd.grad(functional.conv2d(b, w), w, a)[0]


def _as_table(t: Tensor, forward: bool) -> Tensor:
    """[CHANNELS, PIXELS]."""
    return t[0, :, 0] if forward else t[:, :, 0, 0]


def _exact(a: Tensor, b: Tensor, forward: bool) -> np.ndarray:
    """The sums [CHANNELS, PIXELS] in extended precision: float64 where a machine has none."""
    if forward:
        first, second = b[:, :, 0, 0], a[0, :, 0]
    else:
        first, second = (t[:, :, 0].transpose(0, 1).flatten(1) for t in (a, b))
        second = second.T
    left, right = (t.double().numpy().astype(np.longdouble) for t in (first, second))
    total = np.zeros((CHANNELS, PIXELS), np.longdouble)
    for start in range(0, left.shape[1], 4096):
        total += left[:, start : start + 4096] @ right[start : start + 4096]
    return total


def _cut(t: Tensor) -> Tensor:
    """As TF32 matrix units read a float32: without its last 13 bits (PTX ISA 8.7, .tf32)."""
    return (t.view(torch.int32) & -(1 << 13)).view(torch.float32)


def _bound(want: Tensor, mode: Mode, operands: str, depth: int) -> float:
    """The largest error that is called right.

    Of normal operands it is that of `check`. Of sums of one sign each addition loses a share of all that was added up
    before: four products an addition is less than any matrix instruction takes.
    """
    bytes_ = mode.dtype is torch.float8_e4m3fn
    dtype = torch.float32 if mode.sums else mode.dtype
    if operands == "normal":
        eps_sum = _BYTES_SUM if bytes_ else 0.0
        device = torch.device("cuda")  # whose precisions are meant, also where they are imitated
        return float(check.tolerance(want, depth, dtype, mode.precision, device, eps_sum).max())
    eps = torch.finfo(dtype).eps
    eps_sum = eps if mode.dtype is torch.float64 else 2.0**-23
    cut = {"tf32": 2 * 2.0**-10, "tf32x3": 2.0**-20}.get(mode.precision, 0.0)
    imprecise = min(depth, _BYTES_BLOCK) / 4 * _BYTES_SUM if bytes_ else 0.0
    return float(want.abs().max()) * (eps + eps_sum * max(depth / 4, 1) + cut + imprecise)


# ---------------------------------------------------------------------------------------------------------------------
# Tables


def modes(where: torch.device) -> list[Mode]:
    """Those that can be shown on a device."""
    if where.type != "cuda":
        return [mode for mode in MODES if mode.precision != "tf32x3"]
    eight = torch.cuda.get_device_capability(where) >= (8, 9)
    return [mode for mode in MODES if eight or mode.dtype is not torch.float8_e4m3fn]


def growth(mode: Mode, depths: Sequence[int], where: torch.device) -> Iterator[Errors]:
    """All errors of a mode; 8-bit floats have no gradients."""
    for role in ROLES:
        if role == "forward" or mode.dtype is not torch.float8_e4m3fn:
            for operands in ("normal", "uniform"):
                for depth in depths:
                    yield errors(mode, operands, role, depth, where)


def by_slabs(depth: int, where: torch.device) -> Iterator[tuple[int, Errors]]:
    """(slabs, errors) of a weight gradient of positive operands, before it is rounded."""
    mode = next(mode for mode in MODES if mode.sums)
    for slabs in SLABS:
        yield slabs, errors(mode, "uniform", "weight gradient", depth, where, slabs, rival=False)


def table(found: Sequence[Errors]) -> str:
    """Markdown: a row for each mode, kind of operands, role and author, a column for each depth.

    >>> print(table([Errors("float16", "normal", "forward", 16, 2e-4, None, 1e-3)]))
    | precision | operands | of | GEMM_K 16 |
    |---|---|---|---|
    | float16 | normal | forward | 2.0e-04 |
    """
    depths = sorted({e.depth for e in found})
    rows: dict[tuple[str, str, str], dict[int, float]] = {}
    for e in found:
        rows.setdefault((e.mode, e.operands, e.role), {})[e.depth] = e.ours
        if e.theirs is not None:
            rows.setdefault((e.mode, e.operands, f"{e.role}, PyTorch"), {})[e.depth] = e.theirs
    heads = ["precision", "operands", "of", *(f"GEMM_K {depth}" for depth in depths)]
    lines = [heads, ["---"] * len(heads)]
    lines += [[*key, *(f"{row[d]:.1e}" if d in row else "" for d in depths)] for key, row in rows.items()]
    return "\n".join(f"|{'|'.join(cells)}|" if cells[0] == "---" else f"| {' | '.join(cells)} |" for cells in lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """Prints both tables; exit code 1 where an error is beyond its bound."""
    parser = argparse.ArgumentParser(prog="python -m bench.numerics", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--longest", type=int, default=DEPTHS[-1], help="largest GEMM_K (default: %(default)s)")
    parser.add_argument("--modes", default="", help="those whose names begin so, for example float16,float64")
    given = parser.parse_args(arguments)
    where = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if where.type != "cuda":
        os.environ["TRITON_INTERPRET"] = "1"  # read when a kernel is defined, at the first launch
    depths = [depth for depth in DEPTHS if depth <= given.longest] or [DEPTHS[0]]
    wanted = tuple(given.modes.split(","))
    found = [e for mode in modes(where) if mode.name.startswith(wanted) for e in growth(mode, depths, where)]
    name = torch.cuda.get_device_name(where) if where.type == "cuda" else "Triton's interpreter, on a CPU"
    print(f"{name}, torch {torch.__version__}\n\n{table(found)}\n")
    print("| slabs of a weight gradient, float16, uniform, not rounded |", f"GEMM_K {depths[-1]} |\n|---|---|")
    slabs = list(by_slabs(depths[-1], where))
    for count, e in slabs:
        print(f"| {count} | {e.ours:.1e} |")
    wrong = [e for e in [*found, *(e for _, e in slabs)] if not e.ok]
    for e in wrong:
        print(f"beyond {e.bound:.1e}: {e}", file=sys.stderr)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
