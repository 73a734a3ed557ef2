"""Convolutions of every shape, one at a time, compared with PyTorch in double precision.

    >>> case = Case.of((8, 9), 3, C=4, K=6, stride=2, padding=((1, 0), 1), modes="circular")
    >>> [result.ok for result in check_case(case, seed=7)]
    [True, True, True, True]

A `Case` is one convolution in PyTorch's words. `CASES` holds the corners, `random_case` draws more. The answer comes
from torch.nn.functional in float64 on the CPU, borders from `torch.nn.functional.pad`, gradients from autograd:
nothing here shares a formula with the package except the validation that `random_case` asks for.

Tolerances. With standard normal operands, an element that is a sum of GEMM_K products has the size sqrt(GEMM_K), and
the rounding errors of its partial sums add up to about eps * GEMM_K. Each element may therefore be wrong by

    eps_output * |expected| + sqrt(GEMM_K) * (10 * eps_sum * sqrt(GEMM_K) + 10 * eps_operand)

| dtype                       | eps_output | eps_sum | eps_operand |
|-----------------------------|------------|---------|-------------|
| float64, complex128         | 2^-52      | 2^-52   | 0           |
| float32, complex64 (ieee)   | 2^-23      | 2^-23   | 0           |
| float32 (tf32x3)            | 2^-23      | 2^-23   | 2^-21       |
| float32 (tf32)              | 2^-23      | 2^-23   | 2^-11       |
| float16                     | 2^-10      | 2^-23   | 0           |
| bfloat16                    | 2^-7       | 2^-23   | 0           |
| integers                    | exact, modulo the width of the type       |

Operands are exact in their own dtype, so eps_operand is there only for tf32, which rounds them. Rounding the output
once uses half of eps_output: 16-bit results that were rounded more often or accumulated in 16 bits do not pass.
Operands of one sign are outside of it: their partial sums grow like GEMM_K, and so may an error relative to the sum.
`python -m bench.numerics` shows by how much.
GEMM_K depends on the tensor: see `Case.depth`.

Memory that a kernel forgot to write shows as NaN (as the largest value for integers), because outputs are allocated
filled with it; memory it should not have read does too, because bias and "strided" operands are surrounded by it.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from math import inf
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .case_table import CASES as CASES
from .case_table import numbered_case as numbered_case
from .case_table import numbered_cases as numbered_cases
from .case_table import random_case as random_case
from .cases import COMPLEX as COMPLEX
from .cases import DTYPES as DTYPES
from .cases import FLOATS as FLOATS
from .cases import INTEGERS as INTEGERS
from .cases import MEMORY_FORMATS as MEMORY_FORMATS
from .cases import QUANTITIES as QUANTITIES
from .cases import Case as Case
from .cases import Operands as Operands
from .cases import depth as depth
from .execute import default_precision
from .geometry import Role
from .oracle import expected as expected


class Result(NamedTuple):
    """The element of one tensor that comes closest to its tolerance, or oversteps it most."""

    name: str
    error: float
    bound: float
    note: str = ""

    @property
    def ok(self) -> bool:
        """Whether every element is within its tolerance."""
        return self.error <= self.bound

    @property
    def share(self) -> float:
        """The error as a share of what is allowed."""
        if self.error == 0:
            return 0.0
        return self.error / self.bound if self.bound else inf


class Outcome(NamedTuple):
    """What `sweep` found for one case: results, or the exception that ended it."""

    number: int
    case: Case
    results: list[Result]
    exception: Exception | None = None

    @property
    def ok(self) -> bool:
        """Whether everything compared was within tolerance."""
        return self.exception is None and all(result.ok for result in self.results)


def compare(case: Case, name: str, got: Tensor, want: Tensor) -> Result:
    """The worst element of `got` against its tolerance; NaN, a wrong shape or dtype are infinitely wrong."""
    if got.shape != want.shape or got.dtype != case.dtype:
        return Result(name, inf, 0.0, f"{got.dtype} {list(got.shape)} instead of {case.dtype} {list(want.shape)}")
    return compared(name, got, want, case.depth(name), case.precision)


def compared(
    name: str, got: Tensor, want: Tensor, depth: int, precision: str | None, eps_operand: float = 0.0
) -> Result:
    """The same of sums of so many products, for tensors of one shape; `want` is float64, of integers exact."""
    if got.numel() == 0:
        return Result(name, 0.0, 0.0)
    if got.dtype in INTEGERS:
        error = (got.to("cpu", torch.int64) - want.to(torch.int64)).abs()
        return Result(name, float(error.max()), 0.0, _where(error > 0, int(error.argmax())))
    bound = tolerance(want, depth, got.dtype, precision, got.device, eps_operand=eps_operand)
    error = torch.nan_to_num((got.to("cpu", want.dtype) - want).abs(), nan=inf, posinf=inf)
    worst = int((error / bound).argmax())
    return Result(name, float(error.flatten()[worst]), float(bound.flatten()[worst]), _where(error > bound, worst))


def check_case(case: Case, seed: int, device: torch.device | str = "cpu", role: Role | None = None) -> list[Result]:
    """One result for each of y, dx, dw, db that exists and, if a role is given, that it computes.

    >>> [result.name for result in check_case(Case.of(9, 3, bias=False), seed=1)]
    ['y', 'dx', 'dw']
    """
    quantities = case.quantities(role)
    operands = case.operands(seed, device)
    with poisoned():
        got = case.run(operands, quantities)
    want = expected(case, operands, quantities)
    return [compare(case, name, got[name], want[name]) for name in want]


def sweep(
    cases: Iterable[tuple[int, Case]],
    seed: int,
    device: torch.device | str = "cpu",
    role: Role | None = None,
) -> Iterator[Outcome]:
    """Checks numbered cases one after the other; an exception is an outcome, and the sweep goes on.

        >>> all(outcome.ok for outcome in sweep(numbered_cases(2, seed=7), seed=7))
        True

    A CUDA error ends the sweep after its outcome: the device answers nothing after it.
    """
    for number, case in cases:
        try:
            outcome = Outcome(number, case, check_case(case, seed * 1_000_003 + number, device, role))
        except Exception as exception:
            yield Outcome(number, case, [], exception)
            if isinstance(exception, torch.AcceleratorError):
                return
        else:
            yield outcome


@contextmanager
def poisoned() -> Iterator[None]:
    """Inside, every uninitialised tensor is filled with NaN, of an integer type with its largest value.

    >>> with poisoned():
    ...     torch.empty(2)
    tensor([nan, nan])
    """
    settings: Any = torch.utils.deterministic
    enabled = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    fill = settings.fill_uninitialized_memory
    try:
        # warn_only: the filling is wanted here, not the refusal of other operators
        torch.use_deterministic_algorithms(True, warn_only=True)
        settings.fill_uninitialized_memory = True
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*deterministic.*")
            yield
    finally:
        torch.use_deterministic_algorithms(enabled, warn_only=warn_only)
        settings.fill_uninitialized_memory = fill


def tolerance(
    want: Tensor,
    depth: int,
    dtype: torch.dtype,
    precision: str | None,
    device: torch.device,
    eps_sum: float = 0.0,
    eps_operand: float = 0.0,
) -> Tensor:
    """By how much each element of a result of `dtype`, floating-point, may differ: the formula at the top.

    `eps_sum` is for sums that are less precise than the table says, `eps_operand` for operands that were rounded.
    """
    output, total, operand = _epsilons(dtype, precision, device)
    return output * want.abs() + depth**0.5 * (10 * max(total, eps_sum) * depth**0.5 + 10 * max(operand, eps_operand))


def _epsilons(dtype: torch.dtype, precision: str | None, device: torch.device) -> tuple[float, float, float]:
    """Relative errors of rounding the output, a partial sum and an operand; see the table at the top."""
    output = torch.finfo(dtype).eps
    if dtype in (torch.float64, torch.complex128):
        return output, output, 0.0
    precision = (precision or default_precision()) if dtype is torch.float32 else "ieee"
    if device.type != "cuda":  # Triton's interpreter multiplies exactly whatever the precision
        precision = "ieee"
    return output, 2.0**-23, {"tf32": 2.0**-11, "tf32x3": 2.0**-21, "ieee": 0.0}[precision]


def _where(wrong: Tensor, worst: int) -> str:
    if not wrong.any():
        return ""
    position = [int(i) for i in torch.unravel_index(torch.tensor(worst), wrong.shape)]
    return f"{int(wrong.sum())} of {wrong.numel()} elements, the worst at {position}"
