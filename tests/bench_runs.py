"""Small runs for the tests of reports."""

from bench.records import CHANNELS_LAST, CONTIGUOUS, OURS, Measurement, Row, Run


def measured(seconds, spread=0.005, rounds=30, **others):
    return Measurement(seconds, spread, rounds, **{"host_seconds": 1e-5, "peak_bytes": 2**20, "error": 0.2, **others})


def row(layer="3x3", ours=None, cudnn=None, contiguous=None, **others):
    """A row of a layer, with times in microseconds; of those that are given."""
    times = {OURS: ours, CHANNELS_LAST: cudnn, CONTIGUOUS: contiguous}
    values = {
        "suite": "resnet50",
        "op": "fprop",
        "call": f"conv2d 128x256x14x14 256x256x3x3 padding {len(layer)}",
        "dtype": "bfloat16",
        "channels_last": True,
        "times": 1,
        "flops": 30 * 10**9,
        "bytes": 20 * 10**6,
        "roofline_seconds": 30e-6,
        "limit": "matrix rate",
        "predicted_seconds": 60e-6,
        "kernel": "box",
        "config": "box 1x1x1x128 x 128 x 64 warps 4 stages 4",
        "workspace_bytes": 0,
        "reason": "boxes of the bulk tensor copy engine; tiles by rule",
        "measured": {who: measured(1e-6 * time) for who, time in times.items() if time is not None},
    }
    return Row(layer=layer, **{**values, **others})


def run(*rows, source="measured", **others):
    values = {
        "device": "NVIDIA H200",
        "time": "2026-11-21T20:15:00+00:00",
        "commit": "0123456789ab",
        "command": "triton-conv bench --quick",
        "versions": {"torch": "2.11.0", "triton": "3.6.0", "cudnn": "91900"},
        "ceilings": {"copy": 4e12, "matmul bfloat16": 8e14} if source == "measured" else {},
    }
    return Run(source=source, rows=rows, **{**values, **others})
