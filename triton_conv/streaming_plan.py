"""The plan of a causal convolution whose first frames are in a second tensor: numbers in, plan out, as in `plan`.

An output frame has the same bits in whatever chunk it is computed. So kernel and config are chosen for a fixed number
of frames, not for the call's own, and no axis is folded away because a chunk is one frame long. What is copied before
the kernel runs depends on the call, and changes no value.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator
from dataclasses import dataclass, replace
from functools import lru_cache
from math import prod
from typing import TYPE_CHECKING, Any, NamedTuple

from . import choose, cost, invariance, plan, recovery, stored, ways
from . import config as configs
from . import key as keys
from .config import ITEM_BYTES, BoxConfig, Config, KernelConfig, Numerics
from .conv_plan import fused_words
from .cost import Prediction, Roofline
from .devices import Device
from .epilogue import PLAIN, Epilogue
from .forks import cached_property
from .frozen import PlanOfProblem
from .geometry import Context, ConvGeometry, Role, Strides
from .tiles import ceil_div
from .ways import Layout, Way, dense_strides

if TYPE_CHECKING:
    from .kernels.launch import Launch

DTYPES = ("float16", "bfloat16", "float32", "float64")

# Plans are made for so many output frames, and for at least so many positions in them: a sequence has one each.
_FRAMES = 4
_POSITIONS = 4096


class Problem(NamedTuple):
    """What a plan depends on, and the key it is cached under.

    `geometry` is that of all frames in a row, those of the context first. Strides are of (N, C, D, H, W) for x,
    (K, C / groups, T, R, S) and (N, K, Z, P, Q). `unaligned` names those of "x", "context" and "w" that do not start
    at a multiple of 16 bytes; `moves_residual` says that the epilogue's residual does not lie as y does. `scale_dtype`
    is as in `ways.Problem`.
    """

    geometry: ConvGeometry
    context: Context
    dtype: str
    precision: str
    x: tuple[int, ...]
    filters: tuple[int, ...]
    y: tuple[int, ...]
    has_bias: bool
    unaligned: tuple[str, ...]
    device: Device
    epilogue: Epilogue = PLAIN
    moves_residual: bool = False
    scale_dtype: str = ""

    def shape(self, name: str) -> tuple[int, ...]:
        """The five extents of "x", "context" or "w" in memory."""
        g = self.geometry
        if name == "w":
            return g.shape("w")
        frames = self.context.held if name == "context" else g.input[0] - self.context.frames
        return (g.N, g.C, frames, *g.input[1:])

    def strides(self, name: str) -> tuple[int, ...]:
        return {"x": self.x, "context": self.context.strides, "w": self.filters}[name]

    def __str__(self) -> str:
        held, frames = self.context.held, self.context.frames
        before = "none" if not frames else f"{frames} frames" if held == frames else f"one frame {frames} times"
        return f"{self.geometry}  context {before}"


@dataclass(frozen=True)
class StreamingPlan(PlanOfProblem):
    """A kernel and everything it is launched with. `packs` names the tensors that are copied to channels-last."""

    problem: Problem
    kernel: str
    config: KernelConfig
    numerics: Numerics
    packs: tuple[str, ...]
    reason: str

    role = Role.FPROP

    @property
    def asked(self) -> ConvGeometry:
        return self.problem.geometry

    @property
    def geometry(self) -> ConvGeometry:
        return self.problem.geometry

    @property
    def N(self) -> int:
        return self.asked.N

    @property
    def context(self) -> Context:
        """The context as the kernel reads it."""
        given = self.problem.context._replace(aligned=not {"x", "context"} & {*self.problem.unaligned})
        if "context" not in self.packs:
            return given
        strides = dense_strides(self.problem.shape("context"), channels_last=True)
        return given._replace(strides=(*strides[:2], strides[2] if given.strides[2] else 0, *strides[3:]))

    @property
    def strides(self) -> Strides:
        """Those of x, filters and output as the kernel reads and writes them."""
        p = self.problem
        read = {name: dense_strides(p.shape(name), channels_last=True) for name in ("x", "w") if name in self.packs}
        return Strides(p.x, p.filters, p.y)._replace(**read)

    @property
    def compiled_for(self) -> Hashable:
        """All that its kernels' code depends on beside their config."""
        channels_last = ways.reads_channels_last(self.role, self.strides)
        key = keys.of(self.geometry, self.role, self.dtype, self.dtype, self.numerics.precision, channels_last)[0]
        return key._replace(pixels=0), self.numerics, self.context.held > 0, self.problem.scale_dtype

    @property
    def dtypes(self) -> dict[str, str]:
        """The dtype of every operand that a launch may name."""
        operands = dict.fromkeys(("x", "context", "w", "bias", "residual", "y"), self.dtype)
        return operands | {"scale": self.problem.scale_dtype or self.dtype}

    @property
    def workspace_bytes(self) -> int:
        """Device memory beyond inputs and output, in bytes."""
        return sum(self._copies.values())

    @property
    def _copies(self) -> dict[str, int]:
        """The size in bytes of every tensor that stands for another."""
        copies = {name: prod(self.problem.shape(name)) for name in self.packs}
        if self.problem.moves_residual:
            copies["residual"] = prod(self.geometry.shape("y"))
        return {name: elements * ITEM_BYTES[self.dtype] for name, elements in copies.items()}

    @cached_property
    def launches(self) -> tuple[Launch, ...]:
        """What runs, in order; needs Triton, and is first asked for when TRITON_INTERPRET can no longer be set."""
        from .kernels import box, gather

        what = (self.role, self.geometry, self.strides, self.config, self.numerics)
        if self.kernel == "box":
            vector = 16 // ITEM_BYTES[self.dtype]
            return (box.launch(*what, self.device, vector, context=self.context),)
        return (gather.launch(*what, context=self.context),)

    @cached_property
    def roofline(self) -> Roofline:
        """The least time of what the plan computes, by whatever kernel."""
        what = (self.role, self.dtype, self.numerics.precision, self.device, self.dtype)
        return cost.roofline(self.asked, *what, self.numerics.epilogue)

    @cached_property
    def prediction(self) -> Prediction:
        """The predicted time of the kernel."""
        rows = ways.reads_channels_last(self.role, self.strides)
        what = (self.geometry, self.role, self.kernel, self.config, self.dtype, self.numerics.precision, self.device)
        return cost.predict(*what, rows, self.dtype, self.numerics.epilogue)

    @property
    def steps(self) -> tuple[str, ...]:
        """What happens beside the kernel, here and in the backward pass."""
        copies = tuple(f"copy {_WORDS[name]} to channels-last" for name in self.packs)
        backward = "backward: dx and the context's gradient are views of one input gradient"
        if self.problem.context.held == self.problem.context.frames > 0:
            backward += ", context and x are concatenated for the weight gradient"
        return (*copies, backward)

    def __str__(self) -> str:
        numerics = self.numerics
        copies = ", ".join(f"a copy of {name}" for name in self._copies)
        dot = self.dtype == "float32" and getattr(self.config, "dot", True)
        products = f"float32 products as {numerics.precision}" if dot else f"{self.dtype} products"
        fused = fused_words(numerics.epilogue, numerics.has_bias)
        lines = [
            f"kernel     {self.kernel} ({self.role.value} of context and x, not concatenated)",
            f"geometry   {self.problem}",
            f"config     {self.config}",
            f"numbers    {products}, {numerics.accumulator} accumulator, {numerics.index_bits}-bit offsets",
            *([f"epilogue   {fused}"] if fused else []),
            f"layout     {'; '.join(self.steps)}",
            f"workspace  {self.workspace_bytes} bytes{f' ({copies})' if copies else ''}",
            f"reason     {self.reason}",
        ]
        return "\n".join(lines)


_WORDS = {"x": "the input", "context": "the context", "w": "the filters"}


def make(problem: Problem) -> StreamingPlan:
    """The plan of a problem; the second time it is a look-up. Raises RuntimeError for a config that cannot run it."""
    return _make(problem, configs.chosen(Role.FPROP), stored.generation(), invariance.batch())


@lru_cache(maxsize=4096)
def _make(problem: Problem, explicit: KernelConfig | None, generation: Hashable, batch: int | None) -> StreamingPlan:
    alike = _of_fixed_length(problem, problem.geometry.N if batch is None else batch)
    if explicit is not None:
        return _assembled(problem, _chosen(alike, explicit, generation))
    return recovery.first(problem, (_assembled(problem, way) for way in _candidates(alike)))


def _candidates(alike: ways.Problem) -> Iterator[Way]:
    """Ways in the order in which they are tried: each is for where those before it cannot run."""

    def look() -> Way:
        return _chosen(alike, None, stored.generation())

    yield look()
    for way in recovery.sources(look):
        yield way
        yield way._replace(config=choose.smallest(way.config, alike.dtype))
    given = Layout((), True, 1, alike.geometry, alike.strides, ())
    last = _for_any_length(_gathered(alike, given, None, "nothing else could run"))
    yield last
    yield last._replace(config=choose.smallest(last.config, alike.dtype))


def _assembled(p: Problem, way: Way) -> StreamingPlan:
    g = p.geometry
    read = [name for name in _WORDS if name != "context" or p.context.held]
    fits = _fits_a_box if way.kernel == "box" else _in_rows if way.layout.packs else _as_it_lies
    packs = tuple(name for name in read if not fits(p, name))
    numerics = Numerics(32, plan.ACCUMULATORS[p.dtype], p.precision, p.has_bias, epilogue=p.epilogue)
    plan.counted(Role.FPROP, g, way.config)
    made = StreamingPlan(p, way.kernel, way.config, numerics, packs, way.reason)
    reach = max(
        plan._reach(g, made.strides, Role.FPROP, way.config),
        plan.span((g.N, g.C, made.context.frames, *g.input[1:]), made.context.strides),
    )
    return replace(made, numerics=numerics._replace(index_bits=64)) if reach >= 2**31 else made


def asked_as(p: Problem) -> tuple[ways.Problem, Layout]:
    """The ordinary problem, and its layout, whose stored config a plan's kernel takes: of a fixed number of frames."""
    alike = _of_fixed_length(p, p.geometry.N)
    return alike, Layout((), True, 1, alike.geometry, alike.strides, ())


def _of_fixed_length(p: Problem, N: int) -> ways.Problem:
    """The same convolution of as many frames as plans are made for, in one dense tensor.

    x is channels-last in it where the call's is. Nobody can tell that of a chunk of one frame of one position: there it
    never is.
    """
    g = p.geometry
    frames = max(_FRAMES, ceil_div(_POSITIONS, prod(g.output[1:])))
    reach = g.dilation[0] * (g.filter[0] - 1) + 1
    one = replace(
        g,
        N=N,
        input=(reach + (frames - 1) * g.stride[0], *g.input[1:]),
        output=(frames, *g.output[1:]),
        padding=((0, 0), *g.padding[1:]),
        modes=("zeros", *g.modes[1:]),
    )
    rows = p.x[1] == 1 and g.C > 1 and prod(g.input[1:]) > 1
    strides = Strides(dense_strides(one.shape("x"), rows), p.filters, dense_strides(one.shape("y"), rows))
    return ways.Problem(
        Role.FPROP,
        one,
        p.dtype,
        p.dtype,
        strides,
        p.precision,
        p.has_bias,
        has_scale=False,
        aligned=True,
        device=p.device,
        epilogue=p.epilogue,
    )


@lru_cache(maxsize=4096)
def _chosen(problem: ways.Problem, explicit: KernelConfig | None, _generation: Hashable) -> Way:
    """The way of least predicted time, or the one of an explicit config."""
    g, strides = problem.geometry, problem.strides
    packs = ways._not_channels_last(g, strides, Role.FPROP)
    dense = {name: dense_strides(g.shape(name), channels_last=True) for name in packs}
    given = Layout((), True, 1, g, strides, ())
    copied = Layout(packs, True, 1, g, strides._replace(**dense), ())
    obstacle = _box_obstacle(problem, copied)
    if isinstance(explicit, BoxConfig):
        misfit = obstacle or ways._box_misfit(problem, explicit, g)
        if misfit or explicit.box[1] > 1:
            raise RuntimeError(f"a box config was given for {g}, but {misfit or 'its box is more than one frame'}")
        return Way("box", copied, explicit, "config given explicitly")
    gathered = _gathered(problem, given, explicit if isinstance(explicit, Config) else None, obstacle)
    if isinstance(explicit, Config) or (obstacle and "x" not in packs):
        return _for_any_length(gathered)
    other = _gathered(problem, copied, None, obstacle) if obstacle else _boxed(problem, copied)
    first, second = (gathered, other) if "x" in packs else (other, gathered)
    times = [_seconds(problem, way) for way in (first, second)]
    worth = times[1] < choose.WORTH_LEAVING * times[0]
    best, left = (second, first) if worth else (first, second)
    ours, theirs = reversed(times) if worth else times
    after = " after copies" if "x" in left.layout.packs else ""
    against = f"{1e6 * ours:.3g} us predicted, against {1e6 * theirs:.3g} us of {left.kernel}{after}"
    return _for_any_length(best._replace(reason=f"{best.reason}; {against}"))


def _for_any_length(way: Way) -> Way:
    frames = way.layout.geometry.output[0]
    return way._replace(reason=f"{way.reason}; chosen for {frames} frames, whatever their number")


def _box_obstacle(problem: ways.Problem, layout: Layout) -> str | None:
    if prod(layout.geometry.output[1:]) == 1:
        return "a box is of one frame, which has one position"
    return ways._box_obstacle(problem, layout)


def _gathered(problem: ways.Problem, layout: Layout, explicit: Config | None, obstacle: str | None) -> Way:
    """Where time is the only axis with smaller tiles: addresses in two tensors, for every pixel, spill larger ones."""
    way = ways._gathered(problem, layout, explicit, obstacle)
    config: Any = way.config
    if explicit is None and prod(layout.geometry.output[1:]) == 1:
        config = replace(config, BLOCK_N=min(config.BLOCK_N, max(64 * 64 // config.BLOCK_M, 16)))
    return way._replace(config=config)


def _boxed(problem: ways.Problem, layout: Layout) -> Way:
    """With a box of one frame, so that a tap of a tile is in the context or in x, not in both."""
    way, g = ways._boxed(problem, layout), layout.geometry
    config: Any = way.config
    if config.box[1] > 1:
        config = replace(config, box=configs.little_waste((g.N, 1, *g.output[1:]), config.BLOCK_M))
    # two loops have more addresses, which after Hopper spill where planes are stored and where operands are wide
    if problem.device.capability >= 100 and (problem.strides.y[1] != 1 or ITEM_BYTES[problem.dtype] > 2):
        config = replace(config, num_stages=min(config.num_stages, 3))
    return way._replace(config=config)


def _seconds(problem: ways.Problem, way: Way) -> float:
    g, item = problem.geometry, ITEM_BYTES[problem.dtype]
    rows = ways.reads_channels_last(Role.FPROP, way.layout.strides)
    what = (g, Role.FPROP, way.kernel, way.config, problem.dtype, problem.precision, problem.device, rows)
    fused = (problem.dtype, problem.epilogue)
    copies = sum(cost.copy_seconds(prod(g.shape(name)) * item, problem.device) for name in way.layout.packs)
    return cost.predict(*what, *fused).seconds + copies


def _as_it_lies(p: Problem, name: str) -> bool:
    return True


def _in_rows(p: Problem, name: str) -> bool:
    """Whether the channels of an operand lie side by side."""
    return p.strides(name)[1] == 1 or p.shape(name)[1] == 1


def _fits_a_box(p: Problem, name: str) -> bool:
    """Whether the copy engine can fetch boxes of an operand as it lies."""
    g, vector, strides = p.geometry, 16 // ITEM_BYTES[p.dtype], p.strides(name)
    if name in p.unaligned or strides[1] != 1:
        return False
    there = [s for axis, (s, n) in enumerate(zip(strides, p.shape(name), strict=True)) if axis != 1 and n > 1]
    if min(there, default=1) <= 0 or not ways.describes(max(there, default=1), g, p.dtype):
        return False
    if name == "w":
        step = ways.tap_step(g, Strides(p.x, p.filters, p.y))
        return step is not None and step % vector == 0 and strides[0] % vector == 0
    return all(s % vector == 0 for s in there)
