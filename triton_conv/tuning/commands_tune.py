"""The command `triton-conv tune`: what is to be tuned, what would be done, and what came of it."""

from __future__ import annotations

import argparse
import os
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from statistics import geometric_mean
from typing import Any

import torch

from .. import execute, stored
from ..devices import DEVICES, H200, Device, known
from ..key import CONFIGS
from ..stored import Candidate, Entry
from . import asked, subject, suites
from .code import TARGETS
from .commands_configs import ship
from .measure import Bench, CudaBench, SimulatedBench
from .ranks import local_rank
from .store import Store, merged
from .sweep import sweep
from .tune import Budget, Result, Task
from .verify import made_up


def tune(arguments: argparse.Namespace) -> int:
    """Runs the command and returns its exit code. Raises ValueError for what cannot be done, before anything is."""
    speaks = int(os.environ.get("RANK", "0")) == 0
    if arguments.list_suites:
        return _list_suites() if speaks else 0
    asked.check(arguments)
    _check(arguments)
    device = _device(arguments)
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always", UserWarning)
        found = asked.tasks(arguments, device)
    for note in warned if speaks else ():
        print(f"triton-conv: {note.message}", file=sys.stderr)
    tasks = [task for task in found if arguments.role in (None, task.problem.role.value)]
    if not tasks:
        raise ValueError("there is nothing to tune")
    if arguments.dry_run:
        return _dry_run(tasks, device, arguments.candidates) if speaks else 0
    return _measured(arguments, tasks, device, speaks)


def _check(arguments: argparse.Namespace) -> None:
    if arguments.dtype is not None and arguments.dtype.is_complex:
        raise ValueError("argument --dtype: complex convolutions are made of real ones: tune these")
    if arguments.dry_run and arguments.simulate:
        raise ValueError("argument --simulate: does not go with --dry-run")
    if arguments.simulate and arguments.store is None:
        raise ValueError("argument --simulate: needs --store, a directory for times that nobody measured")
    own = stored.user_directory()
    if arguments.simulate and own is not None and arguments.store.resolve() == own.resolve():
        raise ValueError("argument --store: is your own, where look-ups would find times that nobody measured")
    if arguments.export is not None and (arguments.dry_run or arguments.simulate):
        raise ValueError("argument --export: only what was measured is exported")
    if arguments.arch is not None and arguments.device is not None:
        raise ValueError("argument --arch: does not go with --device")


def _device(arguments: argparse.Namespace) -> Device:
    """What is tuned for: with --dry-run and --simulate any, else this GPU."""
    there, name = torch.cuda.is_available(), arguments.device
    if arguments.dry_run or arguments.simulate:
        if arguments.arch is not None:
            return TARGETS[arguments.arch]
        if name in DEVICES or (name is None and not there):
            return DEVICES[name] if name else H200
    elif arguments.arch is not None or name not in (None, "cuda"):
        which = f"--arch {arguments.arch}" if arguments.arch is not None else f"--device {name}"
        raise ValueError(f"argument {which}: only the GPU that is there is measured; add --dry-run or --simulate")
    if not there:
        raise ValueError(
            "PyTorch sees no CUDA device to measure on: --dry-run shows what would be done, --simulate does it with "
            "made-up times"
        )
    found = execute.device_of(torch.device("cuda", local_rank()))
    assert found is not None
    return found


def _list_suites() -> int:
    from . import tables

    made = tables.table("suite", ">layers", ">batch", "about")
    for suite in suites.SUITES.values():
        tables.add(made, [suite.name, str(len(suite.layers)), str(suite.batch), suite.about])
    tables.show(made)
    return 0


# ---------------------------------------------------------------------------------------------------------------------
# What would be done


def _dry_run(tasks: Sequence[Task], device: Device, most: int | None) -> int:
    from . import tables

    made = tables.table("layer", "role", "ways", ">configs", "likely winner", ">us", ">default us", ">roofline us")
    configs, total, by_default = 0, 0.0, 0.0
    for task in tasks:
        role, kind = task.problem.role.value, subject.of(task.problem)
        try:
            with stored.hidden():
                ways = kind.every(task.problem)
        except (NotImplementedError, RuntimeError) as error:
            tables.add(made, [task.label, role, "", "0", str(error), "", "", ""])
            continue
        found, default = kind.plans(task.problem, ways), kind.choice(ways)
        best = min(found, key=lambda p: p.seconds)
        count = len(found) if most is None else min(len(found), max(most, len(ways)))
        times = [_us(seconds) for seconds in (best.seconds, default.seconds, default.roofline.seconds)]
        kernels = ", ".join(dict.fromkeys(p.kernel for p in ways))
        tables.add(made, [task.label, role, kernels, str(count), f"{best.kernel}: {str(best.config).strip()}", *times])
        configs, total, by_default = configs + count, total + best.seconds, by_default + default.seconds
    tables.show(made)
    print(
        f"{len(tasks)} problems on {device.name}, {configs} configs to compile and compare at most; predicted, not "
        f"measured: {_us(by_default)} us by default, {_us(total)} us at best"
    )
    return 0


def _us(seconds: float | None) -> str:
    return "" if seconds is None else f"{1e6 * seconds:.1f}"


# ---------------------------------------------------------------------------------------------------------------------
# What came of it


class _Anew(Store):
    """A store that only tells what was added to it in this process, so that everything else is measured again."""

    def __init__(self, directory: Path | None):
        super().__init__(directory)
        self._added: dict[tuple[Any, ...], Entry] = {}

    def add(self, device: str, kernel: str, *entries: Entry) -> None:
        super().add(device, kernel, *entries)
        for entry in entries:
            what = (device, kernel, entry.key, entry.extents)
            before = self._added.get(what)
            self._added[what] = merged(before, entry) if before else entry

    def entries(self, device: str, kernel: str) -> list[Entry]:
        return [entry for what, entry in self._added.items() if what[:2] == (device, kernel)]


def _measured(arguments: argparse.Namespace, tasks: Sequence[Task], device: Device, speaks: bool) -> int:
    def simulated(_: int) -> Bench:
        return SimulatedBench(device, noise=0.02)

    directory = arguments.store or stored.user_directory()
    store = _Anew(directory) if arguments.again else Store(directory)
    _check_store(Store(directory), device, arguments)
    make_bench: Callable[[int], Bench] = simulated if arguments.simulate else CudaBench
    budget, done = Budget(arguments.seconds, arguments.candidates), []
    code, ended = 0, ""
    with _progress(len(tasks), speaks) as advance:

        def heard(result: Result) -> None:
            done.append(result)
            advance(result)

        try:
            sweep(tasks, make_bench, store, budget, progress=heard, seconds=arguments.total_seconds)
        except KeyboardInterrupt:
            code, ended = 130, "interrupted"
        except torch.AcceleratorError as error:
            code, ended = 1, f"error: the GPU answers no more: {str(error).splitlines()[0]}"
    stored.forget()
    if arguments.export is None and directory is not None and store.all_unsaved:
        code = code or 1
        _rescue(store)
    if not speaks:
        return code
    _summary(done, device, "made-up times: " if arguments.simulate else "")
    where = directory if directory is not None else "memory only: there is no home directory"
    there = sum(result.seconds is not None for result in done)
    every = {task.problem for task in (*tasks, *(result.task for result in done))}
    print(f"{there} of {len(every)} problems measured, in {where}")
    for result in done:
        for fault in result.faults:
            if fault.startswith("wrong"):
                print(f"{result.task.label} ({result.task.problem.geometry}): {fault}", file=sys.stderr)
                code = code or 1
    if arguments.export is not None:
        ship(arguments.export, _winners(done, Store(directory)))
    if ended:
        print(f"triton-conv: {ended}; what was measured is kept, and not measured again", file=sys.stderr)
    return code


def _rescue(store: Store) -> None:
    """Says what the store could not take, and where it is instead: in a temporary directory, at worst on the screen."""
    unsaved = store.all_unsaved
    count = sum(map(len, unsaved.values()))
    lost = f"triton-conv: error: {store.directory} did not take {count} of the results"
    try:
        print(f"{lost}: they are in {store.rescue()}, and `triton-conv configs merge` takes them", file=sys.stderr)
    except OSError as error:
        print(f"{lost}, nor do temporary files ({error.strerror or error}): they follow", file=sys.stderr)
        for (device, kernel), entries in unsaved.items():
            print(stored.dumps(device, kernel, entries))


def _check_store(store: Store, device: Device, arguments: argparse.Namespace) -> None:
    """Raises ValueError where times would be lost, or simulated ones stand beside measured ones."""
    if arguments.export is None:
        try:
            store.try_writing()
        except OSError as error:
            raise ValueError(f"argument --store: {error}: give another, or --export") from error
    for kernel in CONFIGS:
        for entry in store.entries(device.name, kernel):
            if entry.source == "measured" and made_up(entry) != arguments.simulate:
                there = "simulated" if made_up(entry) else "measured"
                raise ValueError(f"argument --store: {store.directory} holds {there} times: give another")


@contextmanager
def _progress(total: int, speaks: bool) -> Iterator[Callable[[Result], None]]:
    """A bar with the time that is left, on a terminal."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    stderr = Console(stderr=True)
    columns: Iterable[Any] = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=stderr, transient=True, disable=not (speaks and stderr.is_terminal)) as bar:
        number = bar.add_task("tuning", total=total)
        yield lambda result: bar.update(number, advance=1, description=result.task.label)


def _summary(results: Sequence[Result], device: Device, prefix: str) -> None:
    from . import tables

    made = tables.table(
        *("layer", "role", "kernel", "config", ">us", ">spread", ">default us", ">gain", ">cuDNN us", ">gain over it"),
        *(">tried", ">wrong", "note"),
    )
    over_default, over_rivals = [], []
    for result in results:
        rival = min(result.rival.values(), default=None)
        gain, over = _ratio(result.default_seconds, result.seconds), _ratio(rival, result.seconds)
        over_default += [gain] if gain else []
        over_rivals += [over] if over else []
        times = [_us(result.seconds), "" if result.seconds is None else f"{result.spread:.1%}"]
        times += [_us(result.default_seconds), _times(gain), _us(rival), _times(over)]
        role, config = result.task.problem.role.value, str(result.config or "").strip()
        counts = [str(result.tried), str(result.wrong or ""), result.skipped]
        tables.add(made, [result.task.label, role, result.kernel, config, *times, *counts])
    tables.show(made)
    names = dict.fromkeys([device.name, *(result.task.problem.device.name for result in results)])
    words = [f"{prefix}{len(over_default)} problems on {', '.join(names)}"]
    if over_default:
        words.append(f"{geometric_mean(over_default):.2f} times as quick as by default")
    if over_rivals:
        slower = sum(gain < 1 for gain in over_rivals)
        words.append(f"{geometric_mean(over_rivals):.2f} times as quick as cuDNN at its best, slower on {slower}")
    print(", ".join(words) + (" (geometric means)" if over_default else ""))


def _ratio(other: float | None, seconds: float | None) -> float | None:
    return other / seconds if other and seconds else None


def _times(ratio: float | None) -> str:
    return "" if ratio is None else f"{ratio:.2f}"


def _entries(results: Iterable[Result], store: Store) -> Iterator[tuple[Device, str, Entry]]:
    """(device, kernel, entry) of every way to run what was tuned, each once."""
    seen = set()
    for result in results:
        kind = subject.of(result.task.problem)
        for p in kind.every(result.task.problem):
            what = (p.device.name, p.kernel, *kind.key_of(result.task.problem, p))
            if what not in seen:
                seen.add(what)
                for entry in store.entries(p.device.name, p.kernel):
                    if (entry.key, entry.extents) == what[2:] and stored.current(entry, p.kernel):
                        yield p.device, p.kernel, entry


def _winners(results: Sequence[Result], store: Store) -> dict[tuple[str, str], list[Entry]]:
    """By device and kernel; a known device has the name under which its configs ship."""
    found: dict[tuple[str, str], list[Entry]] = {}
    for device, kernel, entry in _entries(results, store):
        best: Candidate | None = entry.winner
        if best is not None and best.seconds is not None:
            kin = known(device.name, device.multiprocessors)
            name = kin.name if kin else device.name
            found.setdefault((name, kernel), []).append(replace(entry, candidates=(best,)))
    return found
