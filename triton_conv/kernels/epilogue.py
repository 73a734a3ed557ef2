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
def scaled(
    acc,
    scale_a,
    scale_b,
    scale,
    bias,
    channels,
    valid,
    HAS_SCALE: tl.constexpr,
    SCALED: tl.constexpr,
    HAS_BIAS: tl.constexpr,
):
    """acc [channels, pixels] times all scales, plus bias; scale and bias are pointers to the tile's group."""
    if HAS_SCALE:
        acc *= tl.load(scale_a) * tl.load(scale_b)
    if SCALED:
        acc *= tl.load(scale + channels, mask=valid, other=0).to(acc.dtype)[:, None]
    if HAS_BIAS:
        acc += tl.load(bias + channels, mask=valid, other=0).to(acc.dtype)[:, None]
    return acc


@triton.jit
def store(
    acc,
    at,
    valid,
    residual,
    kept,
    dst,
    RESIDUAL: tl.constexpr,
    ACTIVATION: tl.constexpr,
    SLOPE: tl.constexpr,
    KEEPS: tl.constexpr,
):
    """Writes the outputs of scaled and biased sums, and what is kept, to these offsets of tensors that are alike.

    Each is loaded or written as soon as may be: together they are more registers than the sums.
    """
    if RESIDUAL == "before":
        acc += tl.load(residual + at, mask=valid, other=0).to(acc.dtype)
    if KEEPS:
        tl.store(kept + at, acc.to(dst.dtype.element_ty), mask=valid)
    acc = activate(acc, SLOPE, ACTIVATION)
    if RESIDUAL == "after":
        acc += tl.load(residual + at, mask=valid, other=0).to(acc.dtype)
    tl.store(dst + at, acc.to(dst.dtype.element_ty), mask=valid)


@triton.jit
def gelu(x):
    """x times the normal distribution function of x, to within two roundings of the larger of 1 and the result.

    In float32 that function is sigmoid(x p(x^2)), with a polynomial p that was fitted to its logit such that x times it
    is wrong by 7e-8 at most. The compiler's erf takes twice the registers, and 1 + erf(x) cancels where x is negative.
    """
    if x.dtype == tl.float64:
        return x * (0.5 + 0.5 * tl.erf(x * 0.7071067811865476))
    else:
        u = x * x
        p = 7.93821885e-6 + u * (-2.66892813e-7 + u * 3.61123268e-9)
        p = 0.072668567 + u * (-6.62599882e-5 + u * (-1.10480317e-4 + u * p))
        return x / (1 + tl.exp(-x * (1.59576843 + u * p)))


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
        return gelu(x)
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
