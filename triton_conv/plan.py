"""Every dispatch decision, as a pure function of numbers: geometry, role, dtype, strides and device in, plan out.

A plan prints itself (`str(plan)`); `triton-conv explain` shows it without a GPU.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property, lru_cache
from math import prod
from typing import TYPE_CHECKING, NamedTuple

from . import choose, cost, tiles
from . import config as configs
from .choose import AnyConfig
from .config import ITEM_BYTES, BoxConfig, Config, Device, Numerics
from .cost import Prediction, Roofline
from .geometry import ConvGeometry, Role, Strides, canonical, describable, tap_step

if TYPE_CHECKING:
    from .kernels.launch import Launch

# Accumulators by dtype; a dtype that is not here has no kernel. Complex runs as real convolutions.
ACCUMULATORS = {
    "float8_e4m3fn": "float32",
    "float16": "float32",
    "bfloat16": "float32",
    "float32": "float32",
    "float64": "float64",
    "uint8": "int32",
    "int8": "int32",
    "int16": "int32",
    "int32": "int32",
    "int64": "int64",
}


class Problem(NamedTuple):
    """What a plan depends on, and the key it is cached under.

    `dtype` is that of both operands, `out_dtype` that of output and bias. `precision` says how float32 is multiplied
    ("ieee", "tf32", "tf32x3") and is "ieee" for every other dtype; `aligned` says that every tensor starts at a
    multiple of 16 bytes; `has_scale` that the sum is multiplied by two scales.
    """

    role: Role
    geometry: ConvGeometry
    dtype: str
    out_dtype: str
    strides: Strides
    precision: str
    has_bias: bool
    has_scale: bool
    aligned: bool
    device: Device


@dataclass(frozen=True)
class Fold:
    """The second step of an input gradient whose padding is not zeros: border positions add up onto dx."""

    geometry: ConvGeometry
    padded_shape: tuple[int, ...]
    padded_strides: tuple[int, ...]
    dx_strides: tuple[int, ...]
    numerics: Numerics


@dataclass(frozen=True)
class Plan:
    """A kernel and everything it is launched with, for tensors of any address.

    `geometry` and `strides` are canonical: they describe the same memory as the caller's tensors, in fewer axes.
    `packs` names the tensors that are copied to channels-last first.
    """

    kernel: str
    role: Role
    dtype: str
    out_dtype: str
    geometry: ConvGeometry
    strides: Strides
    config: Config | BoxConfig
    numerics: Numerics
    device: Device
    packs: tuple[str, ...]
    steps: tuple[str, ...]
    fold: Fold | None
    workspace_shape: tuple[int, ...]
    workspace_dtype: str
    reason: str

    @property
    def dtypes(self) -> dict[str, str]:
        """The dtype of every operand that a launch may name."""
        output = {Role.FPROP: "y", Role.DGRAD: "x", Role.WGRAD: "w"}[self.role]
        operands = dict.fromkeys(("x", "w", "y"), self.dtype) | {output: self.out_dtype, "bias": self.out_dtype}
        return operands | {"scale_a": "float32", "scale_b": "float32", "workspace": self.workspace_dtype}

    @property
    def workspace_bytes(self) -> int:
        """Device memory beyond inputs and output, in bytes."""
        copies = sum(prod(self.geometry.shape(name)) for name in self.packs) * ITEM_BYTES[self.dtype]
        workspace = prod(self.workspace_shape) if self.workspace_shape else 0
        return copies + workspace * ITEM_BYTES[self.workspace_dtype]

    @cached_property
    def launches(self) -> tuple[Launch, ...]:
        """What runs, in order; needs Triton, and is first asked for when TRITON_INTERPRET can no longer be set."""
        from .kernels import box, box_wgrad, fold, gather, wgrad

        what = (self.geometry, self.strides, self.config, self.numerics)
        if self.role is Role.WGRAD:
            return tuple((box_wgrad if self.kernel == "box_wgrad" else wgrad).launches(*what))
        into = "workspace" if self.fold else ""
        if self.kernel == "box":
            first = box.launch(self.role, *what, self.device, into)
        else:
            first = gather.launch(self.role, *what, into)
        if self.fold is None:
            return (first,)
        f = self.fold
        return first, fold.launch(f.geometry, f.numerics, f.padded_strides, f.dx_strides)

    @cached_property
    def roofline(self) -> Roofline:
        """The least time of what the plan computes, by whatever kernel."""
        what = (self.role, self.dtype, self.numerics.precision, self.device, self.out_dtype)
        whole = self.fold.geometry if self.fold else self.geometry
        return cost.roofline(whole, *what)

    @cached_property
    def prediction(self) -> Prediction:
        """The predicted time of the kernel."""
        channels_last = _channels_last(self.strides)
        what = (self.geometry, self.role, self.kernel, self.config, self.dtype, self.numerics.precision, self.device)
        return cost.predict(*what, channels_last, self.out_dtype)

    @cached_property
    def seconds(self) -> float:
        """The predicted time of everything: copies, kernel and fold."""
        sizes = [prod(self.geometry.shape(name)) * ITEM_BYTES[self.dtype] for name in self.packs]
        folding = cost.fold_seconds(self.fold.geometry, self.dtype, self.device) if self.fold else 0.0
        return sum(cost.copy_seconds(size, self.device) for size in sizes) + self.prediction.seconds + folding

    def __str__(self) -> str:
        numerics = self.numerics
        lines = [
            f"kernel     {self.kernel} ({self.role.value})",
            f"geometry   {self.geometry}",
            f"config     {self.config}",
            f"numbers    {self._products()}, {numerics.accumulator} accumulator, {numerics.index_bits}-bit offsets",
            f"layout     {'; '.join(self.steps) if self.steps else 'as given, no copies'}",
            f"workspace  {self.workspace_bytes} bytes{self._workspace_use()}",
            f"reason     {self.reason}",
        ]
        return "\n".join(lines)

    def _products(self) -> str:
        dot = self.dtype == "float32" and (isinstance(self.config, BoxConfig) or self.config.dot)
        products = f"float32 products as {self.numerics.precision}" if dot else f"{self.dtype} products"
        return products if self.out_dtype == self.dtype else f"{products} to {self.out_dtype}"

    def _workspace_use(self) -> str:
        uses = [f"a copy of {name}" for name in self.packs]
        if self.fold is not None:
            uses.append("the gradient of the padded input, folded onto dx")
        elif self.workspace_shape:
            uses.append(f"{self.config.splits} slabs of dw, summed in order")
        return f" ({'; '.join(uses)})" if uses else ""


def make(problem: Problem) -> Plan:
    """The plan of a problem; the second time it is a look-up."""
    return _make(problem, configs.chosen(problem.role))


@lru_cache(maxsize=4096)
def _make(problem: Problem, explicit: Config | BoxConfig | None) -> Plan:
    role, geometry, strides = problem.role, problem.geometry, problem.strides
    if problem.dtype == "float8_e4m3fn" and problem.device.capability < 89:
        raise NotImplementedError(
            f"{problem.device.name} has no float8_e4m3fn arithmetic, which came with compute capability 8.9: {geometry}"
        )
    accumulator = ACCUMULATORS[problem.dtype]
    folds = role is Role.DGRAD and any(mode != "zeros" for mode in geometry.modes)
    original = geometry.padded() if folds else geometry
    if folds:
        padded_shape = original.shape("x")
        padded_strides = dense_strides(padded_shape, channels_last=strides.x[1] == 1)
        strides = strides._replace(x=padded_strides)
    bias_on_c = problem.has_bias and role is Role.DGRAD and not folds

    given = _laid_out(original, strides, role, (), bias_on_c)
    copied = _laid_out(original, strides, role, _not_channels_last(original, strides, role), bias_on_c)
    obstacle = _box_obstacle(problem, copied)
    if explicit is None and not obstacle and set(copied.packs) - {"w"}:
        obstacle = _costly_copies(problem, given, copied)
    if explicit is None and not obstacle and role is Role.WGRAD:
        obstacle = _idle_runs(copied.geometry)
    config: Config | BoxConfig
    if isinstance(explicit, Config) or (obstacle and explicit is None):
        layout = given
        config, why = _gather_config(problem, layout, explicit, obstacle)
        kernel = "wgrad" if role is Role.WGRAD else "gather"
    else:
        layout = copied
        config = explicit or _box_config(problem, layout)
        misfit = obstacle or _box_misfit(config, problem.dtype, role, layout.geometry)
        if misfit:
            raise RuntimeError(f"a box config was given for {geometry}, but {misfit}")
        why = "channels-last on a device with the bulk tensor copy engine"
        why += "" if explicit else f"; {_tiles_for(problem)}"
        kernel = "box_wgrad" if role is Role.WGRAD else "box"
    packs, inner, inner_strides, steps = layout
    if explicit is not None:
        why += "; config given explicitly"

    bits = 64 if _reach(inner, inner_strides, role, config) >= 2**31 else 32
    numerics = Numerics(bits, accumulator, problem.precision, problem.has_bias and not folds, problem.has_scale)
    fold: Fold | None = None
    workspace: tuple[int, ...] = ()
    if folds:
        span = max(_span(padded_shape, padded_strides), _span(geometry.shape("x"), problem.strides.x))
        fold_numerics = Numerics(64 if span >= 2**31 else 32, accumulator, "ieee", problem.has_bias)
        fold = Fold(geometry, padded_shape, padded_strides, problem.strides.x, fold_numerics)
        workspace = padded_shape
        steps = ("compute dx on the padded extents, then fold the border", *steps)
    elif config.splits > 1:
        workspace = (config.splits, *geometry.shape("w"))
    return Plan(
        kernel,
        role,
        problem.dtype,
        problem.out_dtype,
        inner,
        inner_strides,
        config,
        numerics,
        problem.device,
        packs,
        steps,
        fold,
        workspace,
        accumulator,
        why,
    )


class _Layout(NamedTuple):
    """A canonical problem, once the tensors in `packs` have been copied to channels-last."""

    packs: tuple[str, ...]
    geometry: ConvGeometry
    strides: Strides
    steps: tuple[str, ...]


_WORDS = {"x": "the input", "w": "the filters", "y": "the output's gradient"}


def _laid_out(g: ConvGeometry, strides: Strides, role: Role, packs: tuple[str, ...], keep_channels: bool) -> _Layout:
    strides = strides._replace(**{name: dense_strides(g.shape(name), True) for name in packs})
    copies = tuple(f"copy {_WORDS[name]} to channels-last" for name in packs)
    inner, inner_strides, steps = canonical(g, strides, role, keep_channels)
    return _Layout(packs, inner, inner_strides, copies + steps)


def _not_channels_last(g: ConvGeometry, strides: Strides, role: Role) -> tuple[str, ...]:
    """The operands that a box kernel could not fetch as they lie."""
    operands = {Role.FPROP: ("x", "w"), Role.DGRAD: ("y", "w"), Role.WGRAD: ("x", "y")}[role]
    return tuple(name for name in operands if getattr(strides, name)[1] != 1 and g.shape(name)[1] > 1)


def _costly_copies(problem: Problem, given: _Layout, copied: _Layout) -> str | None:
    """Why activations are gathered as they lie rather than copied to channels-last; None where the copy pays."""
    return "activations are not channels-last"


def _gather_config(problem: Problem, layout: _Layout, explicit, obstacle) -> tuple[Config, str]:
    _, g, strides, _ = layout
    why = f"pointer gather, since {obstacle}" if obstacle else "pointer gather"
    if explicit is not None:
        shallow = _too_shallow(explicit, problem.dtype)
        if shallow:
            raise RuntimeError(f"a config was given for {g}, but {shallow}")
        return explicit, why
    vectorised = _vectorised(g, strides)
    rule = configs.default(g, problem.role, problem.dtype, problem.precision, vectorised, problem.device)
    config = _quickest(problem, "wgrad" if problem.role is Role.WGRAD else "gather", rule, layout)
    if not config.dot:
        narrow = configs.multiplies_matrices(problem.dtype, problem.role)
        why += "; " + ("groups are too narrow for a dot" if narrow else "integers have no matrix instruction here")
        why += ", so products are summed in registers"
    return config, f"{why}; {_tiles_for(problem)}"


def _quickest(problem: Problem, kernel: str, rule: AnyConfig, layout: _Layout) -> AnyConfig:
    how = (problem.dtype, problem.precision, problem.device, _channels_last(layout.strides))
    return choose.quickest(kernel, rule, layout.geometry, problem.role, *how)


def _tiles_for(problem: Problem) -> str:
    return f"tiles by predicted time for {problem.device.name}"


def _needs_whole_blocks(role: Role, g: ConvGeometry) -> bool:
    """Whether a reduction block past a group's last channel would read another group's, or another column's."""
    return g.groups > 1 or g.axes(role)[2].src_step > 1


def _too_shallow(config: Config | BoxConfig, dtype: str) -> str | None:
    least = configs.least_reduction(dtype)
    if (isinstance(config, BoxConfig) or config.dot) and least > config.BLOCK_K:
        return f"its BLOCK_K {config.BLOCK_K} is below the {least} of a dot of {dtype}"
    return None


def _box_misfit(config: BoxConfig, dtype: str, role: Role, g: ConvGeometry) -> str | None:
    """What is wrong with a box config for a geometry that has box plans, in words."""
    rows, deep = g.axes(role)[1], "rows in steps take the place of depth, so its box must have a depth of 1"
    if role is Role.WGRAD:
        if max(config.box) != config.BLOCK_M:
            return "in a weight gradient its box must be a run of pixels along one axis"
        return deep if config.box[1] > 1 and rows.src_step > 1 else None
    if config.splits > 1:
        return f"its {config.splits} splits are for weight gradients"
    src, _, extents = _sides(role, g)
    shallow = _too_shallow(config, dtype)
    if shallow:
        return shallow
    if _needs_whole_blocks(role, g) and (src // g.groups) % config.BLOCK_K:
        return f"its BLOCK_K {config.BLOCK_K} does not divide the {src // g.groups} channels of a group"
    if config.box[1] > 1 and (rows.src_step > 1 or (rows.phases > 1 and extents[0] == 1)):
        return deep
    return None


def _box_config(problem: Problem, layout: _Layout) -> BoxConfig:
    g = layout.geometry
    if problem.role is Role.WGRAD:
        return _quickest(problem, "box_wgrad", configs.default_run(g, problem.device), layout)
    src, dst, _ = _sides(problem.role, g)
    counts = tiles.positions(problem.role, g)
    whole_blocks = _needs_whole_blocks(problem.role, g)
    per_group = (src // g.groups, dst // g.groups)
    rule = configs.default_box(counts, *per_group, whole_blocks, problem.dtype, problem.device)
    return _quickest(problem, "box", rule, layout)


def _sides(role: Role, g: ConvGeometry) -> tuple[int, int, tuple[int, ...]]:
    """(source channels, destination channels, destination extents) of fprop or dgrad."""
    return (g.C, g.K, g.output) if role is Role.FPROP else (g.K, g.C, g.input)


def _box_obstacle(problem: Problem, layout: _Layout) -> str | None:
    """What keeps a canonical problem from the box kernel, in words; None if nothing does."""
    role, (_, g, strides, _) = problem.role, layout
    if problem.device.capability < 90:
        return f"{problem.device.name} has no bulk tensor copy engine"
    if role is Role.WGRAD and problem.dtype not in ("float16", "bfloat16"):
        return f"weight gradients of {problem.dtype} have no box kernel"
    tf32 = problem.dtype == "float32" and problem.precision == "tf32"
    bytes_forward = problem.dtype in ("float8_e4m3fn", "int8") and role is Role.FPROP  # their dots want rows of filters
    if problem.dtype not in ("float16", "bfloat16") and not tf32 and not bytes_forward:
        return f"{problem.dtype} as {problem.precision} has no box kernel"
    if any(mode != "zeros" for mode in g.modes):
        return "only zeros lie outside a box"
    if not problem.aligned:
        return "a tensor does not start at a multiple of 16 bytes"
    if max(map(sum, g.padding)) + max(d * f for d, f in zip(g.dilation, g.filter, strict=True)) >= 2**16:
        return "filters reach too far"
    if role is Role.WGRAD:
        return _run_obstacle(g, strides)
    src, dst, _ = _sides(role, g)
    vector, least = 16 // ITEM_BYTES[problem.dtype], configs.least_reduction(problem.dtype)
    if g.C % vector or g.K % (16 // ITEM_BYTES[problem.out_dtype]):
        return "channels are not whole vectors"
    if g.groups > 1 and (src // g.groups % least or dst // g.groups % 16):
        return "the channels of a group are not whole vectors"
    if src // g.groups < 16:
        return "there are few channels to reduce over"
    source = "x" if role is Role.FPROP else "y"
    if _uneven_rows(g, strides, source, vector) or strides.w[0] % vector:
        return "rows are not multiples of 16 bytes apart"
    tap = tap_step(g, strides)
    if tap is None or tap % vector or strides.w[1] != 1:
        return "filter taps are not evenly spaced"
    if not _whole_steps(g, role):
        return "the input is not whole strides"
    if g.axes(role)[2].src_step > 1 and src // g.groups % least:
        return f"the stride of W folds into channels, which are no multiple of {least}"
    return None


def _run_obstacle(g: ConvGeometry, strides: Strides) -> str | None:
    """What keeps a weight gradient of 16-bit types from the box kernel: x and dy are described, blocks need not fit."""
    if g.C % 8 or g.K % 8:
        return "channels are not whole vectors"
    if min(g.C, g.K) // g.groups < 16:
        return "groups have few channels"
    if _uneven_rows(g, strides, "x", 8) or _uneven_rows(g, strides, "y", 8):
        return "rows are not multiples of 16 bytes apart"
    return None if _whole_steps(g, Role.WGRAD) else "the input is not whole strides"


def _idle_runs(g: ConvGeometry) -> str | None:
    """Why small images are gathered instead, where pixels of several rows make up a step."""
    counts = (g.N, *g.output)
    run = configs.run_of_little_waste(counts)
    idle = prod(tiles.blocks(counts, run)) * max(run) > 2 * prod(counts)
    return f"runs of {max(run)} pixels along one axis would be idle more than half" if idle else None


def _uneven_rows(g: ConvGeometry, strides: Strides, name: str, vector: int) -> bool:
    """Whether pixels of an activation start at other addresses than multiples of `vector` elements."""
    of_channels = 1
    pairs = enumerate(zip(getattr(strides, name), g.shape(name), strict=True))
    return any(stride % vector for axis, (stride, extent) in pairs if axis != of_channels and extent > 1)


def _whole_steps(g: ConvGeometry, role: Role) -> bool:
    """Whether the steps in which the source is walked make axes of a descriptor."""
    steps = [axis.src_step for axis in g.axes(role)]
    flat = g.filter[0] == 1 and g.padding[0] == (0, 0)
    return describable(g.output if role is Role.DGRAD else g.input, steps) and (steps[1] == 1 or flat)


def _vectorised(g: ConvGeometry, strides: Strides) -> bool:
    """Whether eight neighbouring channels of both activations lie side by side."""
    return _channels_last(strides) and tiles.whole_vectors(g)


def _channels_last(strides: Strides) -> bool:
    return strides.x[1] == 1 and strides.y[1] == 1


def dense_strides(shape: tuple[int, ...], channels_last: bool) -> tuple[int, ...]:
    """Element strides of a dense (N, C, D, H, W) tensor."""
    order = (0, 2, 3, 4, 1) if channels_last else range(5)
    strides, step = [0] * 5, 1
    for dim in reversed(order):
        strides[dim] = step
        step *= max(shape[dim], 1)
    return tuple(strides)


def _reach(g: ConvGeometry, strides: Strides, role: Role, config: Config | BoxConfig) -> int:
    """The largest offset or index that a launch computes; tails of tiles and of residue classes included."""
    phases = [axis.phases for axis in g.axes(role)]
    spans = [
        _span((g.N, g.C, *(i + p for i, p in zip(g.input, phases, strict=True))), strides.x),
        _span((g.N, g.K, *g.output), strides.y),
        _span((g.K, g.C // g.groups, *g.filter), strides.w) * config.splits,
    ]
    positions = g.N * prod(i + p for i, p in zip(g.input if role is Role.DGRAD else g.output, phases, strict=True))
    return max(*spans, positions + config.BLOCK_M * config.splits)


def _span(shape: tuple[int, ...], strides: tuple[int, ...]) -> int:
    return 1 + sum((n - 1) * abs(s) for n, s in zip(shape, strides, strict=True))
