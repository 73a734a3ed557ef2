"""How a kernel is tiled, and how its numbers are held."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import product
from math import prod
from typing import NamedTuple, TypeAlias

from . import tiles
from .devices import DEVICES as DEVICES
from .devices import INTERPRETER as INTERPRETER
from .devices import Device as Device
from .epilogue import PLAIN, Epilogue
from .forks import Lock
from .geometry import ConvGeometry, Role
from .tiles import ceil_div

__all__ = ["BandedConfig", "BoxConfig", "Config", "DepthwiseConfig", "explicit"]

Box: TypeAlias = tuple[int, int, int, int]  # sides along images, depths, rows, columns
PRECISIONS = ("ieee", "tf32", "tf32x3")  # ways to multiply float32
ITEM_BYTES = {"float64": 8, "float32": 4, "float16": 2, "bfloat16": 2}
ITEM_BYTES |= {"int64": 8, "int32": 4, "int16": 2, "int8": 1, "uint8": 1, "float8_e4m3fn": 1}


@dataclass(frozen=True)
class Config:
    """One way to run a gather or wgrad kernel.

    BLOCK_M counts pixels, BLOCK_N destination channels (output channels in wgrad), BLOCK_K the reduction (columns
    of taps and channels in wgrad). `dot` uses matrix units, else sums of products; `flatten` walks consecutive
    (tap, channel) pairs instead of one tap at a time; `filters_first` makes filters the dot's first operand.
    `splits` cuts wgrad's pixels into that many slabs.

        >>> print(Config(128, 64, 32))
        128x64x32 warps 4 stages 3 splits 1 dot

    Raises ValueError for blocks that are no powers of two or, of a dot, below 16, and for splits below 1.
    """

    BLOCK_M: int
    BLOCK_N: int
    BLOCK_K: int
    num_warps: int = 4
    num_stages: int = 3
    dot: bool = True
    flatten: bool = False
    filters_first: bool = False
    splits: int = 1

    def __post_init__(self) -> None:
        blocks = (self.BLOCK_M, self.BLOCK_N, self.BLOCK_K)
        if any(b < 1 or b & (b - 1) for b in blocks) or self.splits < 1:
            raise ValueError(f"blocks must be powers of two and splits positive, but got {self}")
        if self.dot and min(blocks) < 16:
            raise ValueError(f"blocks of a dot must be 16 or more, but got {self}")

    def __str__(self) -> str:
        flags = [name for name in ("dot", "flatten", "filters_first") if getattr(self, name)]
        blocks = f"{self.BLOCK_M}x{self.BLOCK_N}x{self.BLOCK_K}"
        return f"{blocks} warps {self.num_warps} stages {self.num_stages} splits {self.splits} {' '.join(flags)}"


@dataclass(frozen=True)
class BoxConfig:
    """One way to run a box kernel: a box of (images, depths, rows, columns) of pixels, times BLOCK_N destination
    channels, reducing BLOCK_K source channels a step; `programs` persistent programs per multiprocessor.

    In wgrad a step reduces the box, which is a run of pixels along one axis; BLOCK_N counts output channels, BLOCK_K
    input channels, and `splits` cuts the runs into that many slabs. A program there is one tile.

        >>> print(BoxConfig((1, 1, 8, 16), 64, 32))
        box 1x1x8x16 x 64 x 32 warps 4 stages 4

    Raises ValueError for sides that are no powers of two or above 256, for blocks below 16, and for splits below 1.
    """

    box: Box
    BLOCK_N: int
    BLOCK_K: int
    num_warps: int = 4
    num_stages: int = 4
    programs: int = 1
    splits: int = 1

    def __post_init__(self) -> None:
        sides = (*self.box, self.BLOCK_N, self.BLOCK_K)
        if any(s < 1 or s & (s - 1) for s in sides) or self.splits < 1:
            raise ValueError(f"sides and blocks must be powers of two and splits positive, but got {self}")
        if min(self.BLOCK_M, self.BLOCK_N, self.BLOCK_K) < 16 or max(sides) > 256:
            raise ValueError(f"blocks of a dot must be 16 or more and sides of a box 256 or less, but got {self}")

    @property
    def BLOCK_M(self) -> int:
        """Pixels of a box."""
        return prod(self.box)

    def __str__(self) -> str:
        box = "x".join(map(str, self.box))
        text = f"box {box} x {self.BLOCK_N} x {self.BLOCK_K} warps {self.num_warps} stages {self.num_stages}"
        return f"{text} splits {self.splits}" if self.splits > 1 else text


@dataclass(frozen=True)
class BandedConfig:
    """One way to run a banded kernel on depthwise convolutions.

    A block is `height` x `columns` output positions of a channel. A tile multiplies blocks of (images, rows of blocks,
    columns of blocks), `chunk` columns of the input a step. In wgrad a program has `height` filter rows, blocks are one
    output row high, and a step sums up so many; `splits` cuts the steps into that many slabs.

        >>> print(BandedConfig((64, 1, 1), 1, 16, 32))
        64x1x1 blocks of 1x16 by 32 warps 4 stages 3 splits 1

    Raises ValueError for sides that are no powers of two, for fewer than 16 blocks, columns or columns a step, and for
    splits below 1.
    """

    blocks: tuple[int, int, int]
    height: int
    columns: int
    chunk: int
    num_warps: int = 4
    num_stages: int = 3
    splits: int = 1

    dot = True

    def __post_init__(self) -> None:
        sides = (*self.blocks, self.height, self.columns, self.chunk)
        if any(s < 1 or s & (s - 1) for s in sides) or self.splits < 1:
            raise ValueError(f"sides must be powers of two and splits positive, but got {self}")
        if min(prod(self.blocks), self.columns, self.chunk) < 16:
            raise ValueError(f"blocks, columns and chunk of a dot must be 16 or more, but got {self}")

    @property
    def BLOCK_M(self) -> int:
        """Positions of a tile."""
        return prod(self.blocks) * self.height * self.columns

    def __str__(self) -> str:
        blocks = "x".join(map(str, self.blocks))
        text = f"{blocks} blocks of {self.height}x{self.columns} by {self.chunk}"
        return f"{text} warps {self.num_warps} stages {self.num_stages} splits {self.splits}"


@dataclass(frozen=True)
class DepthwiseConfig:
    """One way to run a depthwise kernel.

    A tile is `lanes` x `channels`. A lane is `rows` x `columns` positions, columns side by side in memory and fetched
    in vectors of `vector`; where channels lie so instead it has one column, as it has under strides and dilations that
    vectors cannot follow. A program walks down `walk` lanes. `unroll` rows and columns of the filter are unrolled; in
    fprop and dgrad the columns are where that is all of them. In wgrad a lane has as many columns as divide the
    output's; `splits` cuts the tiles into that many slabs.

        >>> print(DepthwiseConfig(rows=2, columns=8, lanes=16, channels=1, vector=8, unroll=(3, 3)))
        16 lanes of 2x8 x 1 channels walk 1 unroll 3x3 warps 4 splits 1

    Raises ValueError for columns, lanes, channels and vectors that are no powers of two, and for counts below 1.
    """

    rows: int
    columns: int
    lanes: int
    channels: int
    vector: int
    unroll: tuple[int, int]
    walk: int = 1
    num_warps: int = 4
    splits: int = 1

    dot = False

    def __post_init__(self) -> None:
        powers = (self.columns, self.lanes, self.channels, self.vector)
        if any(n < 1 or n & (n - 1) for n in powers):
            raise ValueError(f"columns, lanes, channels and vector must be powers of two, but got {self}")
        if min(self.rows, *self.unroll, self.walk, self.splits) < 1:
            raise ValueError(f"rows, unroll, walk and splits must be positive, but got {self}")

    @property
    def BLOCK_M(self) -> int:
        """Positions of a program's lanes."""
        return self.lanes * self.rows * self.walk * self.columns

    def __str__(self) -> str:
        tile = f"{self.lanes} lanes of {self.rows}x{self.columns} x {self.channels} channels"
        unroll = "x".join(map(str, self.unroll))
        return f"{tile} walk {self.walk} unroll {unroll} warps {self.num_warps} splits {self.splits}"


KernelConfig: TypeAlias = Config | BoxConfig | DepthwiseConfig | BandedConfig


class Numerics(NamedTuple):
    """Width of offsets, accumulator type and multiplication of a launch; names as in triton.language."""

    index_bits: int
    accumulator: str
    precision: str
    has_bias: bool
    has_scale: bool = False
    epilogue: Epilogue = PLAIN

    @property
    def operands(self) -> tuple[str | None, ...]:
        """The operands that an accumulator meets before it is stored, None for those that are not there.

        These are "scale_a", "scale_b", "scale", "bias", "residual" and "kept", which is written.
        """
        e = self.epilogue
        there = {"scale_a": self.has_scale, "scale_b": self.has_scale, "scale": e.scale, "bias": self.has_bias}
        there |= {"residual": bool(e.residual), "kept": e.keep}
        return tuple(name if is_there else None for name, is_there in there.items())


# A program is worth splitting off when it still has this many steps of its main loop.
_STEPS_PER_SPLIT = 8
_WORKSPACE_LIMIT = 256 * 2**20

# Accumulator elements of a program of four warps. Eight warps would hold twice that, but Triton has miscompiled loops
# over taps like these at eight warps (pytorch#173068): no such config is a default before a GPU has checked it.
LARGEST_TILE = 128 * 64

# For the whole process, not the thread: autograd runs the gradients of CUDA tensors on threads of its own.
_explicit: dict[Role, KernelConfig] = {}
_given: tuple[Mapping[Role, KernelConfig], ...] = ()  # of which that is made; threads may end theirs in any order
_lock = Lock()


@contextmanager
def explicit(configs: Mapping[Role, KernelConfig]) -> Iterator[None]:
    """Runs these roles with these configs, and so with the kernels they are of, whatever anything else says.

        >>> x, w = torch.randn(1, 16, 8, 8), torch.randn(16, 16, 3, 3)
        >>> with triton_conv.config.explicit({Role.FPROP: Config(64, 64, 32)}):
        ...     y = triton_conv.conv2d(x, w)  # on a CPU it makes no difference

    For the process, until the context ends. Raises nothing here: a call raises RuntimeError if the kernel of its config
    cannot compute it.
    """
    global _given, _explicit
    mine = dict(configs)
    with _lock:
        _given = (*_given, mine)
        _explicit = {**_explicit, **mine}
    try:
        yield
    finally:
        with _lock:
            _given = tuple(given for given in _given if given is not mine)
            _explicit = {role: config for given in _given for role, config in given.items()}


def chosen(role: Role) -> KernelConfig | None:
    """The explicit config of a role, if there is one."""
    return _explicit.get(role)


def all_chosen() -> tuple[tuple[Role, KernelConfig], ...]:
    """The explicit configs of all roles that have one."""
    return tuple(_explicit.items())


def multiplies_matrices(dtype: str, role: Role) -> bool:
    """Whether the kernels of a role multiply a dtype on matrix units: floats, and int8 but for weight gradients."""
    return "int" not in dtype or (dtype == "int8" and role is not Role.WGRAD)


def least_reduction(dtype: str) -> int:
    """The smallest BLOCK_K of a dot."""
    return 32 if ITEM_BYTES[dtype] == 1 else 16


def _through_registers(dtype: str, device: Device) -> bool:
    """Whether operands pass through registers to the matrix units: on all but 90 and 100, where int8 does on 100."""
    return not 90 <= device.capability < (100 if dtype == "int8" else 120)


# Source times destination channels of a group up to which a dot would multiply little but padding.
WITHOUT_DOT = 8


def default(geometry: ConvGeometry, role: Role, dtype: str, precision: str, vectorised: bool, device: Device) -> Config:
    """Sane tiles by rule: as large as the problem fills, small enough not to spill.

    `vectorised` says that whole vectors of channels can be loaded; without it every element has an address in a
    register of its own, and tiles must be smaller.
    """
    g = geometry
    C, K = g.C // g.groups, g.K // g.groups
    pixels = g.N * prod(g.input if role is Role.DGRAD else g.output)
    if not multiplies_matrices(dtype, role) or C * K <= WITHOUT_DOT:
        return _without_dot(g, role, C, K, pixels, "int" in dtype, device)
    wide_rows = vectorised and ITEM_BYTES[dtype] <= 2
    # float64, and float32 without TF32, hold or multiply more than the matrix units' own tiles
    costly = dtype == "float64" or (dtype == "float32" and precision == "ieee")
    three_products = dtype == "float32" and precision == "tf32x3"
    through_registers = _through_registers(dtype, device)
    largest = 128 if wide_rows and not through_registers else 32 if costly else 64
    reduction = C if role is Role.FPROP else K
    flatten = (C if role is Role.WGRAD else reduction) < 16 and g.taps > 1
    if role is Role.WGRAD:
        if device.capability >= 100:
            largest = min(largest, 64)
        if costly or not vectorised or flatten:
            step = 16 if costly or through_registers or flatten else 32
        else:
            step = 32 if through_registers or not wide_rows else 64
        config = Config(
            BLOCK_M=_tile(pixels, 16, step),
            BLOCK_N=_tile(K, 16, largest),
            BLOCK_K=_tile(
                C * g.taps if flatten else C,
                16,
                min(largest, 32 if device.capability >= 100 else 64) if flatten else largest,
            ),
            num_stages=2 if device.capability >= 100 else 3,
            flatten=flatten,
        )
        if config.BLOCK_N * config.BLOCK_K > LARGEST_TILE:
            config = replace(config, BLOCK_K=LARGEST_TILE // config.BLOCK_N)
        return replace(config, splits=_splits(g, config, device))
    block_n = _tile(K if role is Role.FPROP else C, 16, largest)
    most = 32 if costly or (through_registers and flatten) else 128 if vectorised and not three_products else 64
    block_m = min(_tile(pixels, 16, most), (LARGEST_TILE // 2 if through_registers else LARGEST_TILE) // block_n)
    deepest = 16 if costly or three_products else 64 if wide_rows and not (flatten or through_registers) else 32
    block_k = _tile(reduction * g.taps if flatten else reduction, least_reduction(dtype), deepest)
    # through registers, filters that are transposed or multiplied three times spill a few as the first operand
    filters_last = through_registers and (three_products or (role is Role.DGRAD and wide_rows))
    filters_first = block_n >= 64 and not filters_last
    stages = 2 if dtype == "float64" and device.capability >= 120 else 3
    return Config(block_m, block_n, block_k, 4, stages, True, flatten, filters_first)


def default_box(
    counts: tuple[int, ...], src: int, dst: int, whole_blocks: bool, dtype: str, device: Device
) -> BoxConfig:
    """Sane boxes by rule: 128 pixels in the shape that wastes least of (images, depths, rows, columns).

    `src` and `dst` are channels per group; with `whole_blocks` the reduction's block must divide `src`.
    """
    deepest = 128 // ITEM_BYTES[dtype]  # 128 bytes fill a row of shared memory as the copy engine swizzles it
    block_k = _tile(src, least_reduction(dtype), deepest)
    while whole_blocks and src % block_k:
        block_k //= 2
    widest = 64 if _through_registers(dtype, device) else 128
    # after Hopper, the addresses of more stages spill from the few registers that small tiles are given
    shallow = device.capability >= 100 and block_k < deepest
    stages = 3 if device.capability >= 120 else 2 if shallow else 4
    return BoxConfig(little_waste(counts, 128), _tile(dst, 64, widest), block_k, num_stages=stages)


def default_banded(
    geometry: ConvGeometry, role: Role, item_bytes: int, device: Device, epilogue: Epilogue = PLAIN
) -> BandedConfig:
    """Sane blocks by rule: 128 positions, and rows of 64 bytes of the input; more images rather than more blocks.

    Half as many blocks where the epilogue moves another tensor like the output: its addresses take registers.
    """
    g = geometry
    source, (_, P, Q) = (g.output, g.input) if role is Role.DGRAD else (g.input, g.output)
    # elsewhere every element, or few of them, has an address in a register of its own
    wide_rows = item_bytes <= 2 and source[2] % 8 == Q % 8 == 0 and g.modes[2] == "zeros"
    chunk = _tile(source[2], 16, max((64 if P > 1 or device.capability >= 120 else 128) // item_bytes, 16))
    # elsewhere a third stage, and in weight gradients wide blocks, spill a few registers
    ample = device.capability == 90 or (role is not Role.WGRAD and device.capability < 120)
    columns, stages = _tile(Q, 16, 64 if P == 1 and ample else 32), 3 if ample else 2
    if role is not Role.WGRAD:
        height = _tile(P, 1, 128 // columns)
        counts = (g.N, ceil_div(P, height), ceil_div(Q, columns))
        size = _tile(prod(counts), 16, MOST_BESIDE_ANOTHER if moves_another(epilogue) or not wide_rows else 128)
        return BandedConfig(most_images(counts, size), height, columns, chunk, num_stages=stages)
    taps = _tile(g.filter[2], 16, tiles.BANDED_TAPS)  # of which programs gather sums, in registers
    height = _tile(g.filter[1], 1, min((128 if wide_rows and device.capability < 120 else 64) // chunk, 128 // taps))
    counts = (g.N, P, ceil_div(Q, columns))
    size = _tile(prod(counts), 16, 64 if wide_rows else 32)
    config = BandedConfig(most_images(counts, size), height, columns, chunk, num_stages=stages)
    wanted = ceil_div(2 * device.multiprocessors, g.C * ceil_div(g.filter[1], height))
    return replace(config, splits=max(1, min(wanted, prod(counts) // size // _STEPS_PER_SPLIT)))


MOST_BESIDE_ANOTHER = 64  # blocks of 128 positions of a banded config whose epilogue moves another tensor


def moves_another(epilogue: Epilogue) -> bool:
    """Whether a tensor like the output is read or written beside it."""
    return bool(epilogue.residual) or epilogue.keep


def most_images(counts: tuple[int, int, int], size: int) -> tuple[int, int, int]:
    """Sides of `size` blocks that waste least of counts; of those the most images, since these see the same padding."""
    sides = [1 << i for i in range(size.bit_length())]
    boxes = [(n, p, size // (n * p)) for n, p in product(sides, repeat=2) if size % (n * p) == 0]

    def covered(box: tuple[int, int, int]) -> int:
        return prod(ceil_div(count, side) * side for count, side in zip(counts, box, strict=True))

    return min(boxes, key=lambda box: (covered(box), -box[0], -box[1]))


def default_depthwise(
    geometry: ConvGeometry, role: Role, dtype: str, channels_last: bool, device: Device
) -> DepthwiseConfig:
    """Lanes by rule: what a thread holds fits into its registers, and programs are several to a multiprocessor.

    Where channels lie side by side (`channels_last`) a thread holds the taps of a vector of channels; else its lanes
    hold a vector of columns each, and taps take little room.
    """
    g, item = geometry, ITEM_BYTES[dtype]
    wide = 2 if item == 8 else 1  # registers of an accumulator
    vector = min(16 // item, 8) // (1 if g.K == g.C else 2)  # several filters of a channel read it by single elements
    dst = g.C if role is Role.DGRAD else g.K
    _, _, P, Q = tiles.positions(Role.FPROP if role is Role.WGRAD else role, g)
    _, R, S = g.filter
    dense = role is not Role.DGRAD or g.stride == (1, 1, 1)
    if channels_last:
        block = vector * wide
        channels = _little_waste_of(dst, max(128 // item, 1), max(32 // item, 1))
        unroll = _unrolled(R, S, _TAP_REGISTERS // block)
        taps = block * prod(unroll)
        room = 64 if taps <= 60 else 32 if taps <= 72 else 24
        room -= 32 if R % unroll[0] else 0  # for masks of the taps that the last part of a filter lacks
        several = g.K != g.C
        apart = several or (dense and g.stride[1] > 1)  # a row's sources, which are therefore more
        rows = max(1, min(8, room // block) // (4 if several and role is Role.WGRAD else 2 if apart else 1))
        config = DepthwiseConfig(min(rows, P), 1, THREADS * vector // channels, channels, vector, unroll)
        programs, registers = 6, 100 + taps  # the latter as compiled, of a thread in wgrad
    else:
        columns = _columns(g, role, P, Q, vector) if dense and S <= 64 else 1
        unroll = (R, S) if R * S * wide <= 49 else (1, S if S <= 64 else 1)
        rows = max(1, min(8, 32 // (columns * wide), UNROLLED // (prod(unroll) * columns)))
        if role is Role.WGRAD:
            rows = max(1, rows // 2)  # beside the sums of taps there are fewer registers for them
        lanes = _tile(ceil_div(P, rows) * ceil_div(Q, columns), 1, THREADS)
        config = DepthwiseConfig(min(rows, P), columns, lanes, _tile(dst, 1, THREADS // lanes), vector, unroll)
        programs, registers = 24, 64 + prod(unroll)
    rows = config.rows
    if channels_last:  # elsewhere columns vary, and too many kernels would be compiled
        rows = max(ceil_div(P, max(ceil_div(P, rows), 1)), 1)
        fewer = role is Role.WGRAD and rows > 1 and P % rows and P % (rows - 1) == 0
        rows -= 1 if fewer else 0
    config = replace(config, rows=rows)
    lanes_down = max(ceil_div(P, rows), 1)
    whole = tiles.depthwise(role, g, config)
    spare = whole.total // (programs * device.multiprocessors)
    if role is not Role.WGRAD:
        return replace(config, walk=_walk(lanes_down, max(1, min(spare, lanes_down))))
    walk = next(walk for walk in (4, 3, 2, 1) if lanes_down % walk == 0)  # lanes past the image cost a selection each
    whole = tiles.depthwise(role, g, replace(config, walk=walk))
    resident = device.registers // (registers * THREADS)
    fitting = resident * device.multiprocessors // max(whole.total, 1)  # slabs of as many programs as run at a time
    return replace(config, walk=walk, splits=max(1, min(fitting, most_splits(g, whole.longest * walk))))


def _walk(lanes: int, most: int) -> int:
    """How many lanes a program walks down, up to `most`: its start takes about as long as half a lane."""

    def steps(walk: int) -> float:
        walks, each = tiles.walks_of(lanes, walk)
        return walks * (each + 0.5)

    return min(range(1, most + 1), key=steps)


# Threads of a program that runs without a dot; how many registers of each may hold taps, or sums of taps; how many
# products may be unrolled, or compilers take longer than one cares to wait.
THREADS = 128
_TAP_REGISTERS = 80
UNROLLED = 1024


def _unrolled(R: int, S: int, most: int) -> tuple[int, int]:
    """Rows and columns of a filter that are unrolled: all of it, or of one column as many as make even parts."""
    whole = min(7, most // S) >= R
    return (R, S) if whole else (_part(R, min(most, 7)), 1)


def _part(extent: int, most: int) -> int:
    return ceil_div(extent, ceil_div(extent, most))


def _little_waste_of(extent: int, most: int, least: int) -> int:
    """The largest power of two in [least, most] whose blocks cover extent with little to spare."""
    sizes = [n for n in (1 << i for i in range(9)) if min(least, extent) <= n <= _tile(extent, 1, most)]
    fewest = min(ceil_div(extent, n) * n for n in sizes)
    return max(n for n in sizes if ceil_div(extent, n) * n <= 1.125 * fewest)


def _columns(g: ConvGeometry, role: Role, P: int, Q: int, vector: int) -> int:
    """Columns of a lane: such that rows are whole vectors, else a few, whose windows overlap."""
    source = g.output[2] if role is Role.DGRAD else g.input[2]
    if g.dilation[2] > 1 or g.stride[2] not in (1, 2, 4):
        return 1
    columns = vector
    while columns > 1 and (Q % columns or source % (columns * g.stride[2])):
        columns //= 2
    if columns == 1:
        return 4 if Q >= 32 else 1
    while P == 1 and columns < 32 and 128 * columns <= Q:  # there is one row only: it may as well be long
        columns *= 2
    return columns


# Boxes this close to the least waste count as equal: every box is a compilation, and images come in many sizes.
_EQUAL_WASTE = 1.2


def little_waste(counts: tuple[int, ...], size: int) -> Box:
    """The first of `boxes_of_little_waste`."""
    return boxes_of_little_waste(counts, size)[0]


@lru_cache(maxsize=4096)
def boxes_of_little_waste(counts: tuple[int, ...], size: int) -> tuple[Box, ...]:
    """Boxes of `size` pixels, each side a power of two, that cover counts (images, depths, rows, columns) well.

    Of these the first have fewest images and depths, and rows and columns nearest to 1:2, whose neighbours overlap
    most when a filter shifts them.
    """
    sides = [1 << i for i in range(size.bit_length())]
    boxes = [(n, z, p, size // (n * z * p)) for n, z, p in product(sides, repeat=3) if size % (n * z * p) == 0]

    def covered(box: Box) -> int:
        return prod(-(-count // side) * side for count, side in zip(counts, box, strict=True))

    least = min(map(covered, boxes))
    good = [box for box in boxes if covered(box) <= _EQUAL_WASTE * least]
    return tuple(sorted(good, key=lambda b: (b[0] * b[1], max(2 * b[2], b[3]) / min(2 * b[2], b[3]), b)))


def default_run(geometry: ConvGeometry, device: Device) -> BoxConfig:
    """Sane runs and tiles of a weight gradient of 16-bit types by rule.

    128 x 128 accumulators are the most that four warps hold: with 158 registers a thread at most, none spilled. Up to
    96 KiB of stages let two programs share a multiprocessor of Hopper's.
    """
    g = geometry
    run = run_of_little_waste((g.N, *g.output))
    block_n, block_k = _tile(g.K // g.groups, 64, 128), _tile(g.C // g.groups, 16, 128)
    stages = 96 * 2**10 // (2 * max(run) * (block_n + block_k))
    config = BoxConfig(run, block_n, block_k, num_stages=max(2, min(stages, 6)))
    whole = tiles.box_wgrad(g, config)
    places = 2 * device.multiprocessors

    def pixels(splits: int) -> int:
        slab = ceil_div(whole.longest, splits) * (config.BLOCK_M + _PIXELS_OF_A_STEP) + _PIXELS_OF_A_SLAB
        return ceil_div(whole.total * splits, places) * slab

    most = min(places, most_splits(g, whole.longest))
    return replace(config, splits=min(range(1, most + 1), key=pixels))


# What a program does beside multiplying, in pixels that it could multiply meanwhile. A tile of 128 x 128 is written to
# its slab and read again in the time of about 750, at an H200's 4.3 TB/s and 800 TFLOP/s, and its first loads wait.
_PIXELS_OF_A_STEP = 8
_PIXELS_OF_A_SLAB = 1024


def run_of_little_waste(counts: tuple[int, ...]) -> Box:
    """The first of `runs_of_little_waste`."""
    return runs_of_little_waste(counts)[0]


@lru_cache(maxsize=4096)
def runs_of_little_waste(counts: tuple[int, ...], longest: int = 64) -> tuple[Box, ...]:
    """Runs of 16 to `longest` pixels along one axis that cover counts (images, depths, rows, columns) well.

    Of these the first are along the innermost axis, whose pixels lie closest in memory; of those the longest.
    """
    lengths = [longest >> i for i in range(longest.bit_length() - 4)]
    shapes = [((1, 1, 1, n), (1, 1, n, 1), (1, n, 1, 1), (n, 1, 1, 1)) for n in lengths]
    runs: list[Box] = [run for along in zip(*shapes, strict=True) for run in along]

    def pixels(run: Box) -> int:
        return prod(tiles.blocks(counts, run)) * (max(run) + _PIXELS_OF_A_STEP)

    least = min(map(pixels, runs))
    return tuple(run for run in runs if pixels(run) <= _EQUAL_WASTE * least)


def _without_dot(g, role, C, K, pixels, integer, device) -> Config:
    """Integers, and groups so narrow that a dot would multiply padding: products summed in registers."""
    if role is Role.WGRAD:
        columns = C * g.taps if C < 16 else C
        config = Config(
            BLOCK_M=_tile(pixels, 16, 128),
            BLOCK_N=_tile(K, 1, 4),
            BLOCK_K=_tile(columns, 1, 16 if integer else 32),
            num_stages=2,
            dot=False,
            flatten=C < 16,
        )
        return replace(config, splits=_splits(g, config, device))
    src, dst = (C, K) if role is Role.FPROP else (K, C)
    return Config(_tile(pixels, 16, 256), _tile(dst, 1, 4), _tile(src, 1, 4), num_stages=2, dot=False)


def _splits(g, config, device) -> int:
    """Slabs so that every multiprocessor has two programs, while slabs stay long and the workspace bounded."""
    whole = tiles.wgrad(g, config)  # in one slab
    wanted = ceil_div(2 * device.multiprocessors, max(whole.total, 1))
    return min(wanted, most_splits(g, whole.longest))


def most_splits(geometry: ConvGeometry, steps: int) -> int:
    """Into how many slabs so many steps may be cut."""
    affordable = _WORKSPACE_LIMIT // max(8 * prod(geometry.shape("w")), 1)
    return max(1, min(steps // _STEPS_PER_SPLIT, affordable))


def _tile(extent: int, least: int, most: int) -> int:
    """The power of two in [least, most] that covers extent, or most."""
    tile = least
    while tile < min(extent, most):
        tile *= 2
    return tile
