"""Both kinds of storage offer the same operations."""

from __future__ import annotations

import pyarrow.fs
import pytest

from raytron.checkpoint import DamagedFile, Storage
from raytron.checkpoint.storage import RemoteStorage


def test_write_list_read_delete(storage):
    assert storage.files() == {}
    assert storage.folders() == []
    storage.write("a/b/one", b"0123456789")
    (storage / "a").write("two", b"")
    assert storage.files() == {"a/b/one": 10, "a/two": 0}
    assert storage.folders() == ["a"]
    assert storage.read("a/b/one", 3, 4) == b"3456"
    assert (storage / "a/b").read("one") == b"0123456789"
    assert (storage.size("a/b/one"), storage.size("a"), storage.size("c")) == (10, None, None)
    storage.write("a/b/one", b"new")
    assert storage.read("a/b/one") == b"new"
    for path in ("a/two", "a/b", "missing"):
        storage.delete(path)
    assert storage.files() == {}


def test_short_and_missing_files_are_named(storage):
    storage.write("short", b"123")
    with pytest.raises(DamagedFile, match="short: truncated"):
        storage.read("short", 0, 4)
    with pytest.raises(DamagedFile, match="gone: missing"):
        storage.read("gone")


def test_any_pyarrow_filesystem(tmp_path):
    storage = RemoteStorage(pyarrow.fs.SubTreeFileSystem(str(tmp_path), pyarrow.fs.LocalFileSystem()), "runs")
    storage.write("x", b"1")
    assert (tmp_path / "runs" / "x").read_bytes() == b"1"
    assert storage.files() == {"x": 1}
    assert not storage.renames


def test_a_location_nothing_can_open_is_refused():
    with pytest.raises(ValueError, match=r"storage_path 'nowhere://x'.*s3://"):
        Storage.open("nowhere://x")
