"""The look-up of tuned configs: what this process installed, the user's store, then what ships with the package.

A directory holds a file for each device and kernel, `NVIDIA_H200/box.json`, whose text is that of `entry`. A file that
cannot be read is worth a warning that names it, and nothing else: then the next place is asked.
"""

from __future__ import annotations

import math
import os
import re
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from itertools import count
from pathlib import Path
from typing import NamedTuple

from . import files
from . import key as keys
from .config import KernelConfig
from .devices import Device, known
from .entry import TIE as TIE
from .entry import Candidate as Candidate
from .entry import Entry as Entry
from .entry import MalformedError as MalformedError
from .entry import NewerError as NewerError
from .entry import dumps as dumps
from .entry import loads, shown
from .entry import winner_of as winner_of
from .forks import Lock
from .key import Extents, Key

MOST_BYTES = 32 * 2**20  # of a file: some thousands of problems, each with all that was tried


class UnreadableError(MalformedError):
    """A file cannot be read at all, for a reason that others of its directory share, more often than not."""

    def __init__(self, path: Path, reason: str):
        super().__init__(f"{path}: {reason}")
        self.reason = reason


class Found(NamedTuple):
    """The answer to a look-up: `where` says in words whose it is, `exact` whether it is of these very extents.

    `seconds` and `rival`, the quickest of others' kernels, are of a measured one of these extents, else None;
    `rival_name` is what the entry calls that one.
    """

    config: KernelConfig
    where: str
    exact: bool
    seconds: float | None
    rival: float | None
    rival_name: str = ""


def user_directory() -> Path | None:
    """Where the user's configs are: $TRITON_CONV_CACHE, or triton_conv in the user's cache; None without a home."""
    given = os.environ.get("TRITON_CONV_CACHE")
    if given:
        return Path(given)
    cache = os.environ.get("XDG_CACHE_HOME", "")
    try:
        return (Path(cache) if os.path.isabs(cache) else Path.home() / ".cache") / "triton_conv"
    except RuntimeError:
        return None


def shipped_directory() -> Path:
    """Where the configs of this version are: in the installed package, or beside it in a checkout."""
    package = Path(__file__).parent
    inside = package / "autotune_configs"
    return inside if inside.is_dir() else package.parent / "autotune_configs"


def path_of(directory: Path, device: str, kernel: str) -> Path:
    """The file of a device and kernel.

    >>> path_of(Path("configs"), "NVIDIA GeForce RTX 4090", "box").as_posix()
    'configs/NVIDIA_GeForce_RTX_4090/box.json'
    """
    return directory / (re.sub(r"[^A-Za-z0-9.-]+", "_", device).lstrip(".") or "_") / f"{kernel}.json"


def load(path: Path) -> tuple[str, str, list[Entry]]:
    """(device, kernel, entries) of a file. Raises MalformedError, and FileNotFoundError if there is none."""
    try:
        content = files.read_bytes(path, MOST_BYTES)
    except FileNotFoundError:
        raise
    except NotADirectoryError as error:
        raise FileNotFoundError(*error.args) from error
    except OSError as error:
        raise UnreadableError(path, error.strerror or str(error)) from error
    return loads(content, str(path))


def read(path: Path, kernel: str, names: Iterable[str]) -> list[Entry]:
    """The entries of a file, if there is one, for a kernel and a device of these names. Raises MalformedError."""
    try:
        device, of_kernel, entries = load(path)
    except FileNotFoundError:
        return []
    if of_kernel != kernel or device not in names:
        those = " or ".join(map(repr, names))
        raise MalformedError(f"{path}: is for {of_kernel} on {shown(device)}, not {kernel} on {those}")
    return entries


class _Chosen(NamedTuple):
    config: KernelConfig
    source: str
    seconds: float | None
    rival: float | None
    rival_name: str


PLACES = ("installed", "user store", "shipped")  # in the order in which they are asked

_Index = dict[Key, dict[Extents, _Chosen]]
_indices: dict[tuple[str, str, str], _Index] = {}  # of the user's files or the shipped ones, by device and kernel
_installed: dict[tuple[str, str], dict[tuple[Key, Extents], Entry]] = {}  # by device and kernel
_installing = Lock()
_held: dict[tuple[Path | None, str, str], tuple[Entry, ...]] = {}  # by directory, device and kernel
_told: set[tuple[Path | None, str]] = set()  # why files of a directory cannot be read: said of one of them
_hidden: ContextVar[frozenset[str]] = ContextVar("hidden", default=frozenset())
_generations = count()
_generation = next(_generations)


def generation() -> tuple[int, frozenset[str]]:
    """Another value whenever answers may be others: part of what plans are cached under."""
    return _generation, _hidden.get()


def forget() -> None:
    """Reads files again when they are next needed, and lets plans be made anew."""
    renew()
    _indices.clear()


def renew() -> None:
    """Lets plans be made anew."""
    global _generation
    _generation = next(_generations)  # never one that a thread beside this one has used


def install(device: str, kernel: str, entries: Iterable[Entry]) -> None:
    """Lets this process look in `entries` before any file; they replace those installed for the same extents."""
    news = {(entry.key, entry.extents): entry for entry in entries}
    with _installing:  # replaced, not changed: other threads may be going through it
        _installed[device, kernel] = _installed.get((device, kernel), {}) | news
    renew()
    _indices.pop(("installed", device, kernel), None)


def uninstall() -> None:
    """Lets this process look in files alone again."""
    _installed.clear()
    forget()


def hold(directory: Path | None, device: str, kernel: str, entries: Iterable[Entry]) -> None:
    """For this process, these entries count as if they stood in the directory's file, and go before what does.

    For what no file could take. They replace those that were held before; heeded after `forget`.
    """
    _held[directory, device, kernel] = tuple(entries)


def held(directory: Path | None, device: str, kernel: str) -> tuple[Entry, ...]:
    """What `hold` was last given."""
    return _held.get((directory, device, kernel), ())


@contextmanager
def hidden(*places: str) -> Iterator[None]:
    """Inside, look-ups of this thread do not ask these places, by default none of `PLACES`.

    >>> with hidden():
    ...     hidden_now = generation()[1]
    >>> sorted(hidden_now)
    ['installed', 'shipped', 'user store']
    """
    token = _hidden.set(_hidden.get().union(places or PLACES))
    try:
        yield
    finally:
        _hidden.reset(token)


def find(device: Device, kernel: str, key: Key, extents: Extents) -> Found | None:
    """The config installed, else the user store's or the shipped one; of these extents, else the bucket's largest.

    What a model chose for another size is no answer: it says less than what the model chooses for this one.
    """
    hidden_now = _hidden.get()
    for place in PLACES:
        if place in hidden_now:
            continue
        index = _indices.get((place, device.name, kernel))
        if index is None:
            generation, index = _generation, _index(place, device, kernel)
            if generation == _generation:  # else another thread has written since
                _indices[place, device.name, kernel] = index
        bucket = index.get(key) if index else None
        if bucket:
            chosen = bucket.get(extents)
            if chosen is not None:
                return Found(
                    chosen.config, f"{place}, {chosen.source}", True, chosen.seconds, chosen.rival, chosen.rival_name
                )
            chosen = next(iter(bucket.values()))  # a measured one, if there is any
            if chosen.source != "measured":
                continue
            return Found(chosen.config, f"{place}, {chosen.source} for another size", False, None, None)
    return None


def current(entry: Entry, kernel: str) -> bool:
    """Whether an entry is of the kernel as it is now."""
    return entry.stamp.get("kernel") == keys.source_hash(kernel)


def _index(place: str, device: Device, kernel: str) -> _Index:
    """Winners by key and extents; measured ones and, of these, those of most pixels come first."""
    index: _Index = {}
    for entry in _entries(place, device, kernel):
        winner = entry.winner
        if winner is not None and current(entry, kernel):
            rival, name = min(((seconds, name) for name, seconds in entry.baseline.items()), default=(None, ""))
            chosen = _Chosen(winner.config, entry.source, winner.seconds, rival, name)
            index.setdefault(entry.key, {})[entry.extents] = chosen
    return {
        key: dict(sorted(bucket.items(), key=lambda kv: (kv[1].source, -kv[0].N * math.prod(kv[0].output), kv[0])))
        for key, bucket in index.items()
    }


def _entries(place: str, device: Device, kernel: str) -> Iterator[Entry]:
    if place == "installed":
        yield from _installed.get((device.name, kernel), {}).values()
        return
    users = place == "user store"
    directory = user_directory() if users else shipped_directory()
    kin = None if users else known(device.name, device.multiprocessors)
    names = dict.fromkeys([*([kin.name] if kin else []), device.name])  # its own are the last word
    for name in names:
        try:
            if directory is not None:
                yield from read(path_of(directory, name, kernel), kernel, names)
        except UnreadableError as error:
            if (directory, error.reason) not in _told:
                _told.add((directory, error.reason))
                warnings.warn(f"configs are ignored: {error}", stacklevel=2)
        except MalformedError as error:
            warnings.warn(f"configs are ignored: {error}", stacklevel=2)
    if users:
        yield from held(directory, device.name, kernel)
