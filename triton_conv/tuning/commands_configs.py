"""The commands `triton-conv configs ...`: what is stored and what ships, and how one becomes the other."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from .. import files as room
from .. import stored
from ..devices import DEVICES
from ..stored import Candidate, Entry, MalformedError
from . import seed as seeding
from . import verify as verifying
from .store import Store
from .verify import Fault, described, made_up


class Filed(NamedTuple):
    """An entry and where it stands."""

    path: Path
    device: str
    kernel: str
    entry: Entry


def show(arguments: argparse.Namespace) -> int:
    """A table of what is stored and what ships."""
    from . import tables

    places = [(stored.user_directory(), "user store"), (stored.shipped_directory(), "shipped")]
    made = tables.table("place", "device", "kernel", "problem", "winner", ">us", "source", ">tried", "state")
    count, faults = 0, []
    for directory, place in places:
        for found in _filed(files(directory) if directory and directory.is_dir() else []):
            if isinstance(found, Fault):
                faults.append(found)
            elif _asked_for(found, arguments):
                count += 1
                tables.add(made, [place, *_cells(found)])
    if count:
        tables.show(made)
    for directory, place in places:
        print(f"{place}: {directory or 'none, without a home directory'}")
    print(f"{count} {'entry' if count == 1 else 'entries'}")
    return _told(faults)


def _cells(found: Filed) -> list[str]:
    entry = found.entry
    best = entry.winner
    state = "" if stored.current(entry, found.kernel) else "stale: of another version of the kernel"
    words = [str(best.config).strip(), _microseconds(best)] if best else ["none", ""]
    return [found.device, found.kernel, described(entry), *words, entry.source, str(len(entry.candidates)), state]


def merge(arguments: argparse.Namespace) -> int:
    """Files, or all of directories, into the user's store."""
    directory = stored.user_directory()
    if directory is None:
        raise ValueError("there is no home directory: set TRITON_CONV_CACHE")
    store, faults, count = Store(directory), [], 0
    together: dict[tuple[str, str], list[Entry]] = {}
    for found in _filed(path for given in arguments.paths for path in files(given)):
        if isinstance(found, Fault):
            faults.append(found)
        elif made_up(found.entry):
            faults += {Fault(found.path, "", "its times are simulated")}.difference(faults)
        else:
            together.setdefault((found.device, found.kernel), []).append(found.entry)
    for (device, kernel), entries in together.items():
        store.add(device, kernel, *entries)
        path = stored.path_of(directory, device, kernel)
        if store.unsaved(device, kernel):
            faults.append(Fault(path, "", "could not be written"))
        else:
            count += len(entries)
    stored.forget()
    print(f"{count} {'entry' if count == 1 else 'entries'} merged into {directory}")
    return _told(faults)


def verify(arguments: argparse.Namespace) -> int:
    """Files that ship, or are to."""
    directory = arguments.directory or stored.shipped_directory()
    found, faults = [], []
    for one in verifying.verified(directory):
        if isinstance(one, Fault):
            faults.append(one)
        else:
            found.append(one)
    print(f"{len(found)} entries that fit in {directory}")
    for arch in arguments.arch or [90] if arguments.compile else ():
        from rich.console import Console
        from rich.progress import Progress

        different, stderr = verifying.distinct(found, arch), Console(stderr=True)
        results = verifying.compiled(different, arch, arguments.jobs)
        with closing(results), Progress(console=stderr, transient=True, disable=not stderr.is_terminal) as progress:
            done = dict(progress.track(results, len(different), description=f"sm_{arch}"))
        of_arch = [fault for number in sorted(done) for fault in done[number]]
        print(f"sm_{arch}: {len(different)} configs compiled, {len(of_arch) or 'no'} faults")
        faults += of_arch
    return _told(faults)


def diff(arguments: argparse.Namespace) -> int:
    """What two files or directories say otherwise; 1 where they do."""
    sides, faults = [], []
    for given in (arguments.a, arguments.b):
        side: dict[tuple, Filed] = {}
        for found in _filed(files(given)):
            if isinstance(found, Fault):
                faults.append(found)
            else:
                side[found.device, found.kernel, found.entry.key, found.entry.extents] = found
        sides.append(side)
    if faults:
        return _told(faults)
    a, b = sides
    same = 0
    for what in sorted(a.keys() | b.keys()):
        one, other = a.get(what), b.get(what)
        line = _difference(one, other)
        same += not line
        if line:
            filed = one or other
            assert filed is not None
            print(f"{room.printable(filed.device)} {filed.kernel} {described(filed.entry)}\n  {line}")
    print(f"{len(a.keys() | b.keys()) - same} differ, {same} are the same")
    return 0 if same == len(a.keys() | b.keys()) else 1


def _difference(one: Filed | None, other: Filed | None) -> str:
    if one is None or other is None:
        return f"only in the {'second' if one is None else 'first'}"
    before, after = one.entry, other.entry
    words = [f"{b} -> {a}" for b, a in ((_winner(before), _winner(after)), (before.source, after.source)) if b != a]
    if before.stamp.get("kernel") != after.stamp.get("kernel"):
        words.append("of another version of the kernel")
    return "; ".join(words)


def _winner(entry: Entry) -> str:
    best = entry.winner
    if best is None:
        return "none"
    time = _microseconds(best)
    return f"{str(best.config).strip()} ({time} us)" if time else str(best.config).strip()


def export(arguments: argparse.Namespace) -> int:
    """The winners that the user has measured, as they ship."""
    directory = stored.user_directory()
    faults, together = [], {}  # type: tuple[list[Fault], dict[tuple[str, str], list[Entry]]]
    for found in _filed(files(directory) if directory and directory.is_dir() else []):
        if isinstance(found, Fault):
            faults.append(found)
        elif made_up(found.entry):
            faults += {Fault(found.path, "", "its times are simulated")}.difference(faults)
        elif _asked_for(found, arguments) and stored.current(found.entry, found.kernel):
            best = found.entry.winner
            if best is not None and best.seconds is not None:
                device = DEVICES[arguments.rename].name if arguments.rename else found.device
                together.setdefault((device, found.kernel), []).append(replace(found.entry, candidates=(best,)))
    ship(arguments.directory, together)
    return _told(faults)


def ship(directory: Path, together: Mapping[tuple[str, str], Sequence[Entry]]) -> None:
    """Writes measured entries, by device and kernel, into the files of a directory, and says so."""
    for (device, kernel), entries in together.items():
        path = stored.path_of(directory, device, kernel)
        measured = {(entry.key, entry.extents) for entry in entries}
        kept = [e for e in stored.read(path, kernel, [device]) if (e.key, e.extents) not in measured]
        path.parent.mkdir(parents=True, exist_ok=True)
        room.write_whole(path, stored.dumps(device, kernel, [*kept, *entries]), 0o644)
        print(f"{path}: {len(entries)} measured, {len(kept)} as they were")
    if not together:
        print("nothing was measured")


def seed(arguments: argparse.Namespace) -> int:
    """Files for known devices, as rules and the cost model choose."""
    for name in arguments.device or DEVICES:
        for path in seeding.seed(arguments.directory, DEVICES[name], seeding.common(DEVICES[name])):
            print(path)
    return 0


def files(given: Path) -> list[Path]:
    """A file, or those of a directory. Raises ValueError if there is neither."""
    if not given.exists():
        raise ValueError(f"{given}: there is no such file or directory")
    return sorted(given.rglob("*.json")) if given.is_dir() else [given]


def _filed(paths: Iterable[Path]) -> Iterator[Filed | Fault]:
    for path in paths:
        try:
            device, kernel, entries = stored.load(path)
        except (MalformedError, FileNotFoundError) as error:
            yield Fault(path, "", str(error).removeprefix(f"{path}: "))
        else:
            yield from (Filed(path, device, kernel, entry) for entry in entries)


def _asked_for(found: Filed, arguments: argparse.Namespace) -> bool:
    wanted = arguments.device and (DEVICES[arguments.device].name if arguments.device in DEVICES else arguments.device)
    device = not wanted or wanted.casefold() in found.device.casefold()
    return device and arguments.kernel in (None, found.kernel)


def _microseconds(candidate: Candidate) -> str:
    return "" if candidate.seconds is None else f"{1e6 * candidate.seconds:.2f}"


def _told(faults: Sequence[Fault]) -> int:
    for fault in faults:
        print(ascii(str(fault))[1:-1], file=sys.stderr)
    return 1 if faults else 0


COMMANDS = {
    "show": show,
    "merge": merge,
    "verify": verify,
    "diff": diff,
    "export": export,
    "seed": seed,
}
