"""Plans measured on a device: kernels in graphs that are replayed, over rotated operands that L2 has forgotten."""

from __future__ import annotations

import gc
import math
import re
import subprocess
import time
import warnings
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from datetime import datetime, timezone
from functools import cache, partial
from pathlib import Path
from typing import Any, Protocol

import torch
import triton
from torch import Tensor

from .. import backends, execute, key
from ..devices import Device
from . import audit, operands, subject
from .ahead import Ahead
from .code import TARGETS, compiled_kernels, read
from .rounds import Timing, interleaved
from .subject import AnyProblem

_SAMPLE = 1e-3  # seconds of a sample, at least: what starts a graph is little beside it
_LAUNCHES = 2048  # of a graph, at most
_SECONDS = 60.0  # of rounds over plans that are measured together, at most
_HEAD_START = 300_000  # cycles that the device waits, in which the host enqueues what is measured


class Clock(Protocol):
    """What a device can be asked about time and memory, and nothing else that a test could not do without one."""

    def now(self) -> float:
        """Seconds of the host."""

    def seconds(self, work: Callable[[], object]) -> float:
        """How long the device is busy with it."""

    def captured(self, work: Callable[[], object]) -> Callable[[], object]:
        """The same launches again, without the host's part; it has run before."""

    def free_bytes(self) -> int:
        """Of the device's memory, once `emptied`."""

    def emptied(self) -> None:
        """Gives unused memory back."""


class CudaClock:
    """Events around work on the current stream of a device, graphs of it."""

    def __init__(self, device: torch.device):
        self.device = device

    def now(self) -> float:
        return time.monotonic()

    def seconds(self, work: Callable[[], object]) -> float:
        with torch.cuda.device(self.device):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            torch.cuda._sleep(_HEAD_START)  # else a sample holds what the host takes to launch a graph
            start.record()
            work()
            end.record()
            end.synchronize()
        return start.elapsed_time(end) * 1e-3

    def captured(self, work: Callable[[], object]) -> Callable[[], object]:
        # the stream is set anew, because a capture that fails leaves its own behind as the current one
        with torch.cuda.device(self.device), torch.cuda.stream(torch.cuda.current_stream(self.device)), _uncollected():
            graph = torch.cuda.CUDAGraph()
            # of this thread's errors alone: those of a training script may copy batches or watch over collectives
            with torch.cuda.graph(graph, capture_error_mode="thread_local"):
                work()
        return graph.replay

    def free_bytes(self) -> int:
        return torch.cuda.mem_get_info(self.device)[0]

    def emptied(self) -> None:
        torch.cuda.empty_cache()


@contextmanager
def _uncollected() -> Iterator[None]:
    """Without garbage collection: a graph or a module that is freed while another graph is captured spoils that one."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


class KernelBench:
    """Measures on the device that holds the tensors, by this clock; see `measure.Bench`."""

    driver = "none"
    interprets = True

    def __init__(self, where: torch.device, device: Device, clock: Clock):
        self.where, self.device, self.clock = where, device, clock
        self._problem: AnyProblem = None
        self._case: tuple[Any, Any] | None = None
        self._excesses: dict[Any, str] = {}
        ahead = not self.interprets and device.capability in TARGETS
        self._ahead = Ahead(device.capability) if ahead else None

    def stamp(self, kernel: str) -> dict[str, str]:
        return stamp(kernel, self.driver)

    def expect(self, plans: Sequence[Any]) -> None:
        """Begins to compile what will be measured, and nothing else any more."""
        if self._ahead is not None:
            self._ahead.expect(p for p in plans if p not in self._excesses)

    def fault(self, problem: AnyProblem, p: Any) -> tuple[str, str] | None:
        try:
            excess = self._excess(p)
            if excess:
                return "failed", excess
            wrong = subject.of(problem).wrong(problem, p, *self._operands(problem))
            return ("wrong", f"{wrong}: {p.role.value} of {p.asked} with {p.config}") if wrong else None
        except torch.AcceleratorError:
            raise
        except torch.OutOfMemoryError as error:
            self._forget()
            return "failed", f"out of memory: {audit.words(error)}"
        except Exception as error:  # whatever compilers and launches raise is a finding
            self._check_device()  # whose end would be this plan's doing
            return "failed", audit.words(error)

    def time(self, problem: AnyProblem, plans: Sequence[Any]) -> list[Timing | None]:
        self._make_room()
        most, kind = max((p.workspace_bytes for p in plans), default=0), subject.of(problem)
        count = self._sets(problem, most)
        while True:
            try:
                sets = [kind.case(problem, self.where, seed) for seed in range(count)]
                ready: dict[Hashable, list[dict[str, Tensor]]] = {}
                for p in plans:
                    if kind.place(p) not in ready:
                        ready[kind.place(p)] = [kind.prepared(p, case) for case in sets]
                made = [self._sampler(kind, p, ready[kind.place(p)]) for p in plans]
                samplers = {n: sampler for n, sampler in enumerate(made) if sampler is not None}
                found = interleaved(list(samplers.values()), self.clock.now, _SECONDS)
                timings = dict(zip(samplers, found, strict=True))
                return [timings.get(n) for n in range(len(plans))]
            except torch.OutOfMemoryError:
                if count == 1 and self._case is None:
                    return [None] * len(plans)
                count = max(count // 2, 1)
            sets, made, samplers, ready = [], [], {}, {}
            self._forget()

    def rivals(self, problem: AnyProblem) -> dict[str, float]:
        """Of PyTorch's own convolution on operands as they lie, and after copies to the other memory format.

        Outputs come back in the layout that the problem has. {} for what cuDNN cannot do.
        """
        names = ("cudnn contiguous", "cudnn channels_last")
        if not subject.of(problem).comparable(problem):
            return {}
        self._make_room()
        count = self._sets(problem, 2 * operands.bytes_of(problem))
        try:
            with backends.cudnn(precision="tf32" if problem.precision == "tf32" else "ieee"):
                sets = [operands.operands(problem, self.where, seed) for seed in range(count)]
                works = [[convolution(*tensors, last) for tensors in sets] for last in (False, True)]
                samplers = [repeated(self.clock, work) for work in works]
                found = interleaved(samplers, self.clock.now, _SECONDS)
        except RuntimeError:  # no algorithm, or no memory for it, or none that can be captured
            self._check_device()
            self._forget()
            return {}
        return {name: t.seconds for name, t in zip(names, found, strict=True) if t is not None}

    def _excess(self, p: Any) -> str:
        """What a plan's kernels take too much of, or why they do not compile, in words."""
        if self.interprets:
            return ""
        if p not in self._excesses:
            if self._ahead is not None:
                rows = self._ahead.rows(p)
                codes, found = [row.code for row in rows if row.code], [row.error for row in rows if not row.code]
            else:
                arch = max((arch for arch in TARGETS if arch <= self.device.capability), default=min(TARGETS))
                with torch.cuda.device(self.where):
                    codes, found = [read(kernel, arch) for _, kernel in compiled_kernels(p)], []
            found += [words for code in codes for words in audit.excesses(code, self.device)]
            self._excesses[p] = "; ".join(found)
        return self._excesses[p]

    def _operands(self, problem: AnyProblem) -> tuple[Any, Any]:
        """(operands and outputs, what plans should write)."""
        if self._case is None or self._problem != problem:
            self._forget()
            kind = subject.of(problem)
            case = kind.case(problem, self.where, seed=0)
            self._problem, self._case = problem, (case, kind.expected(problem, case))
        return self._case

    def _sets(self, problem: AnyProblem, beside: int) -> int:
        """How many sets of operands to take in turns, for which L2 must be too small without the bytes beside each."""
        size = subject.of(problem).bytes_of(problem)
        return rotation(size, self.device.l2_bytes, self.clock.free_bytes() * size // (size + beside))

    def _make_room(self) -> None:
        """Keeps what candidates are compared with, if it is little: a reference may take seconds."""
        self.clock.emptied()
        if self._case is not None:
            want = self._case[1] if isinstance(self._case[1], tuple) else self._case[1:]
            held = subject.of(self._problem).bytes_of(self._problem)
            held += sum(t.numel() * t.element_size() for t in want)
            if held > self.clock.free_bytes() // 4:
                self._forget()

    def _forget(self) -> None:
        self._case = None
        self.clock.emptied()

    def _check_device(self) -> None:
        """Raises torch.AcceleratorError where the device answers nothing any more."""
        self.clock.seconds(lambda: None)

    def _sampler(self, kind: subject.Subject, p: Any, ready: Sequence[dict[str, Tensor]]) -> Callable[[], float] | None:
        """Samples of a plan's kernel on these tensors in turns; None where it cannot be captured."""
        on = kind.work(p, self.where)
        try:
            return repeated(self.clock, [partial(on, t) for t in ready])
        except torch.OutOfMemoryError:
            raise
        except Exception as error:
            self._check_device()
            warnings.warn(f"not measured: {p.kernel} {p.config}: {audit.words(error)}", stacklevel=2)
            return None


class CudaBench(KernelBench):
    """Measures on a CUDA device, by its index. Raises RuntimeError where there is none."""

    interprets = False

    def __init__(self, index: int = 0):
        if not torch.cuda.is_available():
            raise RuntimeError("there is no CUDA device to measure on")
        where = torch.device("cuda", index)
        device = execute.device_of(where)
        assert device is not None
        super().__init__(where, device, CudaClock(where))
        self.driver = driver()


def repeated(clock: Clock, works: Sequence[Callable[[], object]]) -> Callable[[], float]:
    """Samples: seconds of one work, from so many one after the other that they fill a sample. All run once before."""
    batch = partial(in_turn, works)
    clock.seconds(partial(batch, 1))  # compiles, and lets cuDNN choose: neither can be captured
    times, replay = 1, clock.captured(partial(batch, 1))
    clock.seconds(replay)  # the first one carries the graph to the device
    needed = repeats(clock.seconds(replay), len(works))
    if needed > 1:
        times, replay = needed, clock.captured(partial(batch, needed))
        clock.seconds(replay)
    return lambda: clock.seconds(replay) / (times * len(works))


def in_turn(works: Sequence[Callable[[], object]], times: int) -> None:
    """Does all of them, so many times."""
    for _ in range(times):
        held = [work() for work in works]  # so that outputs rotate too
        del held


def rotation(size: int, l2_bytes: int, free_bytes: int) -> int:
    """How many sets of `size` bytes to take in turns: more than twice what L2 holds, less than half of free memory.

    >>> rotation(30 * 2**20, 60 * 2**20, 8 * 2**30)
    5
    """
    enough = 2 * l2_bytes // max(size, 1) + 1
    return max(1, min(max(enough, 2), free_bytes // (2 * max(size, 1)), _LAUNCHES // 2))


def repeats(seconds: float, works: int) -> int:
    """How often to repeat so many works, which take `seconds`, for a sample.

    >>> repeats(1e-4, 5)
    10
    """
    return max(1, min(math.ceil(_SAMPLE / max(seconds, 1e-9)), _LAUNCHES // works))


def convolution(call: execute.Call, output: Tensor, channels_last: bool) -> Callable[[], Tensor]:
    """PyTorch's own convolution of a call, as `triton_conv.backend("auto")` runs it: with copies to a memory format."""
    how = (call.bias, tuple(output.shape), output.stride(), channels_last)
    return partial(backends.convolve, call.role, call.geometry, call.a, call.b, *how)


def stamp(kernel: str, driver: str) -> dict[str, str]:
    """The names of a stored entry's stamp for measurements of now."""
    checkout = commit()
    return {
        "kernel": key.source_hash(kernel),
        "triton": triton.__version__,
        "torch": torch.__version__,
        "driver": driver,
        "time": datetime.now(timezone.utc).isoformat(timespec="microseconds"),
        **({"commit": checkout} if checkout else {}),
    }


@cache
def commit() -> str:
    """Of the checkout that this package is in, "" where it is in none."""
    root = Path(__file__).parents[2]
    if not (root / ".git").exists():
        return ""
    command = ["git", "-C", str(root), "rev-parse", "--short=12", "HEAD"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


def driver() -> str:
    """The version of NVIDIA's driver."""
    try:
        text = Path("/proc/driver/nvidia/version").read_text(encoding="utf-8")
    except OSError:
        text = ""
    found = re.search(r"\b(\d{3}\.\d+(?:\.\d+)?)\b", text)
    return found[1] if found else f"of CUDA {torch.version.cuda}"
