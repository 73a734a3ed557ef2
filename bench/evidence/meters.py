"""What a stage measures with."""

from __future__ import annotations

from ..runner import CudaMeter, Meter, SimulatedMeter
from .units import Context


def of(context: Context) -> Meter:
    """The meter of the device; in a simulation one that runs the kernels small, and whose times mean nothing."""
    return SimulatedMeter() if context.simulate else CudaMeter(context.device.index or 0)
