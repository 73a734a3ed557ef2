"""What happens to an accumulator before it is stored; shared by every kernel that writes activations.

`triton_conv.epilogue` has the formula. Constants that say what there is to do:

| constant   | meaning                                                                               |
|------------|---------------------------------------------------------------------------------------|
| HAS_SCALE  | two numbers, those of 8-bit operands, are multiplied in                               |
| SCALED     | a number for each destination channel is multiplied in                                |
| HAS_BIAS   | a number for each destination channel is added                                        |
| RESIDUAL   | a tensor like the destination is added "before" the activation or "after" it, or not: "" |
| ACTIVATION | of `triton_conv.epilogue.ACTIVATIONS`, or ""; SLOPE is leaky_relu's                    |
| KEEPS      | what the activation is applied to is stored as well                                   |
"""

from __future__ import annotations

import triton
import triton.language as tl

# 2 * sqrt(2 / pi), and that times the cubic term of gelu's approximation by tanh: Hendrycks and Gimpel (2016).
GELU_LINEAR: tl.constexpr = tl.constexpr(1.5957691216057308)
GELU_CUBIC: tl.constexpr = tl.constexpr(1.5957691216057308 * 0.044715)
SQRT_HALF: tl.constexpr = tl.constexpr(0.7071067811865476)


@triton.jit
def finish(
    acc, scale_a, scale_b, bias, channels, valid, HAS_SCALE: tl.constexpr, HAS_BIAS: tl.constexpr, dtype: tl.constexpr
):
    """acc [channels, pixels] times both scales, plus bias (a pointer to the tile's group), as the output's dtype."""
    if HAS_SCALE:
        acc *= tl.load(scale_a) * tl.load(scale_b)
    if HAS_BIAS:
        acc += tl.load(bias + channels, mask=valid, other=0).to(acc.dtype)[:, None]
    return acc.to(dtype)


@triton.jit
def finish_all(
    acc,
    scale_a,
    scale_b,
    scale,
    bias,
    residual,
    channels,
    valid,
    HAS_SCALE: tl.constexpr,
    SCALED: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    RESIDUAL: tl.constexpr,
    ACTIVATION: tl.constexpr,
    SLOPE: tl.constexpr,
    dtype: tl.constexpr,
):
    """(output, what its activation is applied to) of acc [channels, pixels]; `residual` holds values.

    scale and bias are pointers to the numbers of the tile's group.
    """
    if HAS_SCALE:
        acc *= tl.load(scale_a) * tl.load(scale_b)
    if SCALED:
        acc *= tl.load(scale + channels, mask=valid, other=0).to(acc.dtype)[:, None]
    if HAS_BIAS:
        acc += tl.load(bias + channels, mask=valid, other=0).to(acc.dtype)[:, None]
    return activated(acc, residual, RESIDUAL, ACTIVATION, SLOPE, dtype)


@triton.jit
def activated(
    acc, residual, RESIDUAL: tl.constexpr, ACTIVATION: tl.constexpr, SLOPE: tl.constexpr, dtype: tl.constexpr
):
    """(output, what its activation is applied to) of sums that are scaled and biased."""
    if RESIDUAL == "before":
        acc += residual.to(acc.dtype)
    out = activate(acc, SLOPE, ACTIVATION)
    if RESIDUAL == "after":
        out += residual.to(acc.dtype)
    return out.to(dtype), acc.to(dtype)


@triton.jit
def activate(x, SLOPE: tl.constexpr, ACTIVATION: tl.constexpr):
    """The activation of x, in its type; of NaN it is NaN, as PyTorch has it. Integers have relu alone.

    Exponentials overflow to infinity only where they are divided by, and nothing cancels: gelu_tanh is written as
    x * sigmoid(2 z), which is x / 2 * (1 + tanh(z)).
    """
    if ACTIVATION == "relu":
        return tl.where(x <= 0, 0, x)
    elif ACTIVATION == "relu6":
        return tl.where(x <= 0, 0, tl.where(x >= 6, 6, x))
    elif ACTIVATION == "leaky_relu":
        return tl.where(x > 0, x, x * SLOPE)
    elif ACTIVATION == "silu":
        return x / (1 + tl.exp(-x))
    elif ACTIVATION == "gelu":
        return x * (0.5 + 0.5 * tl.erf(x * SQRT_HALF))
    elif ACTIVATION == "gelu_tanh":
        return x / (1 + tl.exp(-x * (GELU_LINEAR + GELU_CUBIC * (x * x))))
    elif ACTIVATION == "sigmoid":
        return 1 / (1 + tl.exp(-x))
    elif ACTIVATION == "hardswish":
        y = x + 3
        return x * tl.where(y <= 0, 0, tl.where(y >= 6, 6, y)) / 6
    else:
        return x


def constants(numerics) -> dict:
    """The compile-time arguments above, all but HAS_SCALE; the operands are `numerics.operands`."""
    e = numerics.epilogue
    return {
        "SCALED": e.scale,
        "HAS_BIAS": numerics.has_bias,
        "RESIDUAL": e.residual,
        "ACTIVATION": e.activation,
        "SLOPE": e.slope if e.activation == "leaky_relu" else 0.0,  # or other slopes would be other kernels
        "KEEPS": e.keep,
    }
