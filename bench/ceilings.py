"""What ideal loops reach on a device: what shares of a roofline are shares of."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from statistics import median
from typing import Any

import torch

from triton_conv.tuning.on_device import Clock

COPY_BYTES = 2**30  # read, and as many written: far more than any L2
EDGE = 8192  # of square matrices
IEEE_EDGE = 4096  # of those that vector units multiply
SAMPLES, REPEATS = 9, 10


def ceilings(
    where: torch.device, clock: Clock, copy_bytes: int = COPY_BYTES, edge: int = EDGE, ieee_edge: int = IEEE_EDGE
) -> dict[str, float]:
    """ "copy" in bytes a second, reads and writes together; "matmul bfloat16", "matmul float16", "matmul tf32" and
    "matmul float32" (as ieee) in flops a second. Matrices are random: zeros take less power, and so run faster. What
    cannot be multiplied is left out, with a warning.
    """
    source = torch.empty(copy_bytes // 4, dtype=torch.float32, device=where).normal_()
    target = torch.empty_like(source)
    found = {"copy": 2 * copy_bytes / _seconds(clock, partial(target.copy_, source))}
    del source, target
    kinds = {
        "bfloat16": (torch.bfloat16, "ieee", edge),
        "float16": (torch.float16, "ieee", edge),
        "tf32": (torch.float32, "tf32", edge),
        "float32": (torch.float32, "ieee", ieee_edge),
    }
    for name, (dtype, precision, size) in kinds.items():
        a, b, c = (torch.empty(size, size, dtype=dtype, device=where).normal_() for _ in range(3))
        try:
            with matmul_precision(precision):
                found[f"matmul {name}"] = 2 * size**3 / _seconds(clock, partial(torch.mm, a, b, out=c))
        except torch.AcceleratorError:
            raise
        except RuntimeError as error:  # without one of them the rows are worth as much
            warnings.warn(f"no ceiling of {name}: {error}", stacklevel=2)
        del a, b, c
    clock.emptied()
    return found


@contextmanager
def matmul_precision(precision: str) -> Iterator[None]:
    """Within it, matrix products of float32 are "tf32" or "ieee"."""
    settings: Any = torch.backends.cuda.matmul
    before = settings.fp32_precision
    with torch.backends.__allow_nonbracketed_mutation():
        settings.fp32_precision = precision
    try:
        yield
    finally:
        with torch.backends.__allow_nonbracketed_mutation():
            settings.fp32_precision = before


def _seconds(clock: Clock, work: Callable[[], object]) -> float:
    def several() -> None:
        for _ in range(REPEATS):
            work()

    clock.seconds(several)
    return median(clock.seconds(several) for _ in range(SAMPLES)) / REPEATS
