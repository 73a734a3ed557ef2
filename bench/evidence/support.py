"""What the stages of training, features and the sanitizer share."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from triton_conv import execute, plan
from triton_conv.devices import Device
from triton_conv.explain import AnyPlan
from triton_conv.plan import Plan
from triton_conv.tuning import record
from triton_conv.tuning.ahead import Ahead
from triton_conv.tuning.code import TARGETS


def left_out(why: str) -> dict[str, Any]:
    """The facts of a unit that cannot run here.

    >>> left_out("needs CUDA")["words"]
    'left out: needs CUDA'
    """
    return {"ok": True, "left_out": True, "words": f"left out: {why}"}


class Laps:
    """How long pieces of work took a device, in seconds: events on a GPU, the host's clock elsewhere."""

    def __init__(self, device: torch.device):
        self.device = device
        self._taken: list[Any] = []

    @contextmanager
    def lap(self) -> Iterator[None]:
        """Times what is enqueued inside, and does not wait for it."""
        if self.device.type != "cuda":
            start = time.perf_counter()
            yield
            self._taken.append(time.perf_counter() - start)
            return
        first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        first.record(torch.cuda.current_stream(self.device))
        yield
        last.record(torch.cuda.current_stream(self.device))
        self._taken.append((first, last))

    def seconds(self) -> list[float]:
        """Of every lap, once all are over."""
        wait(self.device)
        return [lap if isinstance(lap, float) else lap[0].elapsed_time(lap[1]) * 1e-3 for lap in self._taken]


def placed(model: Any, device: torch.device) -> Any:
    """The module itself, on a device and channels-last."""
    return model.to(device, memory_format=torch.channels_last)


def wait(device: torch.device) -> None:
    """Until a device has nothing more to do."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def freed(device: torch.device) -> None:
    """Gives back what nobody holds any more."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def later_median(seconds: Sequence[float]) -> float:
    """The median of the second half, which neither compiles nor chooses algorithms any more.

    >>> later_median([9.0, 5.0, 1.0, 2.0, 1.5])
    1.5
    """
    return statistics.median(seconds[len(seconds) // 2 :])


def thinned(values: Sequence[float], most: int = 50) -> list[float]:
    """At most so many values, evenly spaced, the first and the last among them.

    >>> thinned(range(100), 4)
    [0, 33, 66, 99]
    """
    if len(values) <= most:
        return list(values)
    return [values[round(i * (len(values) - 1) / (most - 1))] for i in range(most)]


def different(first: Mapping[str, Tensor], second: Mapping[str, Tensor]) -> list[str]:
    """The names under which two sets of tensors have different bits, or a NaN."""
    return [name for name in first if not torch.equal(first[name], second[name])]


def apart(got: Tensor, want: Tensor) -> float:
    """The norm of a difference as a share of what it should be."""
    want, got = want.double(), got.double()
    norm = float(want.norm())
    return float((got - want).norm()) / norm if norm else float(got.norm())


def plans_of(model: torch.nn.Module, images: Tensor, device: Device, autocast: torch.dtype | None = None) -> list[Plan]:
    """What `convert(model)` will run on channels-last images, forward and backward, each plan once."""
    calls = record.calls_of(model, images, autocast=autocast, channels_last=True)
    return [plan.make(problem) for problem in dict.fromkeys(execute.problem_of(call, device) for call in calls)]


def compile_ahead(plans: Iterable[AnyPlan], where: torch.device) -> dict[str, Any]:
    """Compiles plans by all processors at once, and says how long that took.

    What cannot be compiled ahead is compiled, or fails, when it is launched.
    """
    device, wanted = execute.device_of(where), list(dict.fromkeys(plans))
    if where.type != "cuda" or device is None or device.capability not in TARGETS:
        return {"plans": 0, "seconds": 0.0, "faults": []}
    start, faults = time.monotonic(), []
    try:
        ahead = Ahead(device.capability)
        ahead.expect(wanted)
        for p in wanted:
            faults += [f"{row.kernel} {row.config}: {row.error}" for row in ahead.rows(p) if row.error]
    except RuntimeError as error:  # its processes die
        faults.append(str(error))
    return {"plans": len(wanted), "seconds": round(time.monotonic() - start, 3), "faults": faults[:5]}
