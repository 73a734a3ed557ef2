"""The plan of a depthwise convolution and the 1x1 that follows in one kernel: numbers in, plan out, as in `plan`."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass, replace
from functools import lru_cache
from math import prod
from typing import TYPE_CHECKING, NamedTuple

from . import choose, config, cost, invariance, plan, recovery, stored
from .config import ITEM_BYTES, Config, Numerics
from .cost import Prediction, Roofline
from .devices import Device
from .forks import cached_property
from .frozen import PlanOfProblem
from .geometry import ConvGeometry, Role, Strides

if TYPE_CHECKING:
    from .kernels.launch import Launch

DTYPES = ("float16", "bfloat16", "float32", "float64")
MOST_COLUMNS = 7  # of a filter: they are unrolled
# Devices on which the fused kernel has been measured to win where it is predicted to: none yet.
MEASURED: frozenset[str] = frozenset()


class Problem(NamedTuple):
    """What a plan depends on. Strides are of (N, C, D, H, W), (E, 1, T, R, S), (K, E, 1, 1, 1), (N, K, Z, P, Q)."""

    depthwise: ConvGeometry
    K: int
    dtype: str
    precision: str
    x: tuple[int, ...]
    filters: tuple[int, ...]
    pointwise: tuple[int, ...]
    y: tuple[int, ...]
    has_depthwise_bias: bool
    has_bias: bool
    device: Device


@dataclass(frozen=True)
class SeparablePlan(PlanOfProblem):
    """The fused kernel and everything it is launched with."""

    problem: Problem
    config: Config
    numerics: Numerics

    role = Role.FPROP
    kernel = "separable"
    workspace_bytes = 0

    @property
    def asked(self) -> ConvGeometry:
        return self.problem.depthwise

    @property
    def N(self) -> int:
        return self.asked.N

    @property
    def compiled_for(self) -> Hashable:
        """All that its kernel's code depends on beside its config."""
        p, g = self.problem, self.problem.depthwise
        return (
            p.dtype,
            p.precision,
            g.filter,
            g.stride,
            g.dilation,
            g.modes,
            g.C,
            p.K,
            p.x[1],
            self.numerics,
            p.has_bias,
        )

    @property
    def reason(self) -> str:
        return "tiles by rule"

    @property
    def pointwise(self) -> ConvGeometry:
        g = self.problem.depthwise
        return ConvGeometry.forward((g.N, g.K, *g.output), (self.problem.K, g.K, 1, 1, 1))

    @property
    def dtypes(self) -> dict[str, str]:
        """The dtype of every operand that a launch may name."""
        return dict.fromkeys(("x", "depthwise", "depthwise_bias", "pointwise", "bias", "y"), self.dtype)

    @cached_property
    def launches(self) -> tuple[Launch, ...]:
        from .kernels import separable

        p = self.problem
        strides = {"x": p.x, "depthwise": p.filters, "pointwise": p.pointwise, "y": p.y}
        return (separable.launch(p.depthwise, self.pointwise, strides, self.config, self.numerics, p.has_bias),)

    @cached_property
    def roofline(self) -> Roofline:
        """The least time of both parts, if nothing between them is moved."""
        p, device = self.problem, self.problem.device
        parts = [cost.roofline(g, Role.FPROP, p.dtype, p.precision, device) for g in (p.depthwise, self.pointwise)]
        between = 2 * prod(self.pointwise.shape("x")) * ITEM_BYTES[p.dtype]
        moved = sum(part.bytes for part in parts) - between
        moving = moved / device.bandwidth
        computing = [part.seconds if part.limit != "memory bandwidth" else 0.0 for part in parts]
        slowest = max(computing)
        limit = "memory bandwidth" if moving >= slowest else parts[computing.index(slowest)].limit
        return Roofline(sum(part.flops for part in parts), moved, limit, max(moving, slowest))

    @cached_property
    def prediction(self) -> Prediction:
        """The predicted time: of sums without a dot, once for each tile of channels, then of dots, beside memory."""
        p, g, c, device = self.problem, self.problem.depthwise, self.config, self.problem.device
        tiles_m = -(-g.N * prod(g.output) // c.BLOCK_M)
        tiles_n = -(-p.K // c.BLOCK_N)
        blocks = -(-g.K // c.BLOCK_K)
        item, tiles = ITEM_BYTES[p.dtype], tiles_m * tiles_n
        values = tiles * blocks * c.BLOCK_K * c.BLOCK_M
        vector = 16 // item if p.x[1] == 1 and g.C % (16 // item) == 0 else 1
        issued = g.taps * (2 + cost.ADDRESS / vector)  # a product and a widening for each, and loads
        slots = cost.LANES * device.clock * device.multiprocessors * cost.ISSUED
        adding = (values * issued + tiles * 32 * c.num_warps * cost.START) / slots
        matrix = cost._matrix_rate(p.dtype, p.precision, device) * cost.MATRIX_SHARE
        flops = 2 * tiles * c.BLOCK_M * c.BLOCK_N * blocks * c.BLOCK_K
        multiplying = flops / (matrix or cost._vector_rate(p.dtype, device) * cost.VECTOR_SHARE)
        registers = min(cost.REGISTERS + (c.BLOCK_M * (c.BLOCK_N + 3 * c.BLOCK_K)) // (32 * c.num_warps), 255)
        resident = max(device.registers // (registers * 32 * c.num_warps), 1)
        waves = -(-tiles // (resident * device.multiprocessors))
        fullest = waves * resident * device.multiprocessors / tiles if waves == 1 else 1.0
        loop = (adding + multiplying) * min(fullest, device.multiprocessors) + cost.TILE * waves
        memory = self.roofline.bytes / (device.bandwidth * cost.MEMORY_SHARE)
        return Prediction(
            seconds=max(loop, memory) + cost.LAUNCH,
            tiles=tiles,
            waves=waves,
            resident=resident,
            useful=self.roofline.flops / max(flops + 2 * values * g.taps, 1),
            loop_seconds=loop,
            compute_seconds=multiplying,
            l2_seconds=values * g.taps * item / device.l2_bandwidth,
            memory_seconds=memory,
        )

    @cached_property
    def apart(self) -> tuple[plan.Plan, plan.Plan]:
        """The plans of two convolutions that compute the same, one after the other."""
        p, g = self.problem, self.problem.depthwise
        between = plan.dense_strides(self.pointwise.shape("x"), p.y[1] == 1)

        def made(g: ConvGeometry, strides: Strides, has_bias: bool) -> plan.Plan:
            what = (Role.FPROP, g, p.dtype, p.dtype, strides, p.precision, has_bias)
            return plan.make(plan.Problem(*what, has_scale=False, aligned=True, device=p.device))

        return (
            made(g, Strides(p.x, p.filters, between), p.has_depthwise_bias),
            made(self.pointwise, Strides(between, p.pointwise, p.y), p.has_bias),
        )

    @property
    def worth_it(self) -> bool:
        """Whether one kernel is predicted to take a good deal less time than two, and measured on this device."""
        if invariance.batch() is not None:  # the prediction is of the call's own batch
            return False
        faster = self.seconds < choose.WORTH_LEAVING * sum(part.seconds for part in self.apart)
        return faster and self.problem.device.name in MEASURED

    def __str__(self) -> str:
        p, numerics = self.problem, self.numerics
        lines = [
            f"kernel     {self.kernel} (both convolutions)",
            f"geometry   {p.depthwise}, then {p.K} channels",
            f"config     {self.config}",
            f"numbers    {p.dtype} products, {numerics.accumulator} accumulator, {numerics.index_bits}-bit offsets",
            f"reason     {1e6 * self.seconds:.3g} us predicted, against {self._times()} us of two kernels; "
            f"{'' if p.device.name in MEASURED else 'not '}measured on {p.device.name}",
        ]
        return "\n".join(lines)

    def _times(self) -> str:
        return " + ".join(f"{1e6 * part.seconds:.3g}" for part in self.apart)


def obstacle(dtype: str, g: ConvGeometry) -> str | None:
    """What the fused kernel cannot do, in words; None if nothing is in its way."""
    if dtype not in DTYPES:
        return f"it has no sums of {dtype}"
    if g.filter[2] > MOST_COLUMNS:
        return f"it unrolls at most {MOST_COLUMNS} columns of a filter"
    return None


def make(problem: Problem) -> SeparablePlan:
    """The plan of a problem without an obstacle; the second time it is a look-up."""
    return _make(problem, stored.generation())


@lru_cache(maxsize=4096)
def _make(problem: Problem, _generation: Hashable) -> SeparablePlan:
    p, g = problem, problem.depthwise
    return recovery.first(problem, (_assembled(p, g, config) for config in _configs(g, p.K, p.dtype, p.precision)))


def _assembled(p: Problem, g: ConvGeometry, made: Config) -> SeparablePlan:
    plan.counted(Role.FPROP, g, made)
    spans = [
        max(i + sum(pads) for i, pads in zip(g.input, g.padding, strict=True)),
        plan.span(g.shape("x"), p.x),
        plan.span((g.N, p.K, *g.output), p.y),
        plan.span(g.shape("w"), p.filters),
        plan.span((p.K, g.K, 1, 1, 1), p.pointwise),
        g.N * prod(g.output) + made.BLOCK_M,
    ]
    bits = 64 if max(spans) >= 2**31 else 32
    return SeparablePlan(p, made, Numerics(bits, plan.ACCUMULATORS[p.dtype], p.precision, p.has_depthwise_bias))


def _configs(g: ConvGeometry, K: int, dtype: str, precision: str) -> tuple[Config, Config]:
    """Tiles by rule, then small ones for where these cannot run."""
    rule = _config(g, K, dtype, precision)
    return rule, replace(rule, BLOCK_M=16, BLOCK_N=16, BLOCK_K=16)


def _config(g: ConvGeometry, K: int, dtype: str, precision: str) -> Config:
    """Tiles by rule: sums of taps and accumulator share the registers of 128 threads."""
    costly = dtype == "float64" or (dtype == "float32" and precision != "tf32")
    wide = ITEM_BYTES[dtype] > 2
    block_n = config._tile(K, 16, 32 if costly else 64 if wide else 128)
    block_k = config._tile(g.K, 16, 16 if wide else 32)
    return Config(32 if costly else 64, block_n, block_k, num_warps=4, num_stages=1)
