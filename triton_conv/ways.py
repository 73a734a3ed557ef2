"""Which kernels can run a problem, in which layout and with which config; what keeps the others from it, in words."""

from __future__ import annotations

from dataclasses import replace
from math import prod
from typing import NamedTuple

from . import choose, cost, stored, tiles
from . import config as configs
from . import key as keys
from .choose import AnyConfig
from .config import ITEM_BYTES, BandedConfig, BoxConfig, Config, DepthwiseConfig, KernelConfig
from .devices import Device
from .epilogue import PLAIN, Epilogue
from .geometry import ConvGeometry, Role, Strides, canonical, describable, rows_first, tap_step


class Problem(NamedTuple):
    """What a plan depends on, and the key it is cached under.

    `dtype` is that of both operands, `out_dtype` that of output and bias. `precision` says how float32 is multiplied
    ("ieee", "tf32", "tf32x3") and is "ieee" for every other dtype; `aligned` says that every tensor starts at a
    multiple of 16 bytes; `has_scale` that the sum is multiplied by two scales; `moves_residual` that the epilogue's
    residual lies in memory otherwise than the output. The epilogue's scale has `scale_dtype`, "" for `out_dtype`: a
    compiled kernel is launched again for operands of the dtypes that it was compiled for.
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
    epilogue: Epilogue = PLAIN
    moves_residual: bool = False
    scale_dtype: str = ""


class Layout(NamedTuple):
    """A canonical problem, once the tensors in `packs` stand in memory otherwise.

    They are copied to channels-last, or to contiguous where not `channels_last`; an output among them is copied back.
    With `bundle` groups in one, filters are copied into blocks along the diagonal of fewer and wider groups, and of
    their gradient only these blocks are kept.
    """

    packs: tuple[str, ...]
    channels_last: bool
    bundle: int
    geometry: ConvGeometry
    strides: Strides
    steps: tuple[str, ...]


class Way(NamedTuple):
    """A kernel that can run a problem.

    `measured` are the kernel's seconds where its config was measured at this very size, `rival` those of the quickest
    that others have for it, under this name.
    """

    kernel: str
    layout: Layout
    config: KernelConfig
    reason: str
    measured: float | None = None
    rival: float | None = None
    rival_name: str = ""


def of(
    problem: Problem, g: ConvGeometry, strides: Strides, keep_channels: bool, explicit: KernelConfig | None
) -> list[Way]:
    """Ways to compute `g`, the plainest first, or the one way of an explicit config.

    `g` and `strides` are the problem's, or those of its padded input; `keep_channels` is canonical's. Raises
    RuntimeError where the explicit config's kernel cannot run it.
    """
    role = problem.role
    packs = _not_channels_last(g, strides, role)
    given, copied = (_laid_out(g, strides, role, names, keep_channels) for names in ((), packs))
    obstacle = _box_obstacle(problem, copied)
    if isinstance(explicit, Config):
        return [_gathered(problem, given, explicit, obstacle)]
    direct = _direct_obstacle(problem, given.geometry)
    if isinstance(explicit, DepthwiseConfig):
        if direct:
            raise RuntimeError(f"a depthwise config was given for {g}, but {direct}")
        return [_direct(problem, given, explicit)]
    columns = _laid_out(g, strides, role, _columns_apart(given), keep_channels, channels_last=False)
    banded = direct or _banded_obstacle(problem, columns.geometry, folds=g is not problem.geometry)
    if isinstance(explicit, BandedConfig):
        if explicit.splits > 1 and role is not Role.WGRAD:
            banded = banded or f"its {explicit.splits} splits are for weight gradients"
        if banded:
            raise RuntimeError(f"a banded config was given for {g}, but {banded}")
        return [_banded(problem, columns, explicit)]
    if explicit is not None:
        misfit = obstacle or _box_misfit(problem, explicit, copied.geometry)
        if misfit:
            raise RuntimeError(f"a box config was given for {g}, but {misfit}")
        return [_boxed(problem, copied, explicit)]
    if not direct and g.K == g.C:
        long = not banded and max(g.filter) >= _LONG
        return [_direct(problem, given), *([_banded(problem, columns)] if long else [])]
    moves = set(packs) - {"w"}
    if not obstacle and not moves:
        obstacle = _idle_runs(copied.geometry) if role is Role.WGRAD else None
        if not obstacle:
            return [_boxed(problem, copied)]
    found = [_gathered(problem, given, None, obstacle or "activations are not channels-last")]
    if moves:
        found.append(_gathered(problem, copied, None, obstacle) if obstacle else _boxed(problem, copied))
    for bundle in _bundles(g):
        wide = _laid_out(g, strides, role, tuple(name for name in packs if name != "w"), keep_channels, bundle)
        why = _box_obstacle(problem, wide)
        found.append(_gathered(problem, wide, None, why) if why else _boxed(problem, wide))
    return found if direct else [_direct(problem, given), *found]


def gathered(problem: Problem, g: ConvGeometry, strides: Strides, keep_channels: bool) -> Way:
    """The way that is open to every problem: pointers, as everything lies. Arguments are those of `of`."""
    layout = _laid_out(g, strides, problem.role, (), keep_channels)
    return _gathered(problem, layout, None, "nothing else could run")


def alike(
    problem: Problem,
    g: ConvGeometry,
    strides: Strides,
    keep_channels: bool,
    kernel: str,
    layout: Layout,
    config: KernelConfig,
    reason: str,
) -> Way:
    """The way that another batch of the same samples goes by this kernel, in this layout, with this config.

    `g`, `strides` and `keep_channels` are as in `of`. Samples that do not start at multiples of 16 bytes are copied for
    box kernels, where those of the other batch did. Raises NotImplementedError for a batch that these cannot address.
    """
    role, packs = problem.role, layout.packs
    how = (keep_channels, layout.bundle, layout.channels_last)
    laid = _laid_out(g, strides, role, packs, *how)
    if kernel.startswith("depthwise"):
        laid = _rows_first(laid)
    source = "y" if role is Role.DGRAD else "x"
    if kernel == "box" and _box_obstacle(problem, laid):
        laid = _laid_out(g, strides, role, tuple(dict.fromkeys((*packs, source))), *how)
        obstacle = _box_obstacle(problem, laid)
        if obstacle:
            raise NotImplementedError(f"with batch_invariant, compute this in smaller batches, since {obstacle}: {g}")
    return Way(kernel, laid, config, reason)


_WORDS = {"x": "the input", "w": "the filters", "y": "the output's gradient"}
_WRITTEN = {Role.FPROP: ("y", "the output"), Role.DGRAD: ("x", "the input's gradient")}


def _laid_out(
    g: ConvGeometry,
    strides: Strides,
    role: Role,
    packs: tuple[str, ...],
    keep_channels: bool,
    bundle: int = 1,
    channels_last: bool = True,
) -> Layout:
    written, words = _WRITTEN.get(role, ("w", ""))
    where = "channels-last" if channels_last else "contiguous"
    steps = [f"copy {_WORDS[name]} to {where}" if name != written else f"copy {words} from {where}" for name in packs]
    made = set(packs)
    if bundle > 1:
        g, made = replace(g, groups=g.groups // bundle), made | {"w"}
        steps.append(f"{bundle} groups in one, with zeros between their filters")
    strides = strides._replace(**{name: dense_strides(g.shape(name), channels_last) for name in made})
    inner, inner_strides, more = canonical(g, strides, role, keep_channels)
    return Layout(packs, channels_last, bundle, inner, inner_strides, (*steps, *more))


def _not_channels_last(g: ConvGeometry, strides: Strides, role: Role) -> tuple[str, ...]:
    """The operands that a box kernel could not fetch as they lie."""
    operands = {Role.FPROP: ("x", "w"), Role.DGRAD: ("y", "w"), Role.WGRAD: ("x", "y")}[role]
    return tuple(name for name in operands if getattr(strides, name)[1] != 1 and g.shape(name)[1] > 1)


def _columns_apart(layout: Layout) -> tuple[str, ...]:
    """The activations whose columns do not lie side by side."""
    g, strides = layout.geometry, layout.strides
    return tuple(name for name in ("x", "y") if getattr(strides, name)[4] != 1 and g.shape(name)[4] > 1)


def _bundles(g: ConvGeometry) -> list[int]:
    """How many groups of few channels may be computed as one for the sake of a fuller dot.

    Of 32 channels or up to 64 where groups allow: then all threads of a block copy whole vectors of filters.
    """
    narrow, wide = sorted((g.C // g.groups, g.K // g.groups))
    if narrow >= 16 or wide == 1:
        return []
    sizes = sorted({1 << i for i in range(1, 7)} | {g.groups})
    fitting = [p for p in sizes if p > 1 and g.groups % p == 0 and p * wide <= 64]
    return [p for p in fitting if p * narrow >= 32] or fitting[-1:]


def _boxed(problem: Problem, layout: Layout, explicit: BoxConfig | None = None) -> Way:
    why = "boxes of the bulk tensor copy engine"
    kernel = "box_wgrad" if problem.role is Role.WGRAD else "box"
    if explicit is not None:
        return Way(kernel, layout, explicit, f"{why}; config given explicitly")
    return _with_config(problem, kernel, layout, _box_config(problem, layout), why, _tiles_for(problem))


def _gathered(problem: Problem, layout: Layout, explicit: Config | None, obstacle: str | None) -> Way:
    g, role, dtype = layout.geometry, problem.role, problem.dtype
    kernel = "wgrad" if role is Role.WGRAD else "gather"
    why = f"pointer gather, since {obstacle}" if obstacle else "pointer gather"
    if explicit is not None:
        shallow = _too_shallow(explicit, dtype)
        if shallow:
            raise RuntimeError(f"a config was given for {g}, but {shallow}")
        return Way(kernel, layout, explicit, f"{why}; config given explicitly")
    vectorised = reads_channels_last(role, layout.strides) and tiles.whole_vectors(g)
    rule = configs.default(g, role, dtype, problem.precision, vectorised, problem.device)
    config = _quickest(problem, kernel, rule, layout)
    if not config.dot:
        narrow = configs.multiplies_matrices(dtype, role)
        why += "; " + ("groups are too narrow for a dot" if narrow else "integers have no matrix instruction here")
        why += ", so products are summed in registers"
    return _with_config(problem, kernel, layout, config, why, _tiles_for(problem))


def _direct(problem: Problem, layout: Layout, explicit: DepthwiseConfig | None = None) -> Way:
    role, why = problem.role, "groups of one channel are summed in registers, without a dot"
    kernel = "depthwise_wgrad" if role is Role.WGRAD else "depthwise"
    layout, channels_last = _rows_first(layout), _along_channels(layout)
    if explicit is not None:
        return Way(kernel, layout, explicit, f"{why}; config given explicitly")
    config = configs.default_depthwise(layout.geometry, role, problem.dtype, channels_last, problem.device)
    return _with_config(problem, kernel, layout, config, why, f"lanes by rule for {problem.device.name}")


def _along_channels(layout: Layout) -> bool:
    return layout.strides.x[1] == layout.strides.y[1] == 1


def _rows_first(layout: Layout) -> Layout:
    """The layout as depthwise kernels want it: with its axes in another order, perhaps."""
    g, strides, order = rows_first(layout.geometry, layout.strides, keep_w=not _along_channels(layout))
    if order == (0, 1, 2):
        return layout
    turned = f"D, H and W in the order {', '.join('DHW'[axis] for axis in order)}"
    return layout._replace(geometry=g, strides=strides, steps=(*layout.steps, turned))


# Filters with fewer taps along every axis are mostly zeros as banded matrices.
_LONG = 13


def _banded(problem: Problem, layout: Layout, explicit: BandedConfig | None = None) -> Way:
    role, why = problem.role, "filter rows as banded matrices"
    kernel = "banded_wgrad" if role is Role.WGRAD else "banded"
    if explicit is not None:
        return Way(kernel, layout, explicit, f"{why}; config given explicitly")
    config = configs.default_banded(layout.geometry, role, ITEM_BYTES[problem.dtype], problem.device, problem.epilogue)
    return _with_config(problem, kernel, layout, config, why, f"blocks by rule for {problem.device.name}")


# A config of another size in its bucket has to be predicted to take no longer than this share of the rule's time.
MOST_OF_RULE = 1.1


def _with_config(problem: Problem, kernel: str, layout: Layout, rule: KernelConfig, why: str, by_rule: str) -> Way:
    """The way with the config that was stored for it, if there is one that fits, else with the rule's."""
    g, role, device = layout.geometry, problem.role, problem.device
    found = stored.find(device, kernel, *key_of(problem, layout))
    if found is None or misfit(problem, kernel, layout, found.config):
        return Way(kernel, layout, rule, f"{why}; {by_rule}")
    if found.config != rule:
        channels_last = reads_channels_last(role, layout.strides)
        what = (problem.dtype, problem.precision, device, channels_last, problem.out_dtype, problem.epilogue)
        predicted, of_rule = (cost.predict(g, role, kernel, config, *what) for config in (found.config, rule))
        unrolls = _unrolls(found.config) > max(_unrolls(rule), configs.UNROLLED)
        if unrolls or _too_many_slabs(kernel, g, found.config, rule) or cost.absurd(predicted, of_rule):
            return Way(kernel, layout, rule, f"{why}; {by_rule}, since that of {found.where} is beyond what can run")
        if not found.exact and predicted.seconds > MOST_OF_RULE * of_rule.seconds:
            return Way(kernel, layout, rule, f"{why}; {by_rule}, predicted to be quicker than that of {found.where}")
    measured = (found.seconds, found.rival, found.rival_name)
    return Way(kernel, layout, found.config, f"{why}; config of {found.where}", *measured)


def _unrolls(config: KernelConfig) -> int:
    """Products of a depthwise program that are written out one by one."""
    return config.rows * config.columns * prod(config.unroll) if isinstance(config, DepthwiseConfig) else 1


def key_of(problem: Problem, layout: Layout) -> tuple[keys.Key, keys.Extents]:
    """Under what the configs of a kernel for a layout are filed."""
    channels_last = reads_channels_last(problem.role, layout.strides)
    what = (problem.role, problem.dtype, problem.out_dtype, problem.precision, channels_last)
    return keys.of(layout.geometry, *what)


def _too_many_slabs(kernel: str, g: ConvGeometry, config: KernelConfig, rule: KernelConfig) -> bool:
    """Whether the workspace is larger than a rule's or the tuner's would be."""
    if config.splits <= rule.splits:
        return False
    steps = cost.TILES[kernel](Role.WGRAD, g, replace(config, splits=1)).longest
    return config.splits > configs.most_splits(g, steps)


def misfit(problem: Problem, kernel: str, layout: Layout, config: KernelConfig) -> str | None:
    """What is wrong with a config for a kernel that can run a layout, in words; None if nothing is."""
    g, role, dtype = layout.geometry, problem.role, problem.dtype
    if not isinstance(config, keys.CONFIGS[kernel]):
        return f"it is a {type(config).__name__}"
    if config.splits > 1 and role is not Role.WGRAD:
        return f"its {config.splits} splits are for weight gradients"
    if isinstance(config, BoxConfig):
        return _box_misfit(problem, config, g)
    if isinstance(config, BandedConfig):
        full = configs.moves_another(problem.epilogue) and prod(config.blocks) > configs.MOST_BESIDE_ANOTHER
        if full:
            return f"its {prod(config.blocks)} blocks leave no registers for another tensor like the output"
    if isinstance(config, Config):
        if config.dot and not configs.multiplies_matrices(dtype, role):
            return f"there is no dot of {dtype}"
        return _too_shallow(config, dtype)
    return None


def _banded_obstacle(problem: Problem, g: ConvGeometry, folds: bool) -> str | None:
    """What keeps a depthwise problem from the banded kernels, in words; `folds` is of a border of other than zeros."""
    if g.K != g.C:
        return f"an input channel has {g.K // g.C} filters"
    if problem.dtype not in ("float16", "bfloat16") and (problem.dtype, problem.precision) != ("float32", "tf32"):
        return f"{problem.dtype} as {problem.precision} is not multiplied on matrix units"
    if max(g.stride) > 1:
        return "its stride is more than 1"
    if any(d > 1 and taps > 1 for d, taps in zip(g.dilation, g.filter, strict=True)):
        return "its filter is dilated"
    if max(g.input[0], g.output[0], g.filter[0]) > 1:
        return "it has three spatial axes"
    if max(g.N, *g.input, *g.output, *map(sum, g.padding)) >= tiles.COUNTED:
        return "an axis is longer than it counts"
    if 16 * g.taps + 256 * max(g.filter) >= tiles.COUNTED:  # of the shifted copies of one filter
        return "a filter is longer than it counts"
    return "the border of its gradient is folded" if folds else None


# Above it, an input channel meets so many filters that a dot is fuller of them than of zeros.
_MOST_FILTERS = 8


def _direct_obstacle(problem: Problem, g: ConvGeometry) -> str | None:
    """What keeps a problem from the depthwise kernels, in words; None if nothing does."""
    if g.groups != g.C:
        return "its groups have several input channels"
    filters, most = g.K // g.C, _MOST_FILTERS if g.groups > 1 else 1
    if filters > most:
        return f"an input channel has {filters} filters"
    if problem.has_scale or problem.dtype == "float8_e4m3fn":
        return "8-bit floats and scales are for dots"
    return None


def _quickest(problem: Problem, kernel: str, rule: AnyConfig, layout: Layout) -> AnyConfig:
    channels_last = reads_channels_last(problem.role, layout.strides)
    how = (problem.dtype, problem.precision, problem.device, channels_last, problem.out_dtype, problem.epilogue)
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


def _box_misfit(problem: Problem, config: BoxConfig, g: ConvGeometry) -> str | None:
    """What is wrong with a box config for a geometry that has box plans, in words."""
    role, dtype, epilogue = problem.role, problem.dtype, problem.epilogue
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
    shared = cost.box_shared(config, role, g, dtype, problem.out_dtype, epilogue) if epilogue.residual else 0
    if shared > problem.device.shared_per_block:
        return f"with a residual it needs {shared} bytes of shared memory"
    return None


def _box_config(problem: Problem, layout: Layout) -> BoxConfig:
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


def _box_obstacle(problem: Problem, layout: Layout) -> str | None:
    """What keeps a canonical problem from the box kernel, in words; None if nothing does."""
    role, g, strides = problem.role, layout.geometry, layout.strides
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
    longest = max(g.N, *g.input, *g.output, max(g.C, g.K) * g.stride[2]) + 256 * max(g.stride)
    if longest >= tiles.COUNTED:
        return "an axis is longer than coordinates reach"
    if max(g.stride) >= 2**14:  # positions are moved by 2^16 steps before they are divided
        return "its stride is longer than coordinates reach"
    if not describes(_furthest(g, strides), g, problem.dtype):
        return "strides are longer than a descriptor holds"
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
    if strides.w[0] == 0 or (tap == 0 and g.taps > 1):
        return "filters or taps lie on each other"
    if not _whole_steps(g, role, strides):
        return "the input is not whole strides"
    if g.axes(role)[2].src_step > 1 and src // g.groups % least:
        return f"the stride of W folds into channels, which are no multiple of {least}"
    return None


def describes(stride: int, g: ConvGeometry, dtype: str) -> bool:
    """Whether a descriptor holds a stride of elements, times a step of the convolution: below 2^40 bytes."""
    return stride * max(g.stride) * ITEM_BYTES[dtype] < 2**40


def _furthest(g: ConvGeometry, strides: Strides) -> int:
    """The longest stride between two elements that are there."""
    pairs = zip((g.shape("x"), g.shape("w"), g.shape("y")), strides, strict=True)
    return max((s for shape, of in pairs for n, s in zip(shape, of, strict=True) if n > 1), default=1)


def _run_obstacle(g: ConvGeometry, strides: Strides) -> str | None:
    """What keeps a weight gradient of 16-bit types from the box kernel: x and dy are described, blocks need not fit."""
    if g.C % 8 or g.K % 8:
        return "channels are not whole vectors"
    if min(g.C, g.K) // g.groups < 16:
        return "groups have few channels"
    if _uneven_rows(g, strides, "x", 8) or _uneven_rows(g, strides, "y", 8):
        return "rows are not multiples of 16 bytes apart"
    return None if _whole_steps(g, Role.WGRAD, strides) else "the input is not whole strides"


def _idle_runs(g: ConvGeometry) -> str | None:
    """Why small images are gathered instead, where pixels of several rows make up a step."""
    counts = (g.N, *g.output)
    run = configs.run_of_little_waste(counts)
    idle = prod(tiles.blocks(counts, run)) * max(run) > 2 * prod(counts)
    return f"runs of {max(run)} pixels along one axis would be idle more than half" if idle else None


def _uneven_rows(g: ConvGeometry, strides: Strides, name: str, vector: int) -> bool:
    """Whether pixels of an activation start at other addresses than multiples of `vector` elements, or at the same."""
    of_channels = 1
    pairs = enumerate(zip(getattr(strides, name), g.shape(name), strict=True))
    along = [stride for axis, (stride, extent) in pairs if axis != of_channels and extent > 1]
    return any(stride == 0 or stride % vector for stride in along)


def _whole_steps(g: ConvGeometry, role: Role, strides: Strides) -> bool:
    """Whether the steps in which the source is walked make axes of a descriptor.

    Those along W fold into channels, which must follow on each other from column to column: not in a slice of them.
    """
    steps = [axis.src_step for axis in g.axes(role)]
    flat = g.filter[0] == 1 and g.padding[0] == (0, 0)
    extents, channels, source = (g.output, g.K, strides.y) if role is Role.DGRAD else (g.input, g.C, strides.x)
    adjacent = steps[2] == 1 or source[4] == channels
    return describable(extents, steps) and (steps[1] == 1 or flat) and adjacent


def reads_channels_last(role: Role, strides: Strides) -> bool:
    """Whether neighbouring channels of the activations that are read lie side by side."""
    sources = {Role.FPROP: (strides.x,), Role.DGRAD: (strides.y,), Role.WGRAD: (strides.x, strides.y)}[role]
    return all(source[1] == 1 for source in sources)


def dense_strides(shape: tuple[int, ...], channels_last: bool) -> tuple[int, ...]:
    """Element strides of a dense (N, C, D, H, W) tensor."""
    order = (0, 2, 3, 4, 1) if channels_last else range(5)
    strides, step = [0] * 5, 1
    for dim in reversed(order):
        strides[dim] = step
        step *= max(shape[dim], 1)
    return tuple(strides)
