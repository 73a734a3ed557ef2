"""The store of measured configs, which many processes write to, some of them at the same time and some killed midway.

A file is read, merged with what is new, and replaced, under a lock that stands beside it; so whoever reads it finds an
old file or a new one. What no file can take stays in memory, where look-ups of this process find it.
"""

from __future__ import annotations

import errno
import os
import tempfile
import warnings
from collections.abc import Iterable
from datetime import datetime, timezone
from pathlib import Path

import filelock

from .. import files, stored
from ..key import Extents, Key, source_hash
from ..stored import Entry, MalformedError, NewerError, UnreadableError

LOCK_SECONDS = 60.0  # that a write waits for others', which take milliseconds each
_POLL = 0.005  # seconds between looks at a lock that another has


class Store:
    """The files of a directory, which need not be there.

    >>> import tempfile
    >>> store = Store(Path(tempfile.mkdtemp()) / "configs")
    >>> store.entries("NVIDIA H200", "gather")
    []

    `directory` may be None, for a user without a home: then everything stays in memory.
    """

    def __init__(self, directory: Path | None):
        self.directory = directory
        self._told: set[str] = set()

    def add(self, device: str, kernel: str, *entries: Entry) -> None:
        """Merges entries into the file of a device and kernel; when it returns they are on the disk.

        What others have added stays. Look-ups see it after `stored.forget()`, which is for the caller to call. Where
        the file cannot be written, or a later version has written it, a warning says so, once for a directory, and the
        entries stay in memory: `stored.find` sees them there, and the next `add` tries again. A file that holds
        something else is moved aside to `<name>.corrupt-<number>`, with a warning.
        """
        waiting = [*stored.held(self.directory, device, kernel), *entries]
        try:
            if self.directory is None:
                raise OSError("there is no home directory")
            self._write(self.directory, device, kernel, waiting)
        except (OSError, NotImplementedError, NewerError, UnreadableError) as error:
            self._hold(device, kernel, waiting, error)
        else:
            stored.hold(self.directory, device, kernel, ())

    def try_writing(self) -> None:
        """Raises OSError, in words, if the directory takes no files."""
        if self.directory is None:
            raise OSError("there is no home directory")
        try:
            _make(self.directory)
            with tempfile.TemporaryFile(dir=self.directory):
                pass
        except FileExistsError as error:
            raise OSError(f"{self.directory} takes no files: {error.filename} is no directory") from error
        except OSError as error:
            raise OSError(f"{self.directory} takes no files: {error.strerror or error}") from error

    def entries(self, device: str, kernel: str) -> list[Entry]:
        """Those of the file, and those that it could not take. A file that cannot be read is worth a warning."""
        found: list[Entry] = []
        if self.directory is not None:
            try:
                found = stored.read(stored.path_of(self.directory, device, kernel), kernel, [device])
            except MalformedError as error:
                warnings.warn(f"configs are ignored: {error}", stacklevel=2)
        return _united([*found, *stored.held(self.directory, device, kernel)], kernel)

    def unsaved(self, device: str, kernel: str) -> int:
        """How many entries are in memory only."""
        return len(stored.held(self.directory, device, kernel))

    @property
    def all_unsaved(self) -> dict[tuple[str, str], tuple[Entry, ...]]:
        """Those of every device and kernel that has any."""
        held = list(stored._held.items())
        return {what[1:]: entries for what, entries in held if what[0] == self.directory and entries}

    def rescue(self) -> Path:
        """Writes what is in memory only to a new directory for temporary files, and returns it. Raises OSError."""
        directory = Path(tempfile.mkdtemp(prefix="triton_conv-"))
        for (device, kernel), entries in self.all_unsaved.items():
            path = stored.path_of(directory, device, kernel)
            _make(path.parent)
            files.write_whole(path, stored.dumps(device, kernel, _united(entries, kernel)))
        return directory

    def _write(self, directory: Path, device: str, kernel: str, entries: list[Entry]) -> None:
        path = stored.path_of(directory, device, kernel)
        _make(path.parent)
        with filelock.FileLock(f"{path}.lock", timeout=LOCK_SECONDS, mode=0o600, poll_interval=_POLL):
            try:
                before = stored.read(path, kernel, [device])
            except (NewerError, UnreadableError):
                raise
            except MalformedError as error:
                _check_whose(path, device)
                aside = _moved_aside(path)
                warnings.warn(f"{error}; it is now {aside.name}, and a new file begins", stacklevel=4)
                before = []
            after = _united([*before, *entries], kernel)
            if after != before or not path.exists():
                text = stored.dumps(device, kernel, after).encode()
                if len(text) > stored.MOST_BYTES:
                    raise OSError(errno.EFBIG, f"{path} would have more than {stored.MOST_BYTES} bytes")
                files.write_whole(path, text)

    def _hold(self, device: str, kernel: str, entries: list[Entry], error: Exception) -> None:
        merged = _united([*self._readable(device, kernel), *entries], kernel)
        ours = {(entry.key, entry.extents) for entry in entries}
        kept = [entry for entry in merged if (entry.key, entry.extents) in ours]
        stored.hold(self.directory, device, kernel, kept)
        told = str(error) if isinstance(error, MalformedError) else str(self.directory)
        if told not in self._told:
            self._told.add(told)
            why = error.strerror if isinstance(error, OSError) and error.strerror else error
            warnings.warn(f"configs stay in memory, for this process only: {self.directory}: {why}", stacklevel=3)

    def _readable(self, device: str, kernel: str) -> list[Entry]:
        if self.directory is None:
            return []
        try:
            return stored.read(stored.path_of(self.directory, device, kernel), kernel, [device])
        except MalformedError:
            return []


def merged(one: Entry, other: Entry, current: str = "") -> Entry:
    """What two entries of the same key and extents know together, in whatever order they come.

    Of entries of different sources of the kernel, one stays: that of `current`, a `source_hash`, else the newer. What
    was measured goes before what a model chose. Otherwise no config is dropped, and of one that both tried the newer
    measurement is kept; but with the same Triton, once wrong is wrong. Stamps and baselines are the newer ones.
    """
    if (one.key, one.extents) != (other.key, other.extents):
        raise ValueError(
            f"entries of one problem merge, not of {one.key} {one.extents} and {other.key} {other.extents}"
        )
    older, newer = sorted((one, other), key=_age)
    hashes = [entry.stamp.get("kernel") for entry in (older, newer)]
    if hashes[0] != hashes[1]:
        return older if current and hashes[0] == current else newer
    if older.source != newer.source:
        return older if older.source == "measured" else newer
    candidates = {c.config: c for c in older.candidates}
    same = older.stamp.get("triton") == newer.stamp.get("triton")
    for c in newer.candidates:
        before = candidates.get(c.config)
        if before is None or not (same and before.status == "wrong"):
            candidates[c.config] = c
    baseline = {**older.baseline, **newer.baseline}
    return Entry(newer.key, newer.extents, newer.source, newer.stamp, tuple(candidates.values()), baseline)


def _age(entry: Entry) -> tuple:
    """Sorts by time; clocks may stand at the same, and then it is the same order for everyone."""
    text = entry.stamp.get("time", "")
    try:
        time = datetime.fromisoformat(text.replace("Z", "+00:00"))
        if time.tzinfo is None:
            time = time.replace(tzinfo=timezone.utc)
        seconds = time.timestamp()
    except (ValueError, OverflowError):
        seconds = float("-inf")
    return seconds, text, sorted(entry.stamp.items()), repr(entry.candidates), sorted(entry.baseline.items())


def _united(entries: Iterable[Entry], kernel: str) -> list[Entry]:
    """One entry for each problem, in the order of files."""
    found: dict[tuple[Key, Extents], Entry] = {}
    for entry in entries:
        what = (entry.key, entry.extents)
        found[what] = merged(found[what], entry, source_hash(kernel)) if what in found else entry
    return [found[what] for what in sorted(found)]


def _make(directory: Path) -> None:
    """A directory that nobody else looks into, and those above it as far as they are missing."""
    for part in (*reversed(directory.parents), directory):
        if not part.is_dir():
            part.mkdir(mode=0o700, exist_ok=True)


def _check_whose(path: Path, device: str) -> None:
    """Raises OSError where a file that is not of this device is another's rightful one, whose name ends up the same."""
    try:
        there, kernel, _ = stored.load(path)
    except (MalformedError, FileNotFoundError):
        return
    if there != device and stored.path_of(path.parent.parent, there, kernel) == path:
        raise OSError(errno.EEXIST, f"{path} is of {files.shown(there)}, not {files.shown(device)}")


def _moved_aside(path: Path) -> Path:
    number = 1
    while os.path.lexists(aside := path.with_name(f"{path.name}.corrupt-{number}")):
        number += 1
    return path.rename(aside)
