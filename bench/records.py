"""What benchmarks found, as numbers and words that need nothing else to be read: rows, runs, and their JSON.

A file is read strictly: an unknown or missing name, or a value of another kind, raises ValueError with its place.
"""

from __future__ import annotations

import dataclasses
import json
import os
import tempfile
import types
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Union, get_args, get_origin, get_type_hints

from .files import read_json, shown

FORMAT = 1
MOST_BYTES = 64 * 2**20  # of a file: a run of all suites, with everybody measured, has a twentieth of it

OPS = ("fprop", "dgrad", "wgrad", "step")  # a step is the forward convolution and all gradients
SOURCES = ("measured", "simulated", "predicted")

POSITIVE = ("times", "predicted_seconds", ".seconds")  # names of numbers that are never 0

# Who computed: us, and those that we are compared with. With a border that cuDNN has not, it is padded first.
OURS = "triton_conv"
CONTIGUOUS, CHANNELS_LAST = "cudnn contiguous", "cudnn channels_last"
PADDED_CONTIGUOUS, PADDED_CHANNELS_LAST = "pad + cudnn contiguous", "pad + cudnn channels_last"
# What our one kernel does beside the convolution, others do before or after it: kernels that add and activate, filters
# one after the other, frames put together.
POINTWISE_CONTIGUOUS, POINTWISE_CHANNELS_LAST = "cudnn + pointwise contiguous", "cudnn + pointwise channels_last"
SEPARATE_CONTIGUOUS, SEPARATE_CHANNELS_LAST = "cudnn one by one contiguous", "cudnn one by one channels_last"
CAT_CONTIGUOUS, CAT_CHANNELS_LAST = "cat + cudnn contiguous", "cat + cudnn channels_last"
CUDNN_FUSED = "cudnn fused"  # with a relu, by the calls that PyTorch has for inference
TORCHVISION, COMPOSED = "torchvision", "gather + matmul"
COMPILED, LINEAR, FLAG_GEMS = "torch.compile", "F.linear", "flag_gems"
OTHERS = (
    *(CONTIGUOUS, CHANNELS_LAST, PADDED_CONTIGUOUS, PADDED_CHANNELS_LAST),
    *(POINTWISE_CONTIGUOUS, POINTWISE_CHANNELS_LAST, SEPARATE_CONTIGUOUS, SEPARATE_CHANNELS_LAST),
    *(CAT_CONTIGUOUS, CAT_CHANNELS_LAST, CUDNN_FUSED, TORCHVISION, COMPOSED),
    *(COMPILED, LINEAR, FLAG_GEMS),
)


@dataclass(frozen=True)
class Measurement:
    """What one way to compute a row took. Times are in seconds, None where there is none; `note` says why.

    `seconds` is the median of `rounds` on the device, `spread` half the distance of the quartiles, relative.
    `host_seconds` is what a call takes the host, `peak_bytes` the memory above inputs and outputs. `error` is the worst
    error as a share of its tolerance.
    """

    seconds: float | None = None
    spread: float | None = None
    rounds: int = 0
    host_seconds: float | None = None
    peak_bytes: int | None = None
    error: float | None = None
    note: str = ""


@dataclass(frozen=True)
class Row:
    """An operation of a layer: what it is, what we plan for it, and what it took whom, by name.

    `flops` and `bytes` are the least that it needs, `roofline_seconds` their time by the data sheet and `limit` what
    that is spent on. `kernel` to `reason` are of our plan; a step's are those of its plans, joined by commas. Where one
    kernel stands for several, `separate_predicted_seconds` is what these would take by the same models.
    """

    suite: str
    layer: str
    op: str
    call: str  # in words: conv2d 128x64x56x56 64x64x3x3 padding 1
    dtype: str
    channels_last: bool
    times: int  # that the layer stands in its network
    flops: int
    bytes: int
    roofline_seconds: float
    limit: str
    predicted_seconds: float | None
    kernel: str
    config: str
    workspace_bytes: int
    reason: str
    measured: Mapping[str, Measurement] = field(default_factory=dict)
    separate_predicted_seconds: float | None = None

    @property
    def name(self) -> tuple[str, ...]:
        """What the same row of another run is found by."""
        return self.suite, self.layer, self.op, self.call, self.dtype, str(self.channels_last)

    def seconds(self, who: str) -> float | None:
        """The time of one of `measured`, None where it has none."""
        return self.measured[who].seconds if who in self.measured else None


@dataclass(frozen=True)
class Run:
    """Rows of one device, and what they were made with.

    `source` is one of `SOURCES`. `ceilings` are what ideal loops reached on the device: "copy" in bytes a second, reads
    and writes together, "matmul bfloat16" and so on in flops a second. `versions` has names such as torch, triton,
    cudnn, driver, python.
    """

    device: str
    source: str
    time: str  # ISO 8601, UTC
    commit: str
    command: str
    versions: Mapping[str, str] = field(default_factory=dict)
    ceilings: Mapping[str, float] = field(default_factory=dict)
    rows: tuple[Row, ...] = ()


def write(run: Run, path: Path) -> None:
    """Writes a run as JSON, whole or not at all."""
    replace_text(path, json.dumps({"format": FORMAT, **dataclasses.asdict(run)}, indent=1, allow_nan=False) + "\n")


def replace_text(path: Path, text: str | bytes) -> None:
    """Writes a file whole or not at all, making its directory."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(text if isinstance(text, bytes) else text.encode())
        os.chmod(name, 0o644)
        os.replace(name, path)
    except BaseException:
        os.unlink(name)
        raise


def read(path: Path) -> Run:
    """The run in a file. Raises OSError, and ValueError naming file and place for what is no run."""
    found = read_json(path, MOST_BYTES)
    if not isinstance(found, dict) or found.pop("format", None) != FORMAT:
        raise ValueError(f"{path}: is no benchmark run of format {FORMAT}")
    run = typed(Run, found, str(path))
    known: set[tuple[str, ...]] = set()
    for number, row in enumerate(run.rows):
        if row.op not in OPS:
            raise ValueError(f"{path}: rows[{number}].op: {shown(row.op)} is not one of {', '.join(OPS)}")
        for where, value in _numbers(row):
            if not 0 <= value < 2**63 or (value == 0 and where.endswith(POSITIVE)):
                raise ValueError(f"{path}: rows[{number}].{where}: is out of range")
        if row.name in known:
            raise ValueError(f"{path}: rows[{number}]: the same row stands there twice")
        known.add(row.name)
    if run.source not in SOURCES:
        raise ValueError(f"{path}: source: {shown(run.source)} is not one of {', '.join(SOURCES)}")
    return run


def _numbers(of: Row | Measurement, where: str = "") -> Iterator[tuple[str, float]]:
    """All numbers of a row with their places."""
    for name, value in vars(of).items():
        if isinstance(value, Mapping):
            for who, measured in value.items():
                yield from _numbers(measured, f"{name}.{who}.")
        elif isinstance(value, (int, float)):
            yield f"{where}{name}", value


def typed(kind: Any, value: Any, where: str) -> Any:
    """A JSON value as a dataclass or a plain type, all names there and none besides.

    >>> typed(Measurement, {"seconds": 1.0}, "here").seconds
    1.0
    """
    origin, inner = get_origin(kind), get_args(kind)
    if origin in (Union, types.UnionType):
        return None if value is None else typed(inner[0], value, where)
    if origin is tuple:
        if not isinstance(value, list):
            raise ValueError(f"{where}: is to be a list")
        return tuple(typed(inner[0], v, f"{where}[{n}]") for n, v in enumerate(value))
    if dataclasses.is_dataclass(kind):
        return _object(kind, value, where)
    if origin is not None:  # a mapping from names
        if not isinstance(value, dict):
            raise ValueError(f"{where}: is to be an object")
        return {name: typed(inner[1], v, f"{where}.{shown(name)[1:-1]}") for name, v in value.items()}
    if kind is float and isinstance(value, (int, float)) and not isinstance(value, bool):
        if not abs(value) < 1e300:  # nor an integer that no float can hold
            raise ValueError(f"{where}: is not finite")
        return float(value)
    if type(value) is not kind:
        raise ValueError(f"{where}: is to be {kind.__name__}, but is {shown(value)}")
    return value


def _object(kind: Any, value: Any, where: str) -> Any:
    if not isinstance(value, dict):
        raise ValueError(f"{where}: is to be an object")
    hints, fields = get_type_hints(kind), {f.name: f for f in dataclasses.fields(kind)}
    unknown = sorted(set(value) - set(fields))
    required = [f.name for f in fields.values() if f.default is f.default_factory is dataclasses.MISSING]
    missing = [name for name in required if name not in value]
    if unknown or missing:
        raise ValueError(f"{where}: {'unknown' if unknown else 'missing'} name {shown((unknown or missing)[0])}")
    return kind(**{name: typed(hints[name], v, f"{where}.{name}") for name, v in value.items()})
