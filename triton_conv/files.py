"""Files that anyone may have written: read within limits, taken as JSON of the strict kind, and replaced whole.

>>> parsed('{"a": [1, 2.5]}')
{'a': [1, 2.5]}
"""

from __future__ import annotations

import errno
import json
import os
import stat
from contextlib import suppress
from pathlib import Path
from typing import Any

_OPENING = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)


# Lists and objects take twenty times the memory of their text: there may be so many, and one in so many characters.
_FREE, _PER_CONTAINER = 10_000, 16


class NoFileError(OSError):
    """A name that is of a directory, a pipe, a socket or a device."""


class TooLongError(OSError):
    """A file has more bytes than it may."""


def read_bytes(path: Path, most: int) -> bytes:
    """What a regular file holds, of at most `most` bytes. Raises OSError; never waits for a pipe."""
    if not stat.S_ISREG(path.stat().st_mode):  # asked before it is opened: that may rewind a tape
        raise NoFileError(errno.EINVAL, "is no file", str(path))
    with open(os.open(path, _OPENING), "rb") as file:
        found = os.fstat(file.fileno())
        if not stat.S_ISREG(found.st_mode):  # and after: it may be another one by now
            raise NoFileError(errno.EINVAL, "is no file", str(path))
        content = file.read(min(found.st_size, most) + 1)
    if len(content) > most:
        raise TooLongError(errno.EFBIG, f"has more than {most} bytes", str(path))
    return content


def parsed(content: str | bytes) -> Any:
    """What JSON says: of UTF-8, without NaN and infinities, no name twice in an object. Raises ValueError."""
    try:
        text = content if isinstance(content, str) else content.decode("utf-8")
        if text.count("[") + text.count("{") > _FREE + len(text) // _PER_CONTAINER:
            raise ValueError("it has too many lists and objects")
        return json.loads(text, object_pairs_hook=_object, parse_constant=_refused)
    except (ValueError, RecursionError) as error:  # of UTF-8, of JSON, of a number of thousands of digits
        raise ValueError(f"is no JSON: {error}") from error


def read_json(path: Path, most: int) -> Any:
    """What a JSON file says. Raises OSError, and ValueError that begins with the file's name."""
    try:
        return parsed(read_bytes(path, most))
    except (NoFileError, TooLongError) as error:
        raise ValueError(f"{path}: {error.strerror}") from error
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a name stands twice in an object")
    return found


def _refused(name: str) -> Any:
    raise ValueError(f"{name} is no number of JSON")


def write_whole(path: Path, content: str | bytes, mode: int = 0o600) -> None:
    """Replaces a file: whoever reads it finds all of the old or all of the new, whatever happens meanwhile.

    One writer at a time. What an earlier one that was killed has left behind, or a link that another user has put
    there, is taken away, never written to.
    """
    new = path.with_name(f"{path.name}.new")
    with suppress(FileNotFoundError):
        os.unlink(new)
    descriptor = os.open(new, os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0), 0o600)
    try:
        with open(descriptor, "wb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        if mode != 0o600:
            os.chmod(new, mode)
        os.replace(new, path)
    except BaseException:
        with suppress(FileNotFoundError):
            os.unlink(new)
        raise
    if hasattr(os, "O_DIRECTORY"):
        above = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(above)  # of the name
        finally:
            os.close(above)


def printable(text: str) -> str:
    """A text of a file for a terminal, which it is not to command.

    >>> printable("box\\x1b[2J")
    'box?[2J'
    """
    return "".join(c if c.isprintable() else "?" for c in text)


def shown(value: Any) -> str:
    """A value of a file for a message: printable and not long, whatever it is."""
    try:
        text = ascii(value)
    except (RecursionError, ValueError):
        text = "nested too deep, or too long"
    return text if len(text) <= 60 else f"{text[:60]}..."
