"""The predicted time of a convolution: what no kernel can beat (`roofline`), and what ours may take (`predict`).

Predictions order configs and kernels; they are no measurements. Data-sheet numbers come from `devices`, counts of
tiles and steps from `tiles`.

A multiprocessor works on its resident tiles together. A step of their main loops takes as long as the busiest of its
units, which multiply, issue loads or fetch; where too few steps are ahead it waits for their data. Tiles run in waves.
L2 and memory, which all multiprocessors share, work beside that.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import ceil, gcd, inf, prod
from typing import Any, NamedTuple

from . import tiles as counting
from .config import ITEM_BYTES, BandedConfig, BoxConfig, DepthwiseConfig, KernelConfig
from .devices import H200, Device
from .epilogue import PLAIN, Epilogue
from .geometry import ConvGeometry, Role
from .tiles import Tiles, ceil_div

# Shares of the data sheet's rates that an ideal loop reaches: measured on the H200, assumed of every other GPU.
MATRIX_SHARE = H200.measured_matrix / H200.matrix_16
MEMORY_SHARE = H200.measured_copy / H200.bandwidth

# Assumed: nobody has measured these.
VECTOR_SHARE = 0.5  # without a dot, as many instructions widen operands and fold sums as multiply
FEW_ROWS = 0.6  # on sm_90 and sm_100, dots of fewer than 64 rows get the older instruction, fed from registers
LAUNCH = 3e-6  # seconds from the end of one kernel to the start of the next
TILE = 1e-6  # seconds before a tile's first step and after its last: about two trips to memory
LATENCY = 0.5e-6  # seconds that a load takes in a busy loop: twice what is published for a lone one
ADDRESS = 16  # instructions of a thread for the address and the mask of one load by pointer
LINK = 64  # bytes that a multiprocessor gets from L2 in a clock
ISSUED = 0.7  # share of its instruction slots that a multiprocessor uses without a dot
SPILLED = 4  # how many times longer a step takes whose accumulator does not fit into registers

# Instructions of a thread for each output of an activation, as compiled, and how many times as many in float64.
ACTIVATION = {"": 0, "relu": 1, "relu6": 2, "leaky_relu": 2, "hardswish": 5, "sigmoid": 12, "silu": 13, "gelu": 21}
ACTIVATION |= {"gelu_tanh": 16}
DOUBLE = 6
BANDED_STEP, BANDED_WGRAD_STEP = 100, 190  # instructions of a thread in a step of banded kernels, as compiled
BANDED_LOAD = 12  # more for each load, as compiled
BANDED_GATHER = 36  # instructions for each sum that banded weight gradients gather from a diagonal, as compiled
# Instructions of depthwise kernels as compiled for sm_90 by Triton 3.7.1, and their registers beside sums and operands.
VECTOR_LOAD = 10  # a masked load of 16 bytes: address, mask, zeros, the load
ELEMENT_LOAD = 6  # a masked load of one element in a row whose other loads are vectors
START = 450  # of a program outside its main loop; twice that where it sums over its lanes at the end
SUMS = 40
MOST_REGISTERS = 255  # of a thread: CUDA Programming Guide 13 (2025)
_ABSURD_REGISTERS, _ABSURD_TIME = 4, 1000  # times as many, or as long, as is right
REGISTERS = 64  # of a thread, beside its accumulator: as compiled default configs have them
LANES = 128  # instructions that a multiprocessor issues in a clock, counted by thread: four schedulers of 32
SECTOR = 32  # bytes that memory and L2 hand out at least


class Roofline(NamedTuple):
    """What any kernel needs: flops of the taps that meet the input; each operand and the output moved once, uncached.

    `limit` is what `seconds`, the least time on this device, are spent on: "matrix rate", "vector rate" or "memory
    bandwidth". Groups narrower than a matrix instruction leave the rest of it idle, but for filter rows as bands.
    """

    flops: int
    bytes: int
    limit: str
    seconds: float


@dataclass(frozen=True)
class Prediction:
    """Predicted, not measured: `seconds` = max(loop, l2, memory) + split + launch; infinite where a config cannot run.

    tiles            tiles of the launch
    waves            rounds in which the multiprocessors get through them
    resident         tiles that a multiprocessor works on at a time
    useful           share of the multiplied flops that count; the others are tails of tiles and padding
    loop_seconds     the waves, and what they wait for
    compute_seconds  the multiplications, were every multiprocessor always at them
    l2_seconds       what main loops load, through L2
    memory_seconds   what memory moves: the least bytes, and those that L2 has lost before they are read again
    split_seconds    slabs of a weight gradient written, read and summed; of shifted filters, written and read
    launch_seconds   starts of kernels
    registers        of a thread; a multiprocessor gives it 255 at most
    """

    seconds: float
    tiles: int
    waves: int
    resident: int
    useful: float
    loop_seconds: float
    compute_seconds: float
    l2_seconds: float
    memory_seconds: float
    split_seconds: float = 0.0
    launch_seconds: float = LAUNCH
    registers: int = 0

    @property
    def limit(self) -> str:
        """What takes longest: "main loop", "L2" or "memory"."""
        seconds = {"main loop": self.loop_seconds, "L2": self.l2_seconds, "memory": self.memory_seconds}
        return max(seconds, key=seconds.__getitem__)


def roofline(
    geometry: ConvGeometry,
    role: Role,
    dtype: str,
    precision: str,
    device: Device,
    out_dtype: str | None = None,
    epilogue: Epilogue = PLAIN,
) -> Roofline:
    """The least time of a convolution on a device; `out_dtype` is the operands' where it is None.

    >>> g = ConvGeometry.forward((32, 256, 56, 56), (256, 256, 3, 3), padding=((1, 1), (1, 1)))
    >>> roofline(g, Role.FPROP, "bfloat16", "ieee", H200).limit
    'matrix rate'
    """
    g = geometry
    pairs = [_pairs(g, axis) for axis in range(3)]
    flops = 2 * g.N * g.K * (g.C // g.groups) * prod(pairs)
    touched = g.input if role is Role.DGRAD else [min(i, n) for i, n in zip(g.input, pairs, strict=True)]
    elements = {"x": g.N * g.C * prod(touched), "w": prod(g.shape("w")), "y": prod(g.shape("y"))}
    output = {Role.FPROP: "y", Role.DGRAD: "x", Role.WGRAD: "w"}[role]
    wider = ITEM_BYTES[out_dtype or dtype] - ITEM_BYTES[dtype]
    moved = sum(elements.values()) * ITEM_BYTES[dtype] + elements[output] * wider
    moved += _epilogue_bytes(g, role, out_dtype or dtype, epilogue)
    matrix, vector = _matrix_rate(dtype, precision, device) * _fill(g, role), _vector_rate(dtype, device)
    computing, moving = flops / max(matrix, vector), moved / device.bandwidth
    limit = "memory bandwidth" if moving >= computing else "matrix rate" if matrix > vector else "vector rate"
    return Roofline(flops, moved, limit, max(computing, moving))


def _fill(g: ConvGeometry, role: Role) -> float:
    """The share of matrix instructions, whose least side is 8, that groups can fill, in the best way of three."""
    C, K = g.C // g.groups, g.K // g.groups

    def filled(*sides: int) -> float:
        return prod(side / (8 * ceil_div(side, 8)) for side in sides if side)

    # filter rows as bands of such a side, in which they are moved on by one tap each time
    band = max(g.filter) / (max(g.filter) + 7)
    if role is not Role.DGRAD:
        return max(band, filled(K, C * g.taps))
    # positions of all residue classes as channels, where some have a tap less than others
    axes = zip(g.filter, g.stride, g.dilation, strict=True)
    classes = [min(taps, stride // gcd(stride, dilation)) for taps, stride, dilation in axes]
    taps = prod(map(ceil_div, g.filter, classes))
    together = g.taps / (prod(classes) * taps) * filled(C * prod(classes), K * taps)
    return max(band, together, filled(C, K * g.taps))


def predict(
    geometry: ConvGeometry,
    role: Role,
    kernel: str,
    config: KernelConfig,
    dtype: str,
    precision: str,
    device: Device,
    channels_last: bool = True,
    out_dtype: str | None = None,
    epilogue: Epilogue = PLAIN,
) -> Prediction:
    """The predicted time of `kernel` ("gather", "box", "depthwise", "wgrad", ...) on a canonical geometry.

    `channels_last` is the layout of both activations.
    """
    if isinstance(config, DepthwiseConfig):
        return _depthwise(geometry, role, config, dtype, device, channels_last, out_dtype, epilogue)
    g, item, out_item = geometry, ITEM_BYTES[dtype], ITEM_BYTES[out_dtype or dtype]
    tiles, banded = TILES[kernel](role, g, config), isinstance(config, BandedConfig)
    if isinstance(config, BandedConfig):
        step = _banded_step(role, g, config, item, tiles.steps / max(tiles.total, 1))
    else:
        step = _step(role, g, config, item, out_item, channels_last, epilogue)
    resident, registers = _residents(config, step, dtype, device)
    multiplying, busy = _busy(step, registers, dtype, precision, device)
    waves, loop = _waves(tiles, busy, step, resident, device) if resident else (0, inf)
    loop += _finishing(g, role, dtype, device, epilogue)
    fetching = tiles.steps * step.bytes / device.l2_bandwidth

    least = roofline(g, role, dtype, precision, device, out_dtype, epilogue)
    bandwidth = device.bandwidth * MEMORY_SHARE
    passes = ceil_div(tiles.tiles_m * tiles.tiles_n, max(resident, 1) * device.multiprocessors)
    memory = (least.bytes + _read_again(role, g, step, item, config.splits, passes, device)) / bandwidth
    split = prod(g.shape("w")) * 2 * config.splits * max(item, 4) / bandwidth if config.splits > 1 else 0.0
    shifts = banded and role is not Role.WGRAD
    if shifts:
        split = 2 * prod(counting.shifted_shape(g, item)) * item / bandwidth
    launch = LAUNCH * (2 if config.splits > 1 or shifts else 1)
    return Prediction(
        seconds=max(loop, fetching, memory) + split + launch,
        tiles=tiles.total,
        waves=waves,
        resident=resident,
        useful=least.flops / max(tiles.steps * step.flops, 1),
        loop_seconds=loop,
        compute_seconds=tiles.steps * multiplying,
        l2_seconds=fetching,
        memory_seconds=memory,
        split_seconds=split,
        launch_seconds=launch,
        registers=registers,
    )


def absurd(found: Prediction, rule: Prediction) -> str | None:
    """What keeps a config of a file from being tried, in words; None if nothing does. `rule` is of the rule's config.

    Estimates are no measurements, so that bounds are far from what anybody measures.
    """
    if not found.resident:
        return "a multiprocessor has no room for a tile"
    if found.registers > _ABSURD_REGISTERS * max(MOST_REGISTERS, rule.registers):
        return f"a thread would have {found.registers} registers"
    if found.seconds > _ABSURD_TIME * rule.seconds:
        return f"it is predicted to take {found.seconds / rule.seconds:.3g} times as long as the rule's"
    return None


def epilogue_seconds(g: ConvGeometry, role: Role, out_dtype: str, device: Device, epilogue: Epilogue) -> float:
    """Of what an epilogue reads and writes beside the output, as far as memory goes."""
    return _epilogue_bytes(g, role, out_dtype, epilogue) / (device.bandwidth * MEMORY_SHARE)


def _epilogue_bytes(g: ConvGeometry, role: Role, out_dtype: str, epilogue: Epilogue) -> int:
    """Of the residual that is read and of what is kept, which is written."""
    output = prod(g.shape("x" if role is Role.DGRAD else "y"))
    return output * ITEM_BYTES[out_dtype] * (bool(epilogue.residual) + epilogue.keep)


def _finishing(g: ConvGeometry, role: Role, dtype: str, device: Device, epilogue: Epilogue) -> float:
    """Seconds of the epilogue's instructions, which nothing is multiplied meanwhile."""
    each = ACTIVATION[epilogue.activation] * (DOUBLE if dtype == "float64" else 1)
    each += 2 * bool(epilogue.residual) + epilogue.scale + epilogue.keep
    output = prod(g.shape("x" if role is Role.DGRAD else "y"))
    return output * each / (LANES * device.clock * device.multiprocessors)


def box_shared(config: BoxConfig, role: Role, g: ConvGeometry, dtype: str, out_dtype: str, epilogue: Epilogue) -> int:
    """Bytes of shared memory that a box kernel needs."""
    return _step(role, g, config, ITEM_BYTES[dtype], ITEM_BYTES[out_dtype], True, epilogue).shared


def fold_seconds(geometry: ConvGeometry, dtype: str, device: Device, epilogue: Epilogue = PLAIN) -> float:
    """Of folding a padded gradient onto dx; it is written and read as wide as accumulators are."""
    item = ITEM_BYTES[dtype]
    moved = _epilogue_bytes(geometry, Role.DGRAD, dtype, epilogue)
    moved += prod(geometry.padded().shape("x")) * (2 * max(item, 4) - item) + prod(geometry.shape("x")) * item
    return moved / (device.bandwidth * MEMORY_SHARE) + LAUNCH


def copy_seconds(size: int, device: Device) -> float:
    """Of copying `size` bytes into another layout: read once, written once."""
    return 2 * size / (device.bandwidth * MEMORY_SHARE) + LAUNCH


TILES: dict[str, Callable[[Role, ConvGeometry, Any], Tiles]] = {
    "gather": counting.gather,
    "box": counting.box,
    "depthwise": counting.depthwise,
    "depthwise_wgrad": counting.depthwise,
    "wgrad": lambda role, geometry, config: counting.wgrad(geometry, config),
    "box_wgrad": lambda role, geometry, config: counting.box_wgrad(geometry, config),
    "banded": counting.banded,
    "banded_wgrad": lambda role, geometry, config: counting.banded_wgrad(geometry, config),
}


def _depthwise(
    g: ConvGeometry,
    role: Role,
    config: DepthwiseConfig,
    dtype: str,
    device: Device,
    channels_last: bool,
    out_dtype: str | None,
    epilogue: Epilogue,
) -> Prediction:
    """Of kernels that issue an instruction for each product, for each source value they widen, and some for loads."""
    tiles, axes, item = counting.depthwise(role, g, config), g.axes(role), ITEM_BYTES[dtype]
    classes = prod(axis.phases for axis in axes)
    r, s = (min(u, taps) for u, taps in zip(config.unroll, g.filter[1:], strict=True))
    if role is not Role.WGRAD:
        r, s = (1, 1) if classes > 1 else (r, s if s == g.filter[2] else 1)
    parts = 1.0 if role is Role.WGRAD else g.taps / classes / (r * s)  # of the filter, one after the other
    positions, own = config.rows * config.columns, config.columns * axes[2].src_step
    across = (config.columns - 1) * axes[2].src_step + s
    rows = min((config.rows - 1) * axes[1].src_step + r, config.rows * r)
    sources, products = parts * rows * across, parts * r * s * positions
    if channels_last:
        loading = VECTOR_LOAD * (sources + (positions if role is Role.WGRAD else 0)) / config.vector
    else:
        side = max(across - own, 0) / 2  # of a row of sources, left and right of the lane's own
        beside = ceil_div(ceil(side), config.vector) * VECTOR_LOAD if side > 2 else side * ELEMENT_LOAD
        loading = parts * rows * (own / config.vector * VECTOR_LOAD + 2 * beside)
    widened = (sources if item < 4 else 0) + positions + (parts * r * s if parts > 1 and channels_last else 0)
    issued = products + widened + loading  # for each channel of a lane, a step
    threads, values = 32 * config.num_warps, config.lanes * config.channels
    start = threads * START * (2 if role is Role.WGRAD else 1)
    rate = LANES * device.clock * device.multiprocessors * ISSUED
    issuing = (tiles.steps * values * issued + tiles.total * start) / rate
    alone = (tiles.longest * values * issued + start) / rate * device.multiprocessors
    # dy and x are held as narrow as they are loaded, sums and taps are not
    held = r * s + positions / 2 if role is Role.WGRAD else positions + rows / 2 + (r * s if channels_last else 0)
    registers = SUMS + int(max(values // threads, 1) * held * max(item, 4) / 4)
    resident = max(device.registers // (min(registers, MOST_REGISTERS) * threads), 1)
    waves = ceil_div(tiles.total, resident * device.multiprocessors)

    bandwidth = device.bandwidth * MEMORY_SHARE
    least = roofline(g, role, dtype, "ieee", device, out_dtype, epilogue)
    activations = (prod(g.shape("x")) + prod(g.shape("y"))) * item
    lost = max(0.0, 1 - device.l2_bytes / max(activations / config.splits, 1))  # before a chunk reads it again
    again = activations * (tiles.tiles_m - 1) * lost if role is Role.WGRAD else 0.0
    memory = (least.bytes + again) / bandwidth
    split = prod(g.shape("w")) * 2 * config.splits * max(item, 4) / bandwidth if config.splits > 1 else 0.0
    launch = LAUNCH * (2 if config.splits > 1 else 1)
    waiting = TILE + tiles.longest * LATENCY  # for data: no step is loaded ahead, but other programs go on meanwhile
    loop = max(issuing + TILE, waves * (waiting + alone)) + _finishing(g, role, dtype, device, epilogue)
    # what several taps of a row read comes from L1 but for the first time
    fetching = tiles.steps * values * rows * own * parts * s / g.filter[2] * item / device.l2_bandwidth
    return Prediction(
        seconds=max(loop, fetching, memory) + split + launch,
        tiles=tiles.total,
        waves=waves,
        resident=resident,
        useful=least.flops / max(2 * tiles.steps * values * products, 1),
        loop_seconds=loop,
        compute_seconds=tiles.steps * values * products / rate * ISSUED,
        l2_seconds=fetching,
        memory_seconds=memory,
        split_seconds=split,
        launch_seconds=launch,
        registers=registers,
    )


class _Step(NamedTuple):
    """What a step of a main loop asks for, and what its block holds meanwhile."""

    rows: int  # of the dot's first operand
    columns: int
    flops: int
    bytes: float  # fetched through L2
    issued: float  # instructions of a thread, beside the products
    ahead: int  # steps whose data are on the way
    shared: int  # bytes of shared memory
    dot: bool
    programs: int  # a multiprocessor's most, which are 32 where each is a tile of its own
    joined: bool  # a tile's first loads are on the way before the tile before it is stored
    waste: float  # bytes fetched for each that a group needs of a pixel


def _banded_step(role: Role, g: ConvGeometry, config: BandedConfig, item: int, steps: float) -> _Step:
    """Of a tile that takes so many steps. Activations are contiguous; their rows are read in vectors that divide them.

    What a weight gradient does after the last step for a chunk of columns is divided among its steps.
    """
    blocks, threads = prod(config.blocks), 32 * config.num_warps
    filters = 16 // item
    source, grads = (g.output, g.input) if role is Role.DGRAD else (g.input, g.output)
    pixels = min(gcd(source[2], 8), filters) if g.modes[2] == "zeros" else 1
    if role is Role.WGRAD:
        rows, columns, depth = config.height * config.chunk, config.columns, blocks
        width, taps = min(gcd(grads[2], 8), filters), min(g.filter[2], counting.BANDED_TAPS)
        loads = blocks * (rows // pixels + columns // width)
        chunks = ceil_div(columns + taps - 1, config.chunk)
        gathered = config.height * taps * columns * chunks / max(steps, chunks)
        issued = BANDED_WGRAD_STEP * threads + BANDED_LOAD * loads + BANDED_GATHER * gathered
    else:
        rows, columns, depth, width = blocks, config.height * config.columns, config.chunk, filters
        issued = BANDED_STEP * threads + BANDED_LOAD * depth * (rows // pixels + columns // filters)
    stages = config.num_stages if min(pixels, width) * item >= 4 else 1  # no less is copied asynchronously
    elements = (rows + columns) * depth
    return _Step(
        rows=rows,
        columns=columns,
        flops=2 * rows * columns * depth,
        bytes=elements * item,
        issued=issued / ISSUED,
        ahead=max(stages - 1, 1),
        shared=stages * elements * item,
        dot=True,
        programs=32,
        joined=False,
        waste=1.0,
    )


def _step(
    role: Role, g: ConvGeometry, config: Any, item: int, out_item: int, channels_last: bool, epilogue: Epilogue
) -> _Step:
    C, K = g.C // g.groups, g.K // g.groups
    boxed = isinstance(config, BoxConfig)
    persistent = boxed and role is not Role.WGRAD
    dot, flatten = boxed or config.dot, not boxed and config.flatten
    narrow = max(min(C, K) * item, 1)
    waste = max(min(SECTOR, g.groups * narrow) / narrow, 1.0) if channels_last else 1.0
    block_k = config.BLOCK_K if flatten else min(config.BLOCK_K, K if role is Role.DGRAD else C)
    if role is Role.WGRAD:
        rows, columns, depth = config.BLOCK_N, config.BLOCK_K, config.BLOCK_M
        fetched = config.BLOCK_M * (min(config.BLOCK_N, K) + block_k) * waste
    else:
        rows, columns, depth = config.BLOCK_N, config.BLOCK_M, config.BLOCK_K
        fetched = block_k * (config.BLOCK_M * waste + config.BLOCK_N)
        if not boxed and not config.filters_first:
            rows, columns = columns, rows
    elements = (rows + columns) * depth
    whole_vectors = channels_last and counting.whole_vectors(g)
    # only whole vectors are copied asynchronously, and only for a dot
    stages = config.num_stages if boxed or (dot and whole_vectors) else 1
    loads = 0 if boxed else elements * item // 16 if whole_vectors else elements
    # what is kept leaves through the same memory as the output, a residual comes in beside it
    beside = 1 + bool(epilogue.residual)
    part = prod(counting.box_part(config, epilogue, role, g)) if persistent else 0
    stored = part * config.BLOCK_N * out_item * beside
    shared = stages * elements * item + stored if dot else 0
    programs = config.programs if persistent else 32
    joined = persistent and all(axis.phases == 1 for axis in g.axes(role))
    flops, ahead = 2 * rows * columns * depth, max(stages - 1, 1)
    return _Step(rows, columns, flops, fetched * item, loads * ADDRESS, ahead, shared, dot, programs, joined, waste)


def _busy(step: _Step, registers: int, dtype: str, precision: str, device: Device) -> tuple[float, float]:
    """Seconds of a step: of its products, were they spread over the device; that it keeps a multiprocessor busy."""
    matrix = step.dot and _matrix_rate(dtype, precision, device)
    share = MATRIX_SHARE * (FEW_ROWS if step.rows < 64 and device.capability in (90, 100) else 1)
    rate = matrix * share if matrix else _vector_rate(dtype, device) * VECTOR_SHARE
    multiplying, issuing = step.flops / rate, step.issued / (LANES * device.clock * device.multiprocessors)
    busy = (max(multiplying, issuing) if matrix else multiplying + issuing) * device.multiprocessors
    busy = max(busy, step.bytes / (LINK * device.clock)) * (SPILLED if registers > MOST_REGISTERS else 1)
    return multiplying, busy


def _residents(config: Any, step: _Step, dtype: str, device: Device) -> tuple[int, int]:
    """(tiles that a multiprocessor holds at a time, 0 if none fits; registers that a thread wants)."""
    threads = 32 * config.num_warps
    registers = REGISTERS + step.rows * step.columns * max(ITEM_BYTES[dtype], 4) // (4 * threads)
    if step.shared > device.shared_per_block:
        return 0, registers
    limits = [step.programs, device.registers // (min(registers, MOST_REGISTERS) * threads)]
    if step.shared:
        limits.append(device.shared_per_multiprocessor // (step.shared + 1024))  # 1024 are the driver's
    return max(min(limits), 1), registers


def _waves(tiles: Tiles, busy: float, step: _Step, resident: int, device: Device) -> tuple[int, float]:
    """(waves, their seconds), where a step keeps a multiprocessor `busy`; the last wave may leave some idle."""
    steps, waiting = tiles.steps / max(tiles.total, 1), LATENCY / step.ahead
    full, rest = divmod(tiles.total, device.multiprocessors * resident)
    last = max(ceil_div(rest, device.multiprocessors) * busy, waiting) if rest else 0.0
    seconds = max(steps * (full * max(resident * busy, waiting) + last), tiles.longest * max(busy, waiting))
    waves = full + (rest > 0)
    return waves, seconds + TILE * (1 if step.joined else waves)


def _read_again(role: Role, g: ConvGeometry, step: _Step, item: int, slabs: int, passes: int, device: Device) -> float:
    """Bytes that memory moves again: over what lies between two readings, L2 has lost the share it cannot hold.

    Groups that share sectors, residue classes that share a source and waves of one slab's tiles each pass over it all.
    """
    x, y = prod(g.shape("x")) * item, prod(g.shape("y")) * item
    if role is Role.WGRAD:
        again, between = (x + y) * (step.waste * passes - 1), (x + y) / slabs
    else:
        src, dst = (x, y) if role is Role.FPROP else (y, x)
        classes = prod(axis.tap_step for axis in g.axes(role))
        again, between = src * (step.waste * classes - 1) + dst * (step.waste - 1), x + y
    return again * max(0.0, 1 - device.l2_bytes / max(between, 1))


def _matrix_rate(dtype: str, precision: str, device: Device) -> float:
    """Flops a second of a dot of these; 0 where it has no matrix instruction."""
    if dtype == "float32":
        return {"tf32": device.matrix_tf32, "tf32x3": device.matrix_tf32 / 3, "ieee": 0.0}[precision]
    rates = {"float16": device.matrix_16, "bfloat16": device.matrix_16, "float64": device.matrix_64}
    rates |= {"float8_e4m3fn": device.matrix_fp8, "int8": device.matrix_int8, "uint8": device.matrix_int8}
    return rates.get(dtype, 0.0)


def _vector_rate(dtype: str, device: Device) -> float:
    if "int" in dtype:
        return device.vector_int32 / (3 if dtype == "int64" else 1)  # a product of int64 is three of int32
    return device.vector_64 if dtype == "float64" else device.vector_32


def _pairs(g: ConvGeometry, axis: int) -> int:
    """Pairs of an output position and a tap that meet a position of the input, along one axis."""
    extent, taps, outputs, stride = g.input[axis], g.filter[axis], g.output[axis], g.stride[axis]
    if g.modes[axis] != "zeros":
        return outputs * taps  # every padded position shows one of the input's
    pairs = 0
    for offset in range(-g.padding[axis][0], taps * g.dilation[axis] - g.padding[axis][0], g.dilation[axis]):
        first, end = max(0, ceil_div(-offset, stride)), min(outputs, ceil_div(extent - offset, stride))
        pairs += max(0, end - first)
    return pairs
