"""Tuned configs of a problem, and the text in which files hold them.

A file's text has a line for the problem of an entry and one for each candidate that was ever measured there. It is
read as if a stranger had written it: what is read is as this version writes it, or an error says what is not.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import MISSING, dataclass, fields
from functools import cache
from math import prod
from typing import Any, get_type_hints

from . import files
from . import key as keys
from .config import BandedConfig, DepthwiseConfig, KernelConfig
from .deform_config import DeformRole
from .files import shown as shown
from .forks import cached_property
from .geometry import Role
from .key import CONFIGS, Extents, Key

SCHEMA = 1
MOST_STAGES = 16
MOST_OF_A_CONFIG = 2**16  # any number of it
MOST_OF_A_TILE = 2**20  # elements that Triton lets a tensor have
STATUSES = ("ok", "wrong", "failed")
SOURCES = ("measured", "model")
TIE = 0.02  # of the time: candidates that differ by less are equally quick, whatever their spread
WIDEST_TIE = 0.1  # and those that differ by more are not: a wider spread says little of either


class MalformedError(ValueError):
    """A file does not hold configs as this version writes them; the message names it and what is wrong."""


class NewerError(MalformedError):
    """A file was written by a later version."""


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
        """The candidate to run: of those as quick as the quickest, but for their spread, the simplest."""
        return winner_of(self.candidates)


def winner_of(candidates: Iterable[Candidate]) -> Candidate | None:
    """`Entry.winner` of any candidates; None if there is none that is right.

    >>> from triton_conv.config import Config
    >>> a, b = Candidate(Config(64, 64, 32), 1.00e-3), Candidate(Config(32, 64, 32), 1.01e-3)
    >>> winner_of([a, b]) is b
    True
    """
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
        what = {name: value for name, value in entry.key._asdict().items() if name not in _LEFT_OUT}
        what |= {"variant": entry.key.variant} if entry.key.variant else {}
        first = {**what, **entry.extents._asdict(), "source": entry.source, **_present(entry)}
        lines = [_line(_candidate(c)) for c in entry.candidates]
        blocks.append(f'{_line(first)[:-1]}, "candidates": [\n  ' + ",\n  ".join(lines) + "]}")
    return f'{_line(head)[:-1]}, "entries": [\n' + ",\n".join(blocks) + "\n]}\n"


def loads(text: str | bytes, name: str) -> tuple[str, str, list[Entry]]:
    """(device, kernel, entries) of a file called `name`. Raises MalformedError."""
    try:
        content = files.parsed(text)
    except ValueError as error:
        raise MalformedError(f"{name}: {error}") from error
    try:
        found = _checked(content, dict, "the file")
        strange = found.keys() - {"schema", "device", "kernel", "entries"}
        schema = _checked(found.get("schema"), int, "schema")
        if schema != SCHEMA:
            raise (NewerError if schema > SCHEMA else MalformedError)(f"schema is {shown(schema)}, not {SCHEMA}")
        kernel = _checked(found.get("kernel"), str, "kernel")
        if kernel not in CONFIGS:
            raise MalformedError(f"kernel is {shown(kernel)}, which there is not")
        if strange:
            raise MalformedError(f"the file has {shown(sorted(strange))} too much")
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


# The number of pixels follows from the extents; ordinary convolutions have no variant.
_LEFT_OUT = ("pixels", "variant")
_ROLES = {role.value for kind in (Role, DeformRole) for role in kind}
_ENTRY = {*Key._fields, *Extents._fields, "source", "stamp", "baseline", "candidates"} - {"pixels"}


def _entry(found: Any, kernel: str) -> Entry:
    found = _checked(found, dict, "an entry")
    unknown = found.keys() - _ENTRY
    missing = _ENTRY - {"stamp", "baseline", "variant"} - found.keys()
    if unknown or missing:
        raise MalformedError(f"an entry has {shown(sorted(unknown))} too much, {sorted(missing)} too little")
    extents = Extents(*(_value(found[name], hint, name) for name, hint in _hints(Extents).items()))
    hints = {name: hint for name, hint in _hints(Key).items() if name not in _LEFT_OUT}
    given = {name: _value(found[name], hint, name) for name, hint in hints.items()}
    variant = _checked(found.get("variant", ""), str, "variant")
    key = Key(**given, pixels=keys.bucket(extents), variant=variant)
    if key.role not in _ROLES:
        raise MalformedError(f"role is {shown(key.role)}")
    if found["source"] not in SOURCES:
        raise MalformedError(f"source is {shown(found['source'])}")
    stamp = _checked(found.get("stamp", {}), dict, "stamp")
    baseline = _checked(found.get("baseline", {}), dict, "baseline")
    candidates = tuple(_read_candidate(c, kernel) for c in _checked(found["candidates"], list, "candidates"))
    return Entry(
        key,
        extents,
        found["source"],
        {name: _value(value, str, f"stamp {shown(name)}") for name, value in stamp.items()},
        candidates,
        {name: _value(value, float, f"baseline {shown(name)}") for name, value in baseline.items()},
    )


def _read_candidate(found: Any, kernel: str) -> Candidate:
    found = _checked(found, dict, "a candidate")
    unknown = found.keys() - _hints(Candidate).keys()
    if unknown or "config" not in found:
        raise MalformedError(f"a candidate has {shown(sorted(found))}")
    kind: Any = CONFIGS[kernel]
    given = _checked(found["config"], dict, "config")
    hints = _hints(kind)
    strange = given.keys() - hints.keys()
    if strange:
        raise MalformedError(f"a config of {kernel} has no {shown(sorted(strange))}")
    try:
        config = kind(**{name: _value(value, hints[name], name) for name, value in given.items()})
    except (TypeError, ValueError) as error:
        raise MalformedError(f"a config of {kernel}: {error}") from error
    warps, stages = config.num_warps, getattr(config, "num_stages", 1)
    large = _largest(given) > MOST_OF_A_CONFIG or _tile(config) > MOST_OF_A_TILE
    if warps not in (1, 2, 4, 8, 16, 32) or not 1 <= stages <= MOST_STAGES or large:
        raise MalformedError(f"a config of {kernel} is beyond what compiles: {shown(config)}")
    seconds = found.get("seconds")
    candidate = Candidate(
        config,
        None if seconds is None else _value(seconds, float, "seconds"),
        _value(found.get("spread", 0.0), float, "spread"),
        _value(found.get("status", "ok"), str, "status"),
        _value(found.get("why", ""), str, "why"),
    )
    if candidate.status not in STATUSES or candidate.seconds == 0:
        raise MalformedError(f"a candidate has status {shown(candidate.status)} and seconds {candidate.seconds}")
    return candidate


@cache
def _hints(kind: Any) -> dict[str, Any]:
    """The types of its fields; finding them takes longer than all else."""
    return get_type_hints(kind)


def _largest(given: Mapping[str, Any]) -> int:
    """Of the numbers of a config."""
    return max((n for value in given.values() for n in (value if isinstance(value, list) else [value])), default=0)


def _tile(config: KernelConfig) -> int:
    """Elements of the largest tensor of a program."""
    if isinstance(config, DepthwiseConfig):
        return config.lanes * config.columns * config.channels
    if isinstance(config, BandedConfig):
        return max(config.BLOCK_M, prod(config.blocks) * config.chunk, config.height * config.columns * config.chunk)
    sides = (config.BLOCK_M, config.BLOCK_N, config.BLOCK_K)
    return prod(sides) // min(sides) if getattr(config, "dot", True) else prod(sides)


def _checked(value: Any, kind: type, name: str) -> Any:
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        raise MalformedError(f"{name} is {shown(value)}, not a {kind.__name__}")
    return value


def _value(value: Any, hint: Any, name: str) -> Any:
    """A value of one of the types that keys, extents and configs have."""
    parts = getattr(hint, "__args__", None)
    if parts:
        items = _checked(value, list, name)
        if len(items) != len(parts):
            raise MalformedError(f"{name} is {shown(value)}, of which there should be {len(parts)}")
        return tuple(_value(item, part, name) for item, part in zip(items, parts, strict=True))
    if hint is float:
        number = value if isinstance(value, float) else _value(value, int, name)
        if not 0 <= number < math.inf:
            raise MalformedError(f"{name} is {number}")
        return float(number)
    if hint is int and not 0 <= _checked(value, int, name) < 2**63:
        raise MalformedError(f"{name} is {shown(value)}")
    return _checked(value, hint, name)
