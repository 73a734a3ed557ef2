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

import random
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from math import inf, prod
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import functional
from .execute import default_precision
from .geometry import PADDING_MODES, ConvGeometry, Role

QUANTITIES = ("y", "dx", "dw", "db")
MEMORY_FORMATS = ("contiguous", "channels_last", "strided", "expanded")
INTEGERS = (torch.int8, torch.uint8, torch.int16, torch.int32, torch.int64)
COMPLEX = (torch.complex64, torch.complex128)
FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
DTYPES = FLOATS + COMPLEX + INTEGERS

Ints = int | Sequence[int]


class Operands(NamedTuple):
    """What a convolution and its backward pass read: input, weight, bias or None, gradient of the output."""

    x: Tensor
    w: Tensor
    bias: Tensor | None
    dy: Tensor


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


@dataclass(frozen=True)
class Case:
    """One convolution and its gradients in PyTorch's terms; `Case.of` fills in the usual values.

        >>> str(Case.of((8, 9), 3, padding=(1, (0, 2)), dilation=(1, 2), modes=("zeros", "reflect")))
        'conv2d N2 C3 K4 8x9 k3x3 p1x0+2 d1x2 zeros,reflect bias float32'

    C and K are the caller's input and output channels and `spatial` the caller's input, transposed or not. `padding`
    holds (lower, upper) per axis, `modes` one padding mode per axis. `memory_format` is that of all operands:
    "contiguous", "channels_last" (in 1-D too), "strided" (a window of a larger tensor filled with NaN) or "expanded"
    (input and output gradient are one sample, repeated with stride 0). `precision` is the keyword of `conv2d`.
    """

    transposed: bool
    N: int
    C: int
    K: int
    spatial: tuple[int, ...]
    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[tuple[int, int], ...]
    output_padding: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int
    modes: tuple[str, ...]
    bias: bool
    dtype: torch.dtype
    memory_format: str
    precision: str | None

    @classmethod
    def of(
        cls,
        spatial: Ints,
        kernel: Ints,
        *,
        transposed: bool = False,
        N: int = 2,
        C: int = 3,
        K: int = 4,
        stride: Ints = 1,
        padding: int | Sequence[int | tuple[int, int]] = 0,
        output_padding: Ints = 0,
        dilation: Ints = 1,
        groups: int = 1,
        modes: str | Sequence[str] = "zeros",
        bias: bool = True,
        dtype: torch.dtype = torch.float32,
        memory_format: str = "contiguous",
        precision: str | None = None,
    ) -> Case:
        """A case from the arguments a person would write: one value stands for all axes.

            >>> Case.of(10, 3, stride=2).stride
            (2,)

        `spatial` alone sets the rank. A padding entry is an int or a (lower, upper) pair.
        """
        extents = (spatial,) if isinstance(spatial, int) else tuple(spatial)

        def per_axis(value: Any) -> tuple:
            return (value,) * len(extents) if isinstance(value, (int, str)) else tuple(value)

        return cls(
            transposed=transposed,
            N=N,
            C=C,
            K=K,
            spatial=extents,
            kernel=per_axis(kernel),
            stride=per_axis(stride),
            padding=tuple((p, p) if isinstance(p, int) else (p[0], p[1]) for p in per_axis(padding)),
            output_padding=per_axis(output_padding),
            dilation=per_axis(dilation),
            groups=groups,
            modes=per_axis(modes),
            bias=bias,
            dtype=dtype,
            memory_format=memory_format,
            precision=precision,
        )

    @property
    def rank(self) -> int:
        """Spatial axes: 1, 2 or 3."""
        return len(self.spatial)

    @property
    def name(self) -> str:
        """The function of `triton_conv` that computes it."""
        return f"conv_transpose{self.rank}d" if self.transposed else f"conv{self.rank}d"

    @property
    def id(self) -> str:
        """The case as one word, for the name of a test."""
        return str(self).replace(" ", "-")

    @property
    def weight_shape(self) -> tuple[int, ...]:
        """(K, C / groups, *kernel), or (C, K / groups, *kernel) if transposed."""
        first, second = (self.C, self.K) if self.transposed else (self.K, self.C)
        return (first, second // self.groups, *self.kernel)

    @property
    def geometry(self) -> ConvGeometry:
        """The validated geometry; raises what the convolution itself would raise."""
        x = (self.N, self.C, *self.spatial)
        if not self.transposed:
            return ConvGeometry.forward(
                x, self.weight_shape, self.stride, self.padding, self.dilation, self.groups, self.modes
            )
        return ConvGeometry.transposed(
            x,
            self.weight_shape,
            self.stride,
            self.padding,
            self.output_padding,
            self.groups,
            self.dilation,
            self.modes,
        )

    @property
    def output_spatial(self) -> tuple[int, ...]:
        """Extents of the output."""
        g = self.geometry
        return (g.input if self.transposed else g.output)[3 - self.rank :]

    @property
    def macs(self) -> int:
        """Multiplications of the forward pass: what limits how long a case takes."""
        return self.geometry.flops // 2

    def quantities(self, role: Role | None = None) -> tuple[str, ...]:
        """Which of y, dx, dw, db exist (integers have no gradients in PyTorch), and are computed by `role`.

        >>> Case.of(8, 3, transposed=True).quantities(Role.FPROP)
        ('dx',)
        """
        if self.dtype in INTEGERS:
            present: tuple[str, ...] = ("y",)
        else:
            present = QUANTITIES if self.bias else QUANTITIES[:3]
        if role is None:
            return present
        computes = {Role.FPROP: "y", Role.DGRAD: "dx", Role.WGRAD: "dw"}
        if self.transposed:
            computes |= {Role.FPROP: "dx", Role.DGRAD: "y"}
        return tuple(name for name in present if name == computes[role])

    def depth(self, name: str) -> int:
        """GEMM_K: how many products (of db: terms) the largest sum behind an element of y, dx, dw or db has.

        >>> case = Case.of((8, 8), 3, N=2, C=16, K=32, padding=1)
        >>> [case.depth(name) for name in ("y", "dx", "dw", "db")]
        [144, 288, 128, 128]
        """
        if name == "db":
            return max(self.N * prod(self.output_spatial), 1)
        roles = {"y": Role.FPROP, "dx": Role.DGRAD, "dw": Role.WGRAD}
        if self.transposed:
            roles |= {"y": Role.DGRAD, "dx": Role.FPROP}
        return depth(self.geometry, roles[name])

    def operands(self, seed: int, device: torch.device | str = "cpu") -> Operands:
        """Random operands on `device`, the same for the same seed whatever the device and memory format.

        Floating-point values are standard normal in the case's dtype, integers lie in -4..4 (0..8 if unsigned).
        """
        generator = torch.Generator().manual_seed(seed)

        def draw(*shape: int) -> Tensor:
            if self.dtype in INTEGERS:
                low = 0 if self.dtype is torch.uint8 else -4
                return torch.randint(low, low + 9, shape, generator=generator).to(self.dtype)
            wide = torch.complex128 if self.dtype.is_complex else torch.float64
            return torch.randn(shape, generator=generator, dtype=wide).to(self.dtype)

        def place(t: Tensor, samples: bool) -> Tensor:
            t = t.to(device)
            return _arrange(t, self.memory_format if samples or self.memory_format != "expanded" else "contiguous")

        x = draw(self.N, self.C, *self.spatial)
        w = draw(*self.weight_shape)
        dy = draw(self.N, self.K, *self.output_spatial)
        bias = _arrange(draw(self.K).to(device), "strided") if self.bias else None
        return Operands(place(x, True), place(w, False), bias, place(dy, True))

    def run(self, operands: Operands, quantities: Sequence[str] = QUANTITIES) -> dict[str, Tensor]:
        """The output and the gradients asked for, by the public function of this package and autograd."""
        function = getattr(functional, self.name)
        arguments = {
            "stride": self.stride,
            "padding": self.padding,
            "dilation": self.dilation,
            "groups": self.groups,
            "padding_mode": self.modes,
            "precision": self.precision,
        }
        if self.transposed:
            arguments["output_padding"] = self.output_padding
        wanted = [name for name in self.quantities() if name in quantities]
        return _differentiate(lambda x, w, bias: function(x, w, bias, **arguments), operands, wanted)

    def __str__(self) -> str:
        parts = [self.name, f"N{self.N}", f"C{self.C}", f"K{self.K}", _by(self.spatial), f"k{_by(self.kernel)}"]
        pads = [str(lower) if lower == upper else f"{lower}+{upper}" for lower, upper in self.padding]
        for letter, value, usual in (
            ("s", _by(self.stride), self.stride == (1,) * self.rank),
            ("p", _by(pads), self.padding == ((0, 0),) * self.rank),
            ("o", _by(self.output_padding), self.output_padding == (0,) * self.rank),
            ("d", _by(self.dilation), self.dilation == (1,) * self.rank),
            ("g", str(self.groups), self.groups == 1),
        ):
            if not usual:
                parts.append(letter + value)
        if set(self.modes) != {"zeros"}:
            parts.append(self.modes[0] if len(set(self.modes)) == 1 else ",".join(self.modes))
        if self.bias:
            parts.append("bias")
        parts.append(str(self.dtype).removeprefix("torch."))
        if self.memory_format != "contiguous":
            parts.append(self.memory_format)
        if self.precision is not None:
            parts.append(self.precision)
        return " ".join(parts)


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
    compute = _torch_transposed if case.transposed else _torch_forward
    results = _differentiate(lambda x, w, bias: compute(case, x, w, bias), doubles, wanted)
    if case.dtype in INTEGERS:
        return {name: t.to(torch.int64).to(case.dtype) for name, t in results.items()}
    return results


def compare(case: Case, name: str, got: Tensor, want: Tensor) -> Result:
    """The worst element of `got` against its tolerance; NaN, a wrong shape or dtype are infinitely wrong."""
    if got.shape != want.shape or got.dtype != case.dtype:
        return Result(name, inf, 0.0, f"{got.dtype} {list(got.shape)} instead of {case.dtype} {list(want.shape)}")
    if got.numel() == 0:
        return Result(name, 0.0, 0.0)
    if case.dtype in INTEGERS:
        error = (got.to("cpu", torch.int64) - want.to(torch.int64)).abs()
        return Result(name, float(error.max()), 0.0, _where(error > 0, int(error.argmax())))
    bound = tolerance(want, case.depth(name), case.dtype, case.precision, got.device)
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


def numbered_cases(count: int, seed: int, dtype: torch.dtype | None = None) -> Iterator[tuple[int, Case]]:
    """`CASES`, then `count` random cases; with `dtype`, all of them in that dtype.

    Case number i is the same whatever `count` is, so that it can be run again alone.
    """
    for number in range(len(CASES) + count):
        yield number, numbered_case(number, seed, dtype)


def numbered_case(number: int, seed: int, dtype: torch.dtype | None = None) -> Case:
    """The case that `numbered_cases` gives this number."""
    case = CASES[number] if number < len(CASES) else random_case(random.Random(f"{seed} {number - len(CASES)}"))
    if dtype is None or dtype is case.dtype:
        return case
    return replace(case, dtype=dtype, precision=None)


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


# ---------------------------------------------------------------------------------------------------------------------
# Operands and outputs


def _differentiate(compute: Callable[..., Tensor], operands: Operands, wanted: Sequence[str]) -> dict[str, Tensor]:
    gradients = [name for name in wanted if name != "y"]
    x, w, bias = (
        None if t is None else t.detach().requires_grad_(name in gradients)
        for name, t in zip(("dx", "dw", "db"), operands[:3], strict=True)
    )
    y = compute(x, w, bias)
    results = {"y": y.detach()} if "y" in wanted else {}
    if gradients:
        leaves = [t for t in (x, w, bias) if t is not None and t.requires_grad]
        results.update(zip(gradients, torch.autograd.grad(y, leaves, operands.dy), strict=True))
    return results


def _arrange(t: Tensor, memory_format: str) -> Tensor:
    """The values of t (for "expanded", of its first sample) in memory of another layout."""
    if memory_format == "channels_last":
        return t.movedim(1, -1).contiguous().movedim(-1, 1)
    if memory_format == "expanded":
        return t[:1].expand_as(t)
    if memory_format == "strided":
        poison = torch.iinfo(t.dtype).max if t.dtype in INTEGERS else float("nan")
        window = t.new_full([extent + 2 for extent in t.shape], poison)[(slice(1, -1),) * t.dim()]
        return window.copy_(t)
    return t


def depth(geometry: ConvGeometry, role: Role) -> int:
    """GEMM_K of a role: how many products the largest sum behind an element has."""
    g = geometry
    if role is Role.WGRAD:
        return max(g.N * prod(g.output), 1)
    products = max((g.C if role is Role.FPROP else g.K) // g.groups * g.taps, 1)
    if role is Role.DGRAD:  # it also sums what the border repeats
        for (lower, upper), mode in zip(g.padding, g.modes, strict=True):
            products *= {"zeros": 1, "replicate": 1 + max(lower, upper)}.get(mode, 3)
    return products


def tolerance(
    want: Tensor,
    depth: int,
    dtype: torch.dtype,
    precision: str | None,
    device: torch.device,
    eps_sum: float = 0.0,
) -> Tensor:
    """By how much each element of a result of `dtype`, floating-point, may differ: the formula at the top.

    `eps_sum` is for sums that are less precise than the table says.
    """
    output, total, operand = _epsilons(dtype, precision, device)
    return output * want.abs() + depth**0.5 * (10 * max(total, eps_sum) * depth**0.5 + 10 * operand)


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


def _by(values: Sequence[Any]) -> str:
    return "x".join(map(str, values))


# ---------------------------------------------------------------------------------------------------------------------
# The oracle


def _torch_forward(case: Case, x: Tensor, w: Tensor, bias: Tensor | None) -> Tensor:
    function = getattr(torch.nn.functional, f"conv{case.rank}d")
    for axis, (pair, mode) in enumerate(zip(case.padding, case.modes, strict=True), start=2):
        x = _pad(x, axis, pair, mode)
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


def _pad(x: Tensor, axis: int, pair: tuple[int, int], mode: str) -> Tensor:
    """One axis padded by torch.nn.functional.pad, which knows each mode for the last axis of a 3-D tensor."""
    rows = x.movedim(axis, -1)
    flat = rows.reshape(-1, 1, rows.shape[-1])
    flat = torch.nn.functional.pad(flat, pair, mode="constant" if mode == "zeros" else mode)
    return flat.reshape(*rows.shape[:-1], flat.shape[-1]).movedim(-1, axis)


# ---------------------------------------------------------------------------------------------------------------------
# The cases

_of = Case.of

CASES: tuple[Case, ...] = (
    # plain, in every rank and direction
    _of(11, 3, padding=1),
    _of((7, 9), 3, padding=1),
    _of((4, 5, 6), 3, padding=1),
    _of(11, 3, padding=1, transposed=True),
    _of((7, 9), 3, padding=1, transposed=True),
    _of((4, 5, 6), 3, padding=1, transposed=True),
    # tiles with tails: channels and pixels beyond one block
    _of((6, 7), 3, C=65, K=33, N=1, padding=1, dtype=torch.float16),
    _of((13, 11), 1, C=72, K=130, N=1, dtype=torch.bfloat16),
    _of(150, 3, C=17, K=19, padding=1),
    _of((5, 5), 3, C=33, K=65, N=1, stride=2, padding=1, transposed=True, dtype=torch.float16),
    # odd everything
    _of((7, 11), (5, 3), C=5, K=7, N=3, stride=(3, 2), padding=((2, 1), (0, 1)), dilation=(1, 3)),
    _of((5, 3, 7), (3, 1, 5), C=5, K=7, N=3, stride=(2, 1, 3), padding=((1, 0), (0, 0), (2, 3)), dilation=(1, 1, 2)),
    _of((5, 3), (3, 5), C=7, K=5, N=3, stride=(3, 2), padding=((2, 1), (0, 3)), dilation=(2, 1), transposed=True),
    # a single channel, filter, pixel, sample
    _of((9, 9), 3, C=1, K=1, N=1),
    _of((9, 9), 3, C=1, K=8, padding=1),
    _of((9, 9), 3, C=8, K=1, padding=1),
    _of((3, 3), 3, N=1),
    _of((1, 1), 1, N=1),
    _of((1, 1), 3, padding=1),
    _of((1, 1), 3, transposed=True),
    _of(1, 1, transposed=True),
    # unit axes
    _of((1, 12), (1, 3), padding=(0, 1)),
    _of((12, 1), (3, 1), padding=(1, 0), stride=(2, 1)),
    _of((1, 1, 10), (1, 1, 4), stride=(1, 1, 2)),
    _of((5, 1, 6), (3, 1, 1), padding=(1, 0, 0), transposed=True),
    # filters larger than the input
    _of((2, 3), (5, 7), padding=((2, 3), (3, 3))),
    _of((3, 2), 5, padding=4, stride=2),
    _of((3, 2), 7, padding=3, transposed=True),
    # a stride beyond the filter: residues without taps
    _of((11, 10), (1, 2), stride=(2, 3)),
    _of(17, 2, stride=5, padding=1),
    _of((7, 7, 7), 1, stride=2),
    _of((3, 4), 2, stride=3, output_padding=(2, 1), transposed=True),
    _of((3, 4), 1, stride=4, transposed=True),
    # pointwise, and filters that step by their own length
    _of((6, 7), 1, C=16, K=8),
    _of((6, 7), 1, stride=2, C=16, K=8),
    _of((6, 7), 1, C=16, K=8, padding=1),
    _of((8, 12), 4, stride=4, K=16),
    _of((4, 6, 8), 2, stride=2, K=16, memory_format="channels_last"),
    _of((3, 4), 2, stride=2, K=6, transposed=True),
    _of((3, 4), 2, stride=2, K=6, transposed=True, memory_format="channels_last"),
    _of((3, 4), 2, stride=2, K=1, transposed=True),
    # dilation: larger than the input, sharing a factor with the stride or not
    _of((4, 5), 3, dilation=6, padding=6),
    _of((12, 13), 3, dilation=(2, 3), padding=(2, 3)),
    _of((12, 13), 3, stride=2, dilation=2, padding=2),
    _of((13, 14), (3, 2), stride=(6, 4), dilation=(4, 6), padding=4),
    _of(14, 3, stride=3, dilation=2, padding=1, transposed=True),
    _of((4, 5), 3, stride=(4, 6), dilation=(6, 4), padding=5, transposed=True),
    # output_padding, up to and beyond the stride
    _of((4, 5), 3, stride=2, padding=1, output_padding=1, transposed=True),
    _of((4, 5), 3, stride=(3, 2), padding=1, output_padding=(2, 0), transposed=True),
    _of((4, 5), 2, stride=1, dilation=(4, 3), output_padding=(3, 1), transposed=True),
    _of(5, 3, stride=2, dilation=5, padding=((1, 3),), output_padding=4, transposed=True),
    _of((3, 3, 2), 2, stride=(1, 2, 2), dilation=3, output_padding=(2, 2, 1), padding=1, transposed=True),
    # asymmetric and causal borders
    _of(12, 3, padding=((2, 0),), C=4, groups=4),
    _of((6, 7), 4, padding=((1, 2), (2, 1))),
    _of((5, 6, 6), 3, padding=((2, 0), 1, 1), modes=("replicate", "zeros", "zeros")),
    _of((6, 5), 3, stride=2, padding=((0, 2), (3, 1)), transposed=True),
    # padding modes
    _of(9, 5, padding=4, modes="reflect"),
    _of(9, 4, padding=((7, 2),), modes="replicate", stride=2),
    _of(9, 4, padding=((9, 3),), modes="circular", dilation=2),
    _of((6, 7), 3, padding=1, modes="reflect", dtype=torch.float16),
    _of((6, 7), 5, padding=2, modes="replicate", dtype=torch.bfloat16, stride=(1, 2)),
    _of((6, 7), 3, padding=((2, 1), (0, 3)), modes="circular", stride=2),
    _of((4, 5, 4), 3, padding=1, modes=("circular", "reflect", "replicate")),
    _of((5, 6), 3, padding=((1, 1), (2, 0)), modes=("circular", "zeros"), C=4, K=4, groups=4, dtype=torch.float64),
    _of((1, 6), 3, padding=1, modes=("replicate", "circular")),
    _of(7, 3, padding=2, modes="reflect", transposed=True),
    _of((5, 4), 3, stride=2, padding=1, output_padding=1, modes=("circular", "replicate"), transposed=True),
    _of((3, 3, 3), 2, stride=(2, 1, 1), padding=1, modes=("zeros", "reflect", "circular"), transposed=True),
    _of((4, 4), 2, dilation=3, output_padding=2, padding=1, modes="circular", transposed=True),
    # groups and depthwise
    _of((7, 6), 3, C=6, K=9, groups=3, padding=1),
    _of((7, 6), 3, C=34, K=36, groups=2, padding=1, stride=2, dtype=torch.float16),
    _of((7, 6), 3, C=8, K=8, groups=8, padding=1),
    _of((7, 6), 3, C=5, K=15, groups=5, padding=1, stride=2),
    _of((9, 9), 7, C=4, K=4, groups=4, padding=3, dtype=torch.bfloat16, memory_format="channels_last"),
    _of((4, 4, 4), 3, C=6, K=6, groups=6, padding=1, dilation=2),
    _of(21, 4, C=5, K=5, groups=5, padding=((3, 0),), memory_format="channels_last"),
    _of((5, 4), 3, C=6, K=4, groups=2, stride=2, padding=1, output_padding=1, transposed=True),
    _of((5, 4), 4, C=6, K=6, groups=6, stride=2, padding=1, transposed=True),
    _of((5, 4), 3, C=4, K=8, groups=4, stride=2, transposed=True),
    # nothing to do
    _of((5, 6), 3, N=0, padding=1),
    _of((5, 6), 3, N=0, stride=2, transposed=True),
    _of((5, 6), 3, C=0, padding=1),
    # memory
    _of((6, 7), 3, C=16, K=8, padding=1, memory_format="channels_last", dtype=torch.float16),
    _of((4, 5, 6), 3, C=8, K=4, padding=1, stride=2, memory_format="channels_last", dtype=torch.bfloat16),
    _of((5, 6), 3, C=8, K=16, stride=2, memory_format="channels_last", transposed=True),
    _of((6, 7), 3, padding=1, memory_format="strided"),
    _of((6, 7), 1, C=8, memory_format="strided", dtype=torch.float16),
    _of((4, 5), 3, stride=2, padding=1, memory_format="strided", transposed=True),
    _of((4, 5), 3, C=4, K=4, groups=4, padding=1, memory_format="strided"),
    _of((6, 7), 3, N=3, padding=1, memory_format="expanded"),
    # dtypes and precisions
    _of((6, 7), 3, padding=1, dtype=torch.float64, bias=False),
    _of((6, 7), 3, C=20, padding=1, precision="ieee"),
    _of((6, 7), 3, C=20, padding=1, precision="tf32"),
    _of((6, 7), 3, C=20, padding=1, precision="tf32x3"),
    _of((5, 6), 3, C=20, padding=1, stride=2, precision="tf32x3", transposed=True),
    _of((6, 7), 3, stride=2, padding=1, dtype=torch.complex64),
    _of((4, 5), 3, stride=2, padding=1, dtype=torch.complex128, transposed=True),
    _of(8, 3, padding=1, dtype=torch.complex64, modes="circular", transposed=True),
    _of((6, 7), 3, padding=1, dtype=torch.int8, C=20),
    _of((6, 7), 3, padding=1, dtype=torch.uint8, C=20, stride=2),
    _of(12, 3, padding=1, dtype=torch.int16, modes="reflect"),
    _of((4, 3, 4), 3, padding=1, dtype=torch.int32, transposed=True),
    _of((6, 7), 3, padding=1, dtype=torch.int64, C=4, K=4, groups=4),
)


def random_case(rng: random.Random) -> Case:
    """A valid small case that varies everything a `Case` has; the same for the same state of `rng`.

    >>> random_case(random.Random(7)) == random_case(random.Random(7))
    True
    """
    while True:
        case = _draw(rng)
        try:
            small = case.macs <= 150_000 and prod(case.output_spatial) <= 600
        except RuntimeError:  # not a convolution
            continue
        if small:
            return case


def _draw(rng: random.Random) -> Case:
    rank, transposed = rng.choice((1, 2, 2, 3)), rng.random() < 0.4
    largest = {1: 60, 2: 12, 3: 6}[rank]

    def axes(*values: Any) -> tuple:
        return tuple(rng.choice(values) for _ in range(rank))

    groups, C, K = _channels(rng)
    kernel = axes(1, 2, 3, 3, 4, 5, 7) if rank < 3 else axes(1, 2, 3, 3)
    stride = axes(1) if rng.random() < 0.4 else axes(1, 2, 2, 3, 4)
    dilation = axes(1) if rng.random() < 0.6 else axes(1, 2, 3, 5)
    padded = rng.random()
    pads = [
        (0, 0) if padded < 0.2 else (n, n) if padded < 0.6 else (n, rng.randrange(2 * (taps - 1) * d + 2))
        for taps, d in zip(kernel, dilation, strict=True)
        for n in [rng.randrange((taps - 1) * d + 2)]
    ]
    modes = axes("zeros") if rng.random() < 0.5 else axes(*PADDING_MODES)
    dtype = rng.choice((torch.float32,) * 5 + (torch.float16, torch.bfloat16) * 2 + (torch.float64,))
    if rng.random() < 0.15:
        dtype = rng.choice(COMPLEX + INTEGERS)
    return Case(
        transposed=transposed,
        N=rng.choice((0, 1, 1, 1, 2, 2, 2, 2, 3, 5)),
        C=C,
        K=K,
        spatial=tuple(rng.randint(1, largest // (2 if transposed else 1)) for _ in range(rank)),
        kernel=kernel,
        stride=stride,
        padding=tuple(pads),
        output_padding=axes(0) if not transposed or rng.random() < 0.5 else axes(0, 1, 2, 3),
        dilation=dilation,
        groups=groups,
        modes=modes,
        bias=rng.random() < 0.6,
        dtype=dtype,
        memory_format=rng.choice(MEMORY_FORMATS[:1] * 3 + MEMORY_FORMATS[1:2] * 3 + MEMORY_FORMATS[2:]),
        precision=rng.choice((None, "ieee", "tf32", "tf32x3")) if dtype is torch.float32 else None,
    )


def _channels(rng: random.Random) -> tuple[int, int, int]:
    """groups, C, K: dense, grouped or depthwise, with and without a multiplier."""
    kind = rng.random()
    if kind < 0.55:
        return 1, rng.choice((1, 2, 3, 8, 16, 17, 32, 33, 65)), rng.choice((1, 2, 3, 8, 16, 17, 32, 33, 65))
    groups = rng.choice((2, 3, 4, 5, 8))
    if kind < 0.8:
        return groups, groups * rng.choice((1, 2, 3, 8, 17)), groups * rng.choice((1, 2, 3, 8, 17))
    return groups, groups, groups * rng.choice((1, 1, 1, 2, 3))
