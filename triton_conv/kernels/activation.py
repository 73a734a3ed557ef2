"""Gradients of activations: dz = dy * activation'(z), from z or, where that is enough, from the activation of z.

Each element is read and written once, in whatever order the tensors lie in memory: all three lie alike. What it
computes is bound by memory. Powers of e overflow to infinity only where they are divided by.
"""

from __future__ import annotations

from math import pi, sqrt

import triton
import triton.language as tl

from .epilogue import GELU_CUBIC, GELU_LINEAR
from .indexing import channel_block, launchable, power_of_two_in
from .launch import Launch, all_registers

SQRT_HALF: tl.constexpr = tl.constexpr(sqrt(0.5))
DENSITY: tl.constexpr = tl.constexpr(1 / sqrt(2 * pi))  # of the standard normal distribution at 0


@triton.jit
def gradient(g, s, SLOPE: tl.constexpr, ACTIVATION: tl.constexpr, OF_OUTPUT: tl.constexpr):
    """g * activation'(z), where s is z, or with OF_OUTPUT activation(z); what PyTorch has where s is NaN."""
    if ACTIVATION == "relu":
        return tl.where(s <= 0, 0, g)
    elif ACTIVATION == "relu6":
        return tl.where((s <= 0) | (s >= 6), 0, g)
    elif ACTIVATION == "leaky_relu":
        return tl.where(s > 0, g, g * SLOPE)
    elif ACTIVATION == "sigmoid":
        y = s if OF_OUTPUT else 1 / (1 + tl.exp(-s))
        return g * (y * (1 - y))
    elif ACTIVATION == "silu":
        y = 1 / (1 + tl.exp(-s))
        return g * (y * (1 + s * (1 - y)))
    elif ACTIVATION == "gelu":
        return g * (0.5 + 0.5 * tl.erf(s * SQRT_HALF) + s * (tl.exp(-0.5 * (s * s)) * DENSITY))
    elif ACTIVATION == "gelu_tanh":  # of s * sigmoid(u(s)), u(s) = GELU_LINEAR * s + GELU_CUBIC * s^3
        u = s * (GELU_LINEAR + GELU_CUBIC * (s * s))
        y = 1 / (1 + tl.exp(-u))
        rest = 1 / (1 + tl.exp(u))  # 1 - y would cancel, and what is left is multiplied by up to 40
        return g * (y + s * (y * rest) * (GELU_LINEAR + 3 * GELU_CUBIC * (s * s)))
    else:
        tl.static_assert(ACTIVATION == "hardswish")
        return tl.where(s <= -3, 0, tl.where(s >= 3, g, g * (s / 3 + 0.5)))


@triton.jit(do_not_specialize=["total"])
def activation_backward_kernel(
    dy,
    saved,
    dz,
    total,
    ACTIVATION: tl.constexpr,
    SLOPE: tl.constexpr,
    OF_OUTPUT: tl.constexpr,
    VEC: tl.constexpr,
    INDEX: tl.constexpr,
    ACC: tl.constexpr,
    BLOCK: tl.constexpr,
):
    i, valid = channel_block(tl.program_id(0).to(INDEX) * BLOCK, total, BLOCK, VEC)  # [BLOCK]
    g = tl.load(dy + i, mask=valid, other=0).to(ACC)
    s = tl.load(saved + i, mask=valid, other=0).to(ACC)
    tl.store(dz + i, gradient(g, s, SLOPE, ACTIVATION, OF_OUTPUT).to(dz.dtype.element_ty), mask=valid)


def launch(problem, config, accumulator: str) -> Launch:
    """dz from dy and what was saved; `problem` is an `activation_plan.ActivationProblem`."""
    p = problem
    arguments = {
        "total": p.total,
        "ACTIVATION": p.activation,
        "SLOPE": p.slope,
        "OF_OUTPUT": p.of_output,
        "VEC": min(power_of_two_in(p.total), 16),
        "INDEX": tl.int64 if p.total + config.block >= 2**31 else tl.int32,
        "ACC": getattr(tl, accumulator),
        "BLOCK": config.block,
        "num_warps": config.num_warps,
    }
    if accumulator == "float64":
        arguments["maxnreg"] = all_registers(config.num_warps)
    programs = launchable(triton.cdiv(p.total, config.block), p)
    return Launch("activation_backward", activation_backward_kernel, programs, ("dy", "saved", "dz"), arguments)
