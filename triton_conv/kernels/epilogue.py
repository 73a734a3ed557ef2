"""What happens to an accumulator before it is stored; shared by every kernel that writes activations."""

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
