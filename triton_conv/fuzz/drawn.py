"""A case that was drawn: its operands, what the package makes of them, and what PyTorch does in float64."""

from __future__ import annotations

import random
from abc import ABC, abstractmethod
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, fields
from math import inf, prod
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..check import DTYPES, INTEGERS, Result, compared, poisoned
from ..invariance import batch_invariant
from .placing import PLACES, placed
from .steering import DEVICE_NAMES, OWN, steered

Tensors = dict[str, Tensor | None]
_OF_SAMPLES = ("x", "residual", "offset", "mask", "state", "context")
_DTYPES = {str(dtype).removeprefix("torch.") for dtype in (*DTYPES, torch.float8_e4m3fn)}


@dataclass(frozen=True, kw_only=True, repr=False)
class Drawn(ABC):
    """One call and its backward pass. Fields are numbers, words and tuples of these: `repr` is all there is to it.

    `seed` is that of the operands, `device` the GPU that interpreted kernels are planned for and `candidate` the
    way and config that plans are made to take (see `steered`). Operands in `frozen` ask for no gradient. With `again`
    the call is made twice, with other values first, so that the second may go the short way. With a `batch` it is
    `batch_invariant` for that many samples, and the last sample alone is to have the same bits. `places` says how
    operands lie in memory, by name (see `placing`).
    """

    seed: int = 0
    device: str = OWN
    candidate: int = 0
    frozen: tuple[str, ...] = ()
    again: bool = False
    batch: int = 0
    places: tuple[tuple[str, str], ...] = ()

    LARGEST: ClassVar[int] = 1_500_000  # products of the forward pass
    MOST: ClassVar[int] = 2_000  # outputs

    @abstractmethod
    def shapes(self) -> dict[str, tuple[tuple[int, ...], str]]:
        """(shape, dtype) of the operands by name. Raises what the call raises for what is no such convolution."""

    @abstractmethod
    def compute(self, t: Tensors) -> Any:
        """The call: a tensor, or several."""

    @abstractmethod
    def plain(self, t: Tensors) -> Any:
        """The same by PyTorch, for operands in float64."""

    @abstractmethod
    def depth(self, name: str) -> tuple[int, float]:
        """(products in the largest sum behind an element of a result, to how much its factors were rounded)."""

    @abstractmethod
    def cost(self) -> tuple[int, int]:
        """Products and outputs of the forward pass."""

    @property
    def precision(self) -> str | None:
        """Of float32."""
        return None

    @property
    def coarse(self) -> float:
        """To how much matrix units round what they add up, where that is less than float32 has."""
        return 0.0

    def dtype_of(self, name: str) -> torch.dtype:
        """Of a result: the gradient of an operand has the operand's."""
        shapes = self.shapes()
        return getattr(torch, shapes[name[1:] if name[1:] in shapes else "x"][1])

    def operands(self, seed: int, where: torch.device | str) -> Tensors:
        """Random ones, as `place` has them."""
        generator, how = torch.Generator().manual_seed(seed), dict(self.places)
        return {
            name: placed(self.values(name, shape, generator).to(getattr(torch, dtype)).to(where), how.get(name, ""))
            for name, (shape, dtype) in self.shapes().items()
        }

    def values(self, name: str, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
        """Standard normal ones, complex where the operand is; small integers of integers."""
        dtype = getattr(torch, self.shapes()[name][1])
        if dtype in INTEGERS:
            low = 0 if dtype is torch.uint8 else -4
            return torch.randint(low, low + 9, shape, generator=generator)
        return torch.randn(shape, generator=generator, dtype=torch.complex128 if dtype.is_complex else torch.float64)

    def valid(self) -> bool:
        """Whether it is a convolution, and a small one."""
        try:
            products, outputs = self.cost()
            shapes = self.shapes()
        except (RuntimeError, ValueError, TypeError, IndexError, AttributeError, ZeroDivisionError):
            return False
        known = (
            self.device in DEVICE_NAMES
            and min(self.candidate, self.seed, self.batch) >= 0
            and set(self.frozen) <= set(shapes)
        )
        known = known and {how for _, how in self.places} <= set(PLACES) and {d for _, d in shapes.values()} <= _DTYPES
        sizes = [prod(shape) for shape, _ in shapes.values()]
        return known and products <= self.LARGEST and outputs <= self.MOST and max(sizes) <= 100_000

    def check(self, where: torch.device | str = "cpu") -> list[Result]:
        """A result for each output and gradient."""
        alone = []
        invariant = batch_invariant(batch=self.batch) if self.batch else nullcontext()
        with steered(self.device, self.candidate), poisoned(), invariant:
            if self.again:
                self._differentiated(self.compute, self.operands(self.seed + 1, where))
            t = self.operands(self.seed, where)
            got = self._differentiated(self.compute, t)
            if self.batch and len(got["y"]):
                alone = [self._alone(t)]
        wide = {name: None if o is None else self._wide(o) for name, o in t.items()}
        want = self._differentiated(self.plain, wide)
        return [*(self.compare(name, found, want[name]) for name, found in got.items()), *alone]

    def _alone(self, t: Tensors) -> Result:
        """Whether the last sample has the bits that it has in the batch, without gradients."""
        with torch.no_grad():
            both = (
                self.compute(t),
                self.compute({n: o if n not in _OF_SAMPLES or o is None else o[-1:] for n, o in t.items()}),
            )
        whole, single = (y if isinstance(y, Tensor) else y[0] for y in both)
        same = torch.equal(whole[-1:], single)
        return Result("alone", 0.0 if same else 1.0, 0.0, "" if same else "other bits than in the batch")

    def compare(self, name: str, got: Tensor, want: Tensor) -> Result:
        dtype = self.dtype_of(name)
        if got.shape != want.shape or got.dtype != dtype:
            return Result(name, inf, 0.0, f"{got.dtype} {list(got.shape)} instead of {dtype} {list(want.shape)}")
        if dtype in INTEGERS:  # sums wrap
            want = want.to(torch.int64).to(dtype)
        depth, rounded = self.depth(name)
        return compared(name, got, want, depth, self.precision, max(rounded, self.coarse if got.is_cuda else 0.0))

    def _wide(self, t: Tensor) -> Tensor:
        return t.detach().to("cpu", torch.complex128 if t.is_complex() else torch.float64)

    def _differentiated(self, compute: Any, t: Tensors) -> dict[str, Tensor]:
        """Outputs y, y1, ... and the gradients of operands that have one."""
        leaves = {
            name: None if o is None else o.detach().requires_grad_(self.differentiable(name)) for name, o in t.items()
        }
        wanted = [name for name, o in leaves.items() if o is not None and o.requires_grad]
        found = compute(leaves)
        outputs: Sequence[Tensor] = (found,) if isinstance(found, Tensor) else found
        results = {f"y{i or ''}": y.detach() for i, y in enumerate(outputs)}
        if wanted:
            through = [y for y in outputs if y.requires_grad]
            given = [self._given(f"y{i or ''}", y) for i, y in enumerate(outputs) if y.requires_grad]
            inputs = [o for name, o in leaves.items() if o is not None and name in wanted]
            gradients = torch.autograd.grad(through, inputs, given)
            results |= {f"d{name}": g for name, g in zip(wanted, gradients, strict=True)}
        return results

    def differentiable(self, name: str) -> bool:
        """Whether the gradient of an operand is asked for."""
        dtype = getattr(torch, self.shapes()[name][1])
        return name not in self.frozen and (dtype.is_floating_point or dtype.is_complex)

    def _given(self, name: str, y: Tensor) -> Tensor:
        """The gradient of an output: the same values, but for their dtype, for us and for PyTorch."""
        generator, dtype = torch.Generator().manual_seed(self.seed + 17), self.dtype_of(name)
        wide = torch.complex128 if dtype.is_complex else torch.float64
        values = torch.randn(y.shape, generator=generator, dtype=wide).to(dtype).to(y.device)
        exact = y.dtype in (torch.float64, torch.complex128) and y.dtype != dtype
        if dict(self.places).get("dy") == "expanded" and len(values):
            values = values[:1].expand_as(values)
        return values.to(wide) if exact else placed(values, dict(self.places).get("dy", ""))

    def __repr__(self) -> str:
        usual = {f.name: f.default for f in fields(self)}
        given = {f.name: getattr(self, f.name) for f in fields(self)}
        said = [f"{name}={value!r}" for name, value in given.items() if value != usual[name]]
        return f"{type(self).__name__}({', '.join(said)})"


def steering(rng: random.Random) -> dict[str, Any]:
    """What every case draws."""
    return {
        "seed": rng.randrange(10_000),
        "device": rng.choice((OWN, OWN, *DEVICE_NAMES)),
        "candidate": rng.choice((0, 0, rng.randrange(1, 5000))),
        "again": rng.random() < 0.15,
        "batch": rng.choice((0, 0, 0, 0, 0, 0, 0, 0, 1, 8)),
    }


def frozen(rng: random.Random, names: Sequence[str]) -> tuple[str, ...]:
    """Operands that ask for no gradient: mostly none, sometimes all."""
    kind = rng.random()
    if kind < 0.6:
        return ()
    if kind < 0.75:
        return tuple(names)
    return tuple(name for name in names if rng.random() < 0.5)
