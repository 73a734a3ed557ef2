"""How long plans take and whether they are right: on a device, or on a simulated one that runs nothing."""

from __future__ import annotations

import math
import random
from collections import Counter
from collections.abc import Callable, Collection, Sequence
from typing import Any, Protocol

from .. import cost
from ..config import KernelConfig
from ..devices import Device
from .on_device import CudaBench as CudaBench
from .on_device import stamp
from .rounds import Timing as Timing
from .rounds import interleaved
from .subject import AnyProblem, of

Fault = tuple[str, str]  # ("wrong" or "failed", why)


class Bench(Protocol):
    """Where plans are measured; what it measures is the kernel of a plan, without copies and folds around it."""

    device: Device

    def stamp(self, kernel: str) -> dict[str, str]:
        """What a measurement of a kernel is made with: names of its source, versions, the time."""

    def fault(self, problem: AnyProblem, p: Any) -> Fault | None:
        """What keeps a plan from being measured, None if nothing does: it compiles, fits, and its values are right.

        Raises torch.AcceleratorError where the device answers nothing any more.
        """

    def time(self, problem: AnyProblem, plans: Sequence[Any]) -> list[Timing | None]:
        """Timings of plans measured in turns; None where time ran out. The slower ones have fewer rounds."""

    def rivals(self, problem: AnyProblem) -> dict[str, float]:
        """Seconds that others' kernels take for the problem, by name."""


SIMULATED = "simulated"  # the driver in the stamps of times that nobody measured


class SimulatedBench:
    """A device on which a plan takes its predicted time, times a factor that its config decides, times noise.

    >>> from triton_conv.devices import H200
    >>> SimulatedBench(H200, noise=0.05, seed=7).stamp("box")["driver"]
    'simulated'

    The factor is between 0.8 and 1.25; `noise` is the largest relative error of a sample, but for one sample in a
    hundred, which takes up to three times as long. The same seed gives the same samples, in whatever order plans are
    measured. Configs in `wrong` have wrong values. `clock` is told the seconds that each sample takes: `time.sleep`
    makes it take them.
    """

    def __init__(
        self,
        device: Device,
        noise: float = 0.0,
        seed: int = 0,
        wrong: Collection[KernelConfig] = (),
        clock: Callable[[float], object] | None = None,
    ):
        self.device, self.noise, self.seed, self.wrong, self.clock = device, noise, seed, wrong, clock
        self._measured: Counter[str] = Counter()

    def stamp(self, kernel: str) -> dict[str, str]:
        return stamp(kernel, SIMULATED)

    def fault(self, problem: AnyProblem, p: Any) -> Fault | None:
        if p.prediction.seconds == math.inf:
            return "failed", "simulated: it does not fit"
        return ("wrong", "simulated: its values are wrong") if p.config in self.wrong else None

    def time(self, problem: AnyProblem, plans: Sequence[Any]) -> list[Timing | None]:
        return interleaved([self._sampler(p) for p in plans])

    def rivals(self, problem: AnyProblem) -> dict[str, float]:
        if not of(problem).comparable(problem):
            return {}
        what = (problem.role, problem.dtype, problem.precision, problem.device, problem.out_dtype)
        least = cost.roofline(problem.geometry, *what).seconds + cost.LAUNCH
        draw = random.Random(f"rival {problem}")
        return {name: least * draw.uniform(1.2, 2.0) for name in ("cudnn contiguous", "cudnn channels_last")}

    def seconds(self, p: Any) -> float:
        """What a plan's kernel takes here, without noise."""
        return p.prediction.seconds * random.Random(repr(p.config)).uniform(0.8, 1.25)

    def _sampler(self, p: Any) -> Callable[[], float]:
        what = f"{p.config!r} {p.asked} {p.role}"
        self._measured[what] += 1
        draw, exact = random.Random(f"{self.seed} {self._measured[what]} {what}"), self.seconds(p)

        def sample() -> float:
            outlier = draw.uniform(1, 3) if self.noise and draw.random() < 0.01 else 1.0
            seconds = exact * draw.uniform(1 - self.noise, 1 + self.noise) * outlier
            if self.clock is not None:
                self.clock(seconds)
            return seconds

        return sample
