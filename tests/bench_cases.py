"""Layers, jobs and meters of benchmarks that need no GPU."""

import torch
from test_measure import FakeClock

from bench import kinds
from bench.device_meter import DeviceMeter
from bench.jobs import Job
from bench.records import (
    CAT_CHANNELS_LAST,
    CAT_CONTIGUOUS,
    COMPOSED,
    OPS,
    POINTWISE_CHANNELS_LAST,
    POINTWISE_CONTIGUOUS,
    SEPARATE_CHANNELS_LAST,
    SEPARATE_CONTIGUOUS,
)
from triton_conv.devices import INTERPRETER
from triton_conv.tuning.layers import Layer

CPU = torch.device("cpu")
FLOAT32 = {"dtype": torch.float32, "channels_last": True, "padding": 1}
LAYERS = {
    "plain": Layer((2, 5, 6, 7), (4, 5, 3, 3), {**FLOAT32, "stride": 2}),
    "grouped": Layer((2, 4, 6, 7), (4, 2, 3, 3), {**FLOAT32, "groups": 2, "channels_last": False}),
    "circular": Layer((2, 3, 6, 7), (4, 3, 3, 3), {**FLOAT32, "padding_mode": ("zeros", "circular")}),
    "reflect": Layer((2, 3, 6, 7), (4, 3, 3, 5), {**FLOAT32, "padding": (1, 2), "padding_mode": "reflect"}),
    "causal video": Layer(
        (1, 3, 4, 5, 6),
        (4, 3, 3, 3, 3),
        {**FLOAT32, "padding": ((2, 0), 1, 1), "padding_mode": ("replicate", "zeros", "zeros")},
    ),
    "transposed": Layer(
        (2, 4, 4, 5), (4, 3, 3, 3), {**FLOAT32, "transposed": True, "stride": 2, "output_padding": (1, 0)}
    ),
    "audio": Layer((2, 3, 9), (4, 3, 2), {**FLOAT32, "padding": ((4, 0),), "dilation": 4, "channels_last": False}),
    "strided audio": Layer((2, 3, 9), (4, 3, 3), {**FLOAT32, "stride": 2, "channels_last": False}),
    "patches": Layer((2, 3, 6, 8), (4, 3, 3, 2), {**FLOAT32, "padding": 0, "stride": (3, 2)}),
    "contiguous patches": Layer(
        (2, 3, 4, 6, 8), (4, 3, 2, 3, 2), {**FLOAT32, "padding": 0, "stride": (2, 3, 2), "channels_last": False}
    ),
    "causal": Layer((2, 6, 9), (6, 4), {"causal": True, "dtype": torch.float32, "channels_last": True}),
    "causal silu": Layer(
        (2, 6, 9), (6, 3), {"causal": True, "dtype": torch.float32, "channels_last": False, "activation": "silu"}
    ),
}
PYRAMID = (((4, 6, 1, 1), {}), ((3, 6, 3, 3), {"padding": 2, "dilation": 2}))
COMPOUND = {
    "relu and shortcut": Layer(
        (2, 5, 6, 7), (4, 5, 3, 3), {**FLOAT32, "bias": True, "activation": "relu", "residual": "before"}
    ),
    "silu, scale, residual after": Layer(
        (2, 5, 6, 7), (4, 5, 3, 3), {**FLOAT32, "activation": "silu", "scale": True, "residual": "after", "stride": 2}
    ),
    "branches": Layer((2, 6, 6, 7), (4, 6, 1, 1), {"dtype": torch.float32, "channels_last": True, "branches": PYRAMID}),
    "deform": Layer((2, 6, 6, 7), (4, 3, 3, 3), {**FLOAT32, "deform": True, "mask": True, "offset_groups": 2}),
    "chunk": Layer((1, 4, 2, 5, 6), (3, 4, 3, 3, 3), {**FLOAT32, "context": 2, "padding_mode": "reflect"}),
}
LAYERS |= COMPOUND
RIVALS = {
    "branches": {SEPARATE_CONTIGUOUS, SEPARATE_CHANNELS_LAST},
    "deform": {COMPOSED},
    "chunk": {CAT_CONTIGUOUS, CAT_CHANNELS_LAST},
    **{name: {POINTWISE_CONTIGUOUS, POINTWISE_CHANNELS_LAST} for name in list(COMPOUND)[:2]},
}
PADDED = ("circular", "reflect", "causal video", "audio")


class FakeProbe(FakeClock):
    """A clock whose time goes on with each question, and memory that work takes."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.moment, self.peaks = 0.0, 0

    def now(self):
        self.moment += 1e-3
        return self.moment

    def peak_bytes(self, work):
        work()
        self.peaks += 1
        return 100


def of(name, op="fprop"):
    return Job("suite", name, LAYERS[name], op)


def all_ops(name):
    kind = kinds.of(LAYERS[name])
    return [of(name, op) for op in (OPS if kind is None else kind.titles(LAYERS[name]))]


def meter(probe=None, who=None, l2_bytes=2**12):
    return DeviceMeter(CPU, INTERPRETER._replace(l2_bytes=l2_bytes), probe or FakeProbe(), who)
