"""The layers that benchmarks run: those that tests check and the tuner measures."""

from triton_conv.tuning.suites import SUITES, Suite, layers

__all__ = ["SUITES", "Suite", "layers"]
