"""Whether configs may ship: as strict as look-ups are lenient, which ignore what they cannot use."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator
from contextlib import closing
from dataclasses import replace
from math import isfinite
from pathlib import Path
from typing import NamedTuple

from .. import branches_plan, branches_ways, deform_plan, plan, stored, ways
from ..branches_plan import BranchesPlan
from ..config import Config
from ..deform_plan import DeformPlan
from ..devices import DEVICES, Device
from ..files import printable
from ..geometry import ConvGeometry, Role, Strides
from ..key import CONFIGS
from ..plan import Plan
from ..stored import Entry, MalformedError
from ..ways import Layout, Problem
from . import branches, deform
from .audit import Subject, audit, faults
from .code import TARGETS
from .measure import SIMULATED

AnyPlan = Plan | DeformPlan | BranchesPlan


class Fault(NamedTuple):
    """What is wrong with a file, or with one of its entries."""

    path: Path
    entry: str
    why: str

    def __str__(self) -> str:
        return f"{self.path}: {self.entry}: {self.why}" if self.entry else f"{self.path}: {self.why}"


def made_up(entry: Entry) -> bool:
    """Whether its times are those of a simulation."""
    return entry.stamp.get("driver") == SIMULATED


def described(entry: Entry) -> str:
    """An entry in a line: "fprop bfloat16 N32 C64 K64 56x56, filter 3x3"."""
    key, extents = entry.key, entry.extents
    words = [f"{key.role} {key.dtype}"]
    words += [f"to {key.out_dtype}"] if key.out_dtype != key.dtype else []
    words += [key.precision] if key.precision != "ieee" else []
    words.append(f"N{extents.N} C{key.C} K{key.K}" + (f" g{key.groups}" if key.groups > 1 else ""))
    words.append(f"{_by(extents.input)} to {_by(extents.output)},")
    words.append(f"filter {_by(key.filter)}")
    words += [f"{name} {_by(getattr(key, name))}" for name in ("stride", "dilation") if max(getattr(key, name)) > 1]
    words += [] if key.zero_padding else ["padding of other than zeros"]
    return printable(" ".join([*words, "channels-last" if key.channels_last else "contiguous"]))


def _by(values: tuple[int, int, int]) -> str:
    return "x".join(map(str, values))


def problem_of(entry: Entry, device: Device) -> Problem:
    """A problem that is filed under the entry: dense, aligned, with padding as its extents want it.

    Raises ValueError for numbers that no convolution has.
    """
    key, (N, inputs, outputs) = entry.key, entry.extents
    numbers = (N, *inputs, *outputs, key.groups, key.C, key.K, *key.filter, *key.stride, *key.dilation)
    if min(numbers) < 1 or key.C % key.groups or key.K % key.groups:
        raise ValueError("no convolution has such numbers")
    padding = []
    for i, o, taps, step, apart in zip(inputs, outputs, key.filter, key.stride, key.dilation, strict=True):
        missing = max((o - 1) * step + apart * (taps - 1) + 1 - i, 0)
        padding.append((missing // 2, missing - missing // 2))
    modes = tuple("zeros" if key.zero_padding or not any(p) else "replicate" for p in padding)
    how = (key.filter, outputs, key.stride, tuple(padding), key.dilation, modes)
    g, role = ConvGeometry(N, key.C, key.K, key.groups, inputs, *how), Role(key.role)
    strides = Strides(*(ways.dense_strides(g.shape(name), key.channels_last) for name in ("x", "w", "y")))
    has_scale = key.dtype == "float8_e4m3fn"
    what = (key.dtype, key.out_dtype, strides, key.precision, role is not Role.WGRAD, has_scale, True, device)
    return Problem(role, g, *what)


def plan_of(entry: Entry, kernel: str, device: Device) -> Plan:
    """The plan that goes by the entry's winner. Raises ValueError, in words, where there is none that can run."""
    if entry.winner is None:
        raise ValueError("has no config that is right")
    config = entry.winner.config
    problem = problem_of(entry, device)
    if problem.dtype not in plan.ACCUMULATORS or problem.out_dtype not in plan.ACCUMULATORS:
        raise ValueError(f"there are no kernels for {problem.dtype} to {problem.out_dtype}")
    try:
        p = plan.every(problem, config)[0]
    except RuntimeError as error:
        raise ValueError(str(error)) from error
    layout = Layout(p.packs, p.channels_last, p.bundle, p.geometry, p.strides, p.steps)
    misfit = ways.misfit(problem, kernel, layout, config)
    if misfit or p.kernel != kernel:
        raise ValueError(misfit or f"{p.kernel} would run it")
    if not p.prediction.resident or not isfinite(p.seconds):
        raise ValueError(f"{config} does not fit into a multiprocessor of {device.name}")
    return p


def deformable(entry: Entry, kernel: str, device: Device) -> DeformPlan:
    """`plan_of` for kernels of deformable convolutions."""
    problem, config = deform.problem_of(entry, device), entry.winner.config if entry.winner else None
    if not isinstance(config, Config):
        raise ValueError("has no config that is right")
    (given, *_) = deform_plan.every(problem)
    if given.kernel != kernel or deform_plan.key_of(given.problem) != (entry.key, entry.extents):
        raise ValueError(f"{given.kernel} would run it, filed elsewhere")
    misfit = deform_plan.misfit(problem, config)
    if misfit:
        raise ValueError(misfit)
    return deform_plan.with_config(problem, given, config)


def of_branches(entry: Entry, kernel: str, device: Device) -> BranchesPlan:
    """`plan_of` for kernels of several convolutions."""
    if entry.winner is None:
        raise ValueError("has no config that is right")
    problem = branches.problem_of(entry, device)
    p = branches_plan.of_kernel(problem, kernel, entry.winner.config)
    if branches_ways.key_of(problem) != (entry.key, entry.extents):
        raise ValueError("it is filed elsewhere")
    if not p.prediction.resident or not isfinite(p.seconds):
        raise ValueError(f"{p.config} does not fit into a multiprocessor of {device.name}")
    return p


def _reader(kernel: str) -> Callable[[Entry, str, Device], AnyPlan]:
    if kernel.endswith("_branches"):
        return of_branches
    return deformable if kernel.startswith("deform") else plan_of


def verified(directory: Path) -> Iterator[Fault | tuple[Path, Entry, AnyPlan]]:
    """Each entry with the plan that goes by it, and each fault.

    Files are those of known devices and kernels; entries are of kernels as they are now, and their winners fit.
    """
    devices = {stored.path_of(directory, device.name, "").parent: device for device in DEVICES.values()}
    found = sorted(directory.iterdir()) if directory.is_dir() else []
    paths = [path for part in found for path in (sorted(part.iterdir()) if part in devices else [part])]
    if not paths:
        yield Fault(directory, "", "holds no files")
    for path in paths:
        device = devices.get(path.parent)
        if device is None or path.suffix != ".json" or path.stem not in CONFIGS:
            if path.suffix != ".lock":
                yield Fault(path, "", "is of no known device and kernel")
            continue
        try:
            entries = stored.read(path, path.stem, [device.name])
        except MalformedError as error:
            yield Fault(path, "", str(error).removeprefix(f"{path}: "))
            continue
        seen = set()
        for entry in entries:
            if (entry.key, entry.extents) in seen:
                yield Fault(path, described(entry), "is there twice")
            seen.add((entry.key, entry.extents))
            if not stored.current(entry, path.stem):
                yield Fault(path, described(entry), "was made for another version of the kernel")
                continue
            if made_up(entry):
                yield Fault(path, described(entry), "its times are simulated")
                continue
            try:
                yield path, entry, _reader(path.stem)(entry, path.stem, device)
            except (ValueError, ArithmeticError) as error:
                yield Fault(path, described(entry), str(error))


def compiled(
    found: list[tuple[Path, Entry, AnyPlan]], arch: int, jobs: int | None = None
) -> Generator[tuple[int, list[Fault]], None, None]:
    """(number, faults) of each of the `distinct` plans as compiled for an architecture, in the order they are done."""
    with closing(audit([Subject(described(entry), p) for _, entry, p in found], arch, jobs)) as audited:
        for number, rows in audited:
            path, entry, _ = found[number]
            yield number, [Fault(path, described(entry), why) for row in rows for why in faults(row)]


def distinct(found: list[tuple[Path, Entry, AnyPlan]], arch: int) -> list[tuple[Path, Entry, AnyPlan]]:
    """Of those for devices of an architecture, one for each code that they may become."""
    different: dict[tuple, tuple[Path, Entry, AnyPlan]] = {}
    for path, entry, p in found:
        if p.device.capability == TARGETS[arch].capability:
            config = replace(p.config, splits=min(p.config.splits, 2))
            different.setdefault((p.kernel, config, entry.key._replace(pixels=0)), (path, entry, p))
    return list(different.values())
