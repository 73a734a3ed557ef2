"""What is read from code is read once for a kernel, an architecture and a way of reading."""

from pathlib import Path
from types import SimpleNamespace

import pytest
from test_audit import GOOD

from triton_conv.tuning import remembered

KERNEL = SimpleNamespace(hash="ab" * 32)


@pytest.fixture
def reads(monkeypatch, tmp_path):
    """Each reading done, with Triton's cache in an empty directory."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    done = []
    monkeypatch.setattr(remembered, "read", lambda kernel, arch: done.append((kernel.hash, arch)) or GOOD)
    return done


def test_code_is_read_once(reads):
    assert [remembered.read_once(KERNEL, 90) for _ in range(3)] == [GOOD] * 3
    assert reads == [(KERNEL.hash, 90)]


def test_another_kernel_architecture_or_reader_reads_again(reads, monkeypatch):
    remembered.read_once(KERNEL, 90)
    remembered.read_once(KERNEL, 100)
    remembered.read_once(SimpleNamespace(hash="cd" * 32), 90)
    monkeypatch.setattr(remembered, "_reader", lambda: "another")
    remembered.read_once(KERNEL, 90)
    assert len(reads) == 4


@pytest.mark.parametrize("left", ["", "{", "[]", '{"registers": 1}', "null", '{"another": 1}'])
def test_what_is_damaged_is_read_again(reads, tmp_path, left):
    remembered.read_once(KERNEL, 90)
    (path,) = Path(tmp_path).rglob("*.json")
    path.write_text(left)
    assert remembered.read_once(KERNEL, 90) == GOOD
    assert remembered.read_once(KERNEL, 90) == GOOD
    assert len(reads) == 2
