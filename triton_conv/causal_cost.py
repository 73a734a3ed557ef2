"""The predicted time of a causal convolution, and the least; as `cost`, whose constants hold here too.

A thread issues an instruction for every product and some for each value that it loads, activates and stores. A
multiprocessor issues them, takes exponentials and reciprocals elsewhere, and memory moves every tensor once: whatever
takes longest is the time. Instructions of an output are within a fifth of those in compiled main loops.
"""

from __future__ import annotations

from .causal_config import CausalConfig, CausalProblem, CausalRole, blocks, slabs, steps
from .config import ITEM_BYTES
from .cost import (
    ISSUED,
    LANES,
    LAUNCH,
    MEMORY_SHARE,
    REGISTERS,
    TILE,
    Prediction,
    Roofline,
    _vector_rate,
)
from .tiles import ceil_div

# Instructions of causal kernels as compiled.
VECTOR_ADDRESS = 6  # for the address and the mask of a vector
START = 300  # of a program before its first product
SPECIAL = 16  # exponentials and reciprocals of a multiprocessor in a clock: CUDA Programming Guide 13, throughputs
SIGMOID = 4  # instructions, two of them special
SLOPE = 5  # instructions that make of a sigmoid and dy what arrives at the sum
HALVES = 2  # values that one instruction rounds to 16 bits


def roofline(p: CausalProblem) -> Roofline:
    """The least time on the device: products of taps that meet the input, every tensor moved once, uncached."""
    backward, update = p.role is CausalRole.BACKWARD, p.role is CausalRole.UPDATE
    met = p.W * p.L if p.has_state else sum(max(p.L - k, 0) for k in range(p.W))
    flops = 2 * p.N * p.C * met * (2 + p.silu if backward else 1)  # x alone tells the slope of an activation
    parameters = p.W * p.C * ITEM_BYTES[p.weight_dtype] + (p.C * ITEM_BYTES[p.bias_dtype] if p.bias_dtype else 0)
    states = p.N * p.C * (p.W - 1) * p.item_bytes if p.has_state else 0
    written_too = 2 if backward or update else 1
    moved = p.N * p.C * p.L * p.item_bytes * (3 if backward else 2) + states * written_too
    moved += parameters * (2 if backward else 1)
    computing, moving = flops / _vector_rate(p.dtype, p.device), moved / p.device.bandwidth
    return Roofline(flops, moved, "memory bandwidth" if moving >= computing else "vector rate", max(computing, moving))


def predict(p: CausalProblem, config: CausalConfig) -> Prediction:
    """The predicted time of the kernel of `p.role`, and backward of the sum of its slabs."""
    device, least, backward = p.device, roofline(p), p.role is CausalRole.BACKWARD
    threads = 32 * config.num_warps
    held = config.runs * config.channels // threads  # channels of a thread, at as many positions as its unit has
    programs = p.N * blocks(p, config) * config.splits
    walked = p.L if p.role is CausalRole.UPDATE else steps(p, config)
    values = programs * walked * threads * held * config.unit

    products, others, special = _of_an_output(p, config)
    clock = device.clock * device.multiprocessors
    each = (products + others) / (LANES * ISSUED)
    loop = max(each, special / SPECIAL) * values / clock
    loop += programs * threads * START / (LANES * ISSUED * clock)
    window = (2 * p.W + config.unit - 1) * (2 if backward else 1)
    registers = min(REGISTERS // 2 + held * window * p.item_bytes_of_sums // 4, 255)
    resident = max(device.registers // (registers * threads), 1)
    waves = ceil_div(programs, resident * device.multiprocessors)
    bandwidth = device.bandwidth * MEMORY_SHARE
    count, terms, channels = slabs(p, config) if backward else (0, 0, 0)
    split = 2 * count * terms * channels * p.item_bytes_of_sums / bandwidth
    launch = LAUNCH * (2 if backward else 1)
    loop += TILE * waves
    memory = least.bytes / bandwidth
    return Prediction(
        seconds=max(loop, memory) + split + launch,
        tiles=programs,
        waves=waves,
        resident=resident,
        useful=p.N * p.C * p.L / max(values, 1),
        loop_seconds=loop,
        compute_seconds=values * products / (LANES * clock),
        l2_seconds=least.bytes / device.l2_bandwidth,
        memory_seconds=memory,
        split_seconds=split,
        launch_seconds=launch,
    )


def limit(prediction: Prediction) -> str:
    """What the predicted time is spent on."""
    parts = {
        "memory bandwidth": prediction.memory_seconds,
        "instructions": prediction.loop_seconds,
        "launches and slabs": prediction.split_seconds + prediction.launch_seconds,
    }
    return max(parts, key=lambda part: parts[part])


def vector(p: CausalProblem, config: CausalConfig) -> int:
    """Values that a load brings."""
    if p.role is CausalRole.UPDATE:
        return 1
    most = 16 // p.item_bytes
    strides = (*p.x, *p.y, *p.dx, *(() if p.rows else (p.L,)))
    if p.rows:
        most = min(most, config.runs * config.channels // (32 * config.num_warps))
        strides = (*strides, p.C)
    return most if not any(n % most for n in strides) else 1


def _of_an_output(p: CausalProblem, config: CausalConfig) -> tuple[float, float, float]:
    """Instructions for an output: those that multiply, the others, and how many of these are special."""
    addresses = VECTOR_ADDRESS / vector(p, config)
    rounding: float = 1 / HALVES if p.item_bytes == 2 else 0.0
    widening = 1 if p.item_bytes == 2 else 0
    if p.role is not CausalRole.BACKWARD:
        sigmoid = SIGMOID + 1 if p.silu else 0
        return p.W, sigmoid + widening + rounding + 2 * addresses, 2 if p.silu else 0
    # g is computed for W - 1 positions more than dx where no walk brings it along
    again = 1.0 if p.rows else (config.unit + p.W - 1) / config.unit
    products = p.W * (2 + (again if p.silu else 0)) + p.has_bias
    activating = again * (SIGMOID + SLOPE) if p.silu else 0
    others = activating + 2 * again * widening + rounding + (1 + 2 * again) * addresses
    return products, others, 2 * again if p.silu else 0
