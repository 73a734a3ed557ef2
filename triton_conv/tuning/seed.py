"""Configs for what nobody has measured yet, as they ship: what rules and the cost model choose for common layers."""

from __future__ import annotations

from collections.abc import Iterable
from importlib.metadata import version
from pathlib import Path

from .. import explain, files, plan, stored, ways
from .. import key as keys
from ..devices import Device
from ..stored import Candidate, Entry
from ..ways import Problem
from . import suites
from .layers import LAYERS

# With configs for all of them, files would take several megabytes; the cost model chooses those of the others as well.
SEEDED_SUITES = ("resnet50",)
# Options of layers that do not ship: of other kinds of convolution, or ordinary ones with an epilogue that are there.
_OTHERS = {"causal", "pointwise", "branches", "deform", "context", "activation", "residual", "scale"}


def common(device: Device) -> list[tuple[str, Problem]]:
    """(label, problem) of layers that a device has arithmetic for, and of their gradients.

    They are those of the audit and of `SEEDED_SUITES`.
    """
    audited = [
        (f"{name}, {title}", problem)
        for name, layer in LAYERS.items()
        if device.capability >= layer.since and not _OTHERS & layer.options.keys()
        for title, problem in explain.problems(layer.input, layer.weight, device=device, **layer.options).items()
    ]
    return audited + [(task.label, task.problem) for name in SEEDED_SUITES for task in suites.tasks(name, device)]


def filed(p: plan.Plan) -> tuple[keys.Key, keys.Extents]:
    """Under what the config of a plan's main kernel is filed.

    >>> p = plan.make(explain.problems((8, 64, 56, 56), (128, 64, 3, 3), padding=1)["forward"])
    >>> filed(p)[0].pixels
    16384
    """
    channels_last = ways.reads_channels_last(p.role, p.strides)
    return keys.of(p.geometry, p.role, p.dtype, p.out_dtype, p.numerics.precision, channels_last)


def entries(problems: Iterable[tuple[str, Problem]], triton: str) -> dict[str, list[Entry]]:
    """By kernel, an entry for the plan of each problem, whatever is stored or ships; `triton` audited the configs."""
    found: dict[str, dict[tuple[keys.Key, keys.Extents], Entry]] = {}
    with stored.hidden():
        for _, problem in problems:
            p = plan.make(problem)
            stamp = {"kernel": keys.source_hash(p.kernel), "triton": triton}
            key, extents = filed(p)
            entry = Entry(key, extents, "model", stamp, (Candidate(p.config),), {})
            found.setdefault(p.kernel, {}).setdefault((key, extents), entry)
    return {kernel: list(of_kernel.values()) for kernel, of_kernel in found.items()}


def seed(directory: Path, device: Device, problems: Iterable[tuple[str, Problem]], triton: str = "") -> list[Path]:
    """Writes the files of a device and returns them; entries that were measured on kernels as they are now stay.

    Run twice, it writes the same. `triton` is the version that audited the configs, by default the installed one.
    Raises `stored.MalformedError` where a file is there that cannot be read.
    """
    new, written = entries(problems, triton or version("triton")), []
    for kernel in keys.CONFIGS:
        path = stored.path_of(directory, device.name, kernel)
        kept = [
            entry
            for entry in stored.read(path, kernel, [device.name])
            if entry.source == "measured" and stored.current(entry, kernel)
        ]
        measured = {(entry.key, entry.extents) for entry in kept}
        every = kept + [entry for entry in new.get(kernel, ()) if (entry.key, entry.extents) not in measured]
        if every:
            path.parent.mkdir(parents=True, exist_ok=True)
            files.write_whole(path, stored.dumps(device.name, kernel, every), 0o644)
            written.append(path)
        else:
            path.unlink(missing_ok=True)
    return written
