"""Tuned configs as files hold them, and their look-up: the user's store, then what ships with the package.

A directory holds a file for each device and kernel, `NVIDIA_H200/box.json`; its text has a line for the problem of an
entry and one for each candidate that was ever measured there. A file that cannot be read is worth a warning that names
it, and nothing else: then the next place is asked.
"""

from __future__ import annotations

import json
import math
import os
import re
import stat
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import MISSING, dataclass, fields
from functools import cache, cached_property
from pathlib import Path
from typing import Any, NamedTuple, get_type_hints

from . import key as keys
from .config import KernelConfig
from .devices import Device, known
from .geometry import Role
from .key import CONFIGS, Extents, Key

SCHEMA = 1
MOST_BYTES = 64 * 2**20  # of a file
MOST_STAGES = 16
MOST_OF_A_CONFIG = 2**16  # any number of it
STATUSES = ("ok", "wrong", "failed")
SOURCES = ("measured", "model")
TIE = 0.02  # of the time: candidates that differ by less are equally quick, whatever their spread
WIDEST_TIE = 0.1  # and those that differ by more are not: a wider spread says little of either


class MalformedError(ValueError):
    """A file does not hold configs as this version writes them; the message names it and what is wrong."""


class NewerError(MalformedError):
    """A file was written by a later version."""


class UnreadableError(MalformedError):
    """A file cannot be read at all."""


@dataclass(frozen=True)
class Candidate:
    """A config that was tried: `seconds` is the median time, `spread` half the distance of its quartiles, relative.

    `status` is "ok", "wrong" (its values were) or "failed" (to compile or to run), with `why` in words. A config that a
    model chose has no seconds.
    """

    config: KernelConfig
    seconds: float | None = None
    spread: float = 0.0
    status: str = "ok"
    why: str = ""


@dataclass(frozen=True)
class Entry:
    """What is known of one problem: `stamp` says what it was measured with, `baseline` others' seconds by name."""

    key: Key
    extents: Extents
    source: str
    stamp: Mapping[str, str]
    candidates: tuple[Candidate, ...]
    baseline: Mapping[str, float]

    def __post_init__(self) -> None:
        in_order = sorted(self.candidates, key=lambda c: keys.simplicity(c.config))
        object.__setattr__(self, "candidates", tuple(in_order))

    @cached_property
    def winner(self) -> Candidate | None:
        """The candidate to run: of those as quick as the quickest, but for their spread, the simplest.

        >>> from triton_conv.config import Config
        >>> a, b = Candidate(Config(64, 64, 32), 1.00e-3), Candidate(Config(32, 64, 32), 1.01e-3)
        >>> winner_of([a, b]) is b
        True
        """
        return winner_of(self.candidates)


def winner_of(candidates: Iterable[Candidate]) -> Candidate | None:
    """`Entry.winner` of any candidates; None if there is none that is right."""
    right = [c for c in candidates if c.status == "ok"]
    timed = [c for c in right if c.seconds is not None]
    if not timed:
        return min(right, key=lambda c: keys.simplicity(c.config), default=None)
    best = min(timed, key=_seconds)
    tied = [c for c in timed if _seconds(c) <= _seconds(best) * (1 + min(max(TIE, best.spread, c.spread), WIDEST_TIE))]
    return min(tied, key=lambda c: keys.simplicity(c.config))


def _seconds(candidate: Candidate) -> float:
    return math.inf if candidate.seconds is None else candidate.seconds


# ---------------------------------------------------------------------------------------------------------------------
# Text


def dumps(device: str, kernel: str, entries: Iterable[Entry]) -> str:
    """The text of a file; entries and candidates stand in an order of their own, so that differences are few lines."""
    head = {"schema": SCHEMA, "device": device, "kernel": kernel}
    blocks = []
    for entry in sorted(entries, key=lambda e: (e.key, e.extents)):
        what = {name: value for name, value in entry.key._asdict().items() if name != "pixels"}
        first = {**what, **entry.extents._asdict(), "source": entry.source, **_present(entry)}
        lines = [_line(_candidate(c)) for c in entry.candidates]
        blocks.append(f'{_line(first)[:-1]}, "candidates": [\n  ' + ",\n  ".join(lines) + "]}")
    return f'{_line(head)[:-1]}, "entries": [\n' + ",\n".join(blocks) + "\n]}\n"


def loads(text: str, name: str) -> tuple[str, str, list[Entry]]:
    """(device, kernel, entries) of a file called `name`. Raises MalformedError."""
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise MalformedError(f"{name}: is no JSON: {error}") from error
    try:
        found = _checked(content, dict, "the file")
        schema = _checked(found.get("schema"), int, "schema")
        if schema != SCHEMA:
            raise (NewerError if schema > SCHEMA else MalformedError)(f"schema is {_shown(schema)}, not {SCHEMA}")
        kernel = _checked(found.get("kernel"), str, "kernel")
        if kernel not in CONFIGS:
            raise MalformedError(f"kernel is {_shown(kernel)}, which there is not")
        entries = _checked(found.get("entries"), list, "entries")
        return _checked(found.get("device"), str, "device"), kernel, [_entry(e, kernel) for e in entries]
    except MalformedError as error:
        raise type(error)(f"{name}: {error}") from error


def _line(value: Any) -> str:
    return json.dumps(value, allow_nan=False)


def _present(entry: Entry) -> dict[str, Any]:
    return {name: dict(sorted(value.items())) for name in ("stamp", "baseline") if (value := getattr(entry, name))}


def _candidate(c: Candidate) -> dict[str, Any]:
    config = {
        f.name: getattr(c.config, f.name)
        for f in fields(c.config)
        if f.default is MISSING or getattr(c.config, f.name) != f.default
    }
    rest = {f.name: getattr(c, f.name) for f in fields(c)[1:] if getattr(c, f.name) != f.default}
    return {"config": config, **rest}


# The number of pixels follows from the extents.
_ENTRY = {*Key._fields, *Extents._fields, "source", "stamp", "baseline", "candidates"} - {"pixels"}


def _entry(found: Any, kernel: str) -> Entry:
    found = _checked(found, dict, "an entry")
    unknown = found.keys() - _ENTRY
    missing = _ENTRY - {"stamp", "baseline"} - found.keys()
    if unknown or missing:
        raise MalformedError(f"an entry has {_shown(sorted(unknown))} too much, {sorted(missing)} too little")
    extents = Extents(*(_value(found[name], hint, name) for name, hint in _hints(Extents).items()))
    hints = {name: hint for name, hint in _hints(Key).items() if name != "pixels"}
    given = {name: _value(found[name], hint, name) for name, hint in hints.items()}
    key = Key(**given, pixels=keys.bucket(extents))
    if key.role not in {role.value for role in Role}:
        raise MalformedError(f"role is {_shown(key.role)}")
    if found["source"] not in SOURCES:
        raise MalformedError(f"source is {_shown(found['source'])}")
    stamp = _checked(found.get("stamp", {}), dict, "stamp")
    baseline = _checked(found.get("baseline", {}), dict, "baseline")
    candidates = tuple(_read_candidate(c, kernel) for c in _checked(found["candidates"], list, "candidates"))
    return Entry(
        key,
        extents,
        found["source"],
        {name: _value(value, str, f"stamp {name}") for name, value in stamp.items()},
        candidates,
        {name: _value(value, float, f"baseline {name}") for name, value in baseline.items()},
    )


def _read_candidate(found: Any, kernel: str) -> Candidate:
    found = _checked(found, dict, "a candidate")
    unknown = found.keys() - _hints(Candidate).keys()
    if unknown or "config" not in found:
        raise MalformedError(f"a candidate has {_shown(sorted(found))}")
    kind: Any = CONFIGS[kernel]
    given = _checked(found["config"], dict, "config")
    hints = _hints(kind)
    strange = given.keys() - hints.keys()
    if strange:
        raise MalformedError(f"a config of {kernel} has no {_shown(sorted(strange))}")
    try:
        config = kind(**{name: _value(value, hints[name], name) for name, value in given.items()})
    except (TypeError, ValueError) as error:
        raise MalformedError(f"a config of {kernel}: {error}") from error
    warps, stages = config.num_warps, getattr(config, "num_stages", 1)
    if warps not in (1, 2, 4, 8, 16, 32) or not 1 <= stages <= MOST_STAGES or _largest(given) > MOST_OF_A_CONFIG:
        raise MalformedError(f"a config of {kernel} is beyond what compiles: {_shown(config)}")
    seconds = found.get("seconds")
    candidate = Candidate(
        config,
        None if seconds is None else _value(seconds, float, "seconds"),
        _value(found.get("spread", 0.0), float, "spread"),
        _value(found.get("status", "ok"), str, "status"),
        _value(found.get("why", ""), str, "why"),
    )
    if candidate.status not in STATUSES or candidate.seconds == 0:
        raise MalformedError(f"a candidate has status {candidate.status!r} and seconds {candidate.seconds}")
    return candidate


@cache
def _hints(kind: Any) -> dict[str, Any]:
    """The types of its fields; finding them takes longer than all else."""
    return get_type_hints(kind)


def _largest(given: Mapping[str, Any]) -> int:
    """Of the numbers of a config."""
    return max((n for value in given.values() for n in (value if isinstance(value, list) else [value])), default=0)


def _checked(value: Any, kind: type, name: str) -> Any:
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        raise MalformedError(f"{name} is {_shown(value)}, not a {kind.__name__}")
    return value


def _value(value: Any, hint: Any, name: str) -> Any:
    """A value of one of the types that keys, extents and configs have."""
    parts = getattr(hint, "__args__", None)
    if parts:
        items = _checked(value, list, name)
        if len(items) != len(parts):
            raise MalformedError(f"{name} is {_shown(value)}, of which there should be {len(parts)}")
        return tuple(_value(item, part, name) for item, part in zip(items, parts, strict=True))
    if hint is float:
        number = value if isinstance(value, float) else _value(value, int, name)
        if not 0 <= number < math.inf:
            raise MalformedError(f"{name} is {number}")
        return float(number)
    if hint is int and not 0 <= _checked(value, int, name) < 2**63:
        raise MalformedError(f"{name} is {_shown(value)}")
    return _checked(value, hint, name)


def _shown(value: Any) -> str:
    try:
        text = ascii(value)
    except RecursionError:
        text = "nested too deep"
    return text if len(text) <= 60 else f"{text[:60]}..."


# ---------------------------------------------------------------------------------------------------------------------
# Places


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
        if not stat.S_ISREG(path.stat().st_mode):
            raise UnreadableError(f"{path}: is no file")  # of pipes, nobody may ever write what we would wait for
        with open(path, "rb") as file:
            content = file.read(MOST_BYTES + 1)
    except FileNotFoundError:
        raise
    except NotADirectoryError as error:
        raise FileNotFoundError(*error.args) from error
    except OSError as error:
        raise UnreadableError(f"{path}: {error.strerror or error}") from error
    if len(content) > MOST_BYTES:
        raise MalformedError(f"{path}: has more than {MOST_BYTES} bytes")
    return loads(content.decode(errors="replace"), str(path))


def read(path: Path, kernel: str, names: Iterable[str]) -> list[Entry]:
    """The entries of a file, if there is one, for a kernel and a device of these names. Raises MalformedError."""
    try:
        device, of_kernel, entries = load(path)
    except FileNotFoundError:
        return []
    if of_kernel != kernel or device not in names:
        those = " or ".join(map(repr, names))
        raise MalformedError(f"{path}: is for {of_kernel} on {_shown(device)}, not {kernel} on {those}")
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
_held: dict[tuple[Path | None, str, str], tuple[Entry, ...]] = {}  # by directory, device and kernel
_asked: tuple[str, ...] = PLACES
_generation = 0


def generation() -> int:
    """Another number whenever answers may have changed: part of what plans are cached under."""
    return _generation


def forget() -> None:
    """Reads files again when they are next needed, and lets plans be made anew."""
    global _generation
    _generation += 1
    _indices.clear()


def install(device: str, kernel: str, entries: Iterable[Entry]) -> None:
    """Lets this process look in `entries` before any file; they replace those installed for the same extents."""
    global _generation
    _installed.setdefault((device, kernel), {}).update({(entry.key, entry.extents): entry for entry in entries})
    _generation += 1
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
    """Inside, for the whole process, look-ups do not ask these places, by default none of `PLACES`."""
    global _asked
    before, _asked = _asked, tuple(place for place in _asked if places and place not in places)
    forget()
    try:
        yield
    finally:
        _asked = before
        forget()


_unused: ContextVar[bool] = ContextVar("unused", default=False)


@contextmanager
def unused() -> Iterator[None]:
    """Within it nothing is found, on this thread: plans are those of the rules. They must not be cached then."""
    token = _unused.set(True)
    try:
        yield
    finally:
        _unused.reset(token)


def find(device: Device, kernel: str, key: Key, extents: Extents) -> Found | None:
    """The config installed, else the user store's or the shipped one; of these extents, else the bucket's largest."""
    if _unused.get():
        return None
    for place in _asked:
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
            chosen = next(iter(bucket.values()))
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
        except MalformedError as error:
            warnings.warn(f"configs are ignored: {error}", stacklevel=2)
    if users:
        yield from held(directory, device.name, kernel)
