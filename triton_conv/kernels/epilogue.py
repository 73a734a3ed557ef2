"""What happens to an accumulator before it is stored; shared by every kernel that writes activations."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def finish(acc, bias, channels, valid, HAS_BIAS: tl.constexpr, dtype: tl.constexpr):
    """acc [channels, pixels] with bias (a pointer to the tile's group) added, cast to the output's dtype."""
    if HAS_BIAS:
        acc += tl.load(bias + channels, mask=valid, other=0).to(acc.dtype)[:, None]
    return acc.to(dtype)
