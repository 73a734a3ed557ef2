"""A store of configs as one file, `store.tgz`. Names in an archive say nothing: where its files go, their content says.

>>> import tempfile
>>> folder = Path(tempfile.mkdtemp())
>>> pack(folder, folder / "store.tgz")
>>> unpack(folder / "store.tgz", folder)
0
"""

from __future__ import annotations

import io
import tarfile
import zlib
from pathlib import Path

from triton_conv import stored
from triton_conv.files import read_bytes, write_whole

from .. import records

MOST_BYTES = 16 * 2**20  # packed
MOST_UNPACKED = 4 * stored.MOST_BYTES
_GZIP = 16 + zlib.MAX_WBITS


def pack(directory: Path, path: Path) -> None:
    """Writes the files of a store into one, whole or not at all."""
    archive = io.BytesIO()
    with tarfile.open(fileobj=archive, mode="w:gz") as packed:
        for file in sorted(directory.glob("*/*.json")):
            packed.add(file, file.relative_to(directory).as_posix(), recursive=False)
    records.replace_text(path, archive.getvalue())


def unpack(path: Path, directory: Path) -> int:
    """Puts what `pack` wrote into a store's directory, and says how many files that were.

    Raises OSError, and ValueError, naming the file, for what is no such archive, or holds or unpacks to too much.
    """
    try:
        unzipped = zlib.decompressobj(_GZIP)
        content = unzipped.decompress(read_bytes(path, MOST_BYTES), MOST_UNPACKED + 1)
        if len(content) > MOST_UNPACKED or not unzipped.eof:
            raise ValueError(f"has more than {MOST_UNPACKED} bytes, or ends too early")
        found = []
        with tarfile.open(fileobj=io.BytesIO(content), mode="r:") as archive:
            for member in archive:
                file = archive.extractfile(member) if member.isreg() else None
                if file is None:
                    raise ValueError("holds something else than files")
                text = file.read()
                found.append((*stored.loads(text, "a file in it")[:2], text))
    except (ValueError, zlib.error, tarfile.TarError, EOFError) as error:
        raise ValueError(f"{path}: is no packed store: {error}") from error
    for device, kernel, text in found:
        where = stored.path_of(directory, device, kernel)
        where.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        write_whole(where, text)
    return len(found)
