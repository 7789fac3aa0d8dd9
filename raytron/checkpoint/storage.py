"""Where checkpoints live: a folder on this machine (or a shared mount), or one that pyarrow's filesystems reach.

Both kinds offer the same few operations; what differs is how a checkpoint comes to exist. A local folder can be renamed
in one step, so it is written under a temporary name, made durable and renamed. Object stores have no such step, so
there the manifest, written last, makes a checkpoint exist; readers ignore a folder without one.

Local files go through `os` and not through pyarrow, whose local filesystem has no fsync. fsspec was the other candidate
for remote ones; pyarrow is there already for Parquet and comes with S3, GCS and HDFS built in.
"""

from __future__ import annotations

import os
import posixpath
import shutil
from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any, Protocol

__all__ = ["DamagedFile", "LocalStorage", "RemoteStorage", "Storage"]


class DamagedFile(ValueError):  # noqa: N818 - reads as what was found
    """A file of a checkpoint that is missing, truncated or altered; the message names it."""


class FileReader(Protocol):
    """An open file. `chunk` bytes are worth reading at a time where all of it is wanted."""

    chunk: int

    def read_into(self, start: int, view: memoryview) -> None: ...
    def close(self) -> None: ...


class FileWriter(Protocol):
    """A file being written from its beginning; after `close` it is durable."""

    def write(self, view: memoryview) -> None: ...
    def close(self) -> None: ...


class Storage(ABC):
    """A folder. Paths are relative to it, with "/" between their parts; missing parents are made when writing.

    Operations raise `OSError`; reading past a file's end raises `DamagedFile`.
    """

    renames: bool
    """Whether `rename` exists, and with it atomic folders."""

    @staticmethod
    def open(location: str | os.PathLike[str] | Storage) -> Storage:
        """The folder at a path, or at a URI pyarrow understands (s3://, gs://, hdfs://, file://)."""
        if isinstance(location, Storage):
            return location
        text = os.fspath(location)
        return RemoteStorage.from_uri(text) if "://" in text else LocalStorage(text)

    @abstractmethod
    def __str__(self) -> str: ...

    @abstractmethod
    def __truediv__(self, folder: str) -> Storage:
        """A folder inside this one."""

    @abstractmethod
    def reader(self, path: str) -> FileReader: ...

    @abstractmethod
    def writer(self, path: str) -> FileWriter: ...

    @abstractmethod
    def write(self, path: str, data: bytes) -> None:
        """A whole small file, durable; where files can be renamed it replaces an old one in one step."""

    @abstractmethod
    def files(self) -> dict[str, int]:
        """Path -> bytes of every file here and below; empty when the folder is missing."""

    @abstractmethod
    def folders(self) -> list[str]:
        """Names of the folders directly inside, sorted; empty when this one is missing."""

    @abstractmethod
    def size(self, path: str) -> int | None:
        """Bytes of a file; None when there is none."""

    @abstractmethod
    def delete(self, path: str) -> None:
        """Remove a file or a folder with all it holds; nothing when it is missing."""

    def rename(self, path: str, to: str) -> None:
        """Give the folder or file `path` the name `to` (only where `renames`). A folder's content is made durable first
        and its new name must be free; a file replaces an old one."""
        raise NotImplementedError(f"{self}: folders can't be renamed here")

    def read(self, path: str, start: int = 0, size: int | None = None) -> bytes:
        """`size` bytes from `start` (None: to the end)."""
        if size is None:
            whole = self.size(path)
            if whole is None:
                raise DamagedFile(f"{self}/{path}: missing")
            size = whole - start
        data = bytearray(size)
        file = self.reader(path)
        try:
            file.read_into(start, memoryview(data))
        finally:
            file.close()
        return bytes(data)


class LocalStorage(Storage):
    """A folder that this machine's file system holds."""

    renames = True

    def __init__(self, root: str | os.PathLike[str]) -> None:
        self.root = Path(root).expanduser().absolute()

    def __str__(self) -> str:
        return str(self.root)

    def __truediv__(self, folder: str) -> LocalStorage:
        return LocalStorage(self.root / folder)

    def reader(self, path: str) -> FileReader:
        return _LocalReader(self.root / path)

    def writer(self, path: str) -> FileWriter:
        target = self.root / path
        target.parent.mkdir(parents=True, exist_ok=True)
        return _LocalWriter(target)

    def write(self, path: str, data: bytes) -> None:
        target = self.root / path
        temporary = f"{posixpath.dirname(path)}/.{target.name}.tmp".lstrip("/")
        file = self.writer(temporary)
        try:
            file.write(memoryview(data))
        finally:
            file.close()
        os.replace(self.root / temporary, target)
        _sync_folder(target.parent)

    def files(self) -> dict[str, int]:
        found = (Path(folder) / name for folder, _, names in os.walk(self.root) for name in names)
        return {path.relative_to(self.root).as_posix(): path.stat().st_size for path in sorted(found)}

    def folders(self) -> list[str]:
        return sorted(p.name for p in self.root.iterdir() if p.is_dir()) if self.root.is_dir() else []

    def size(self, path: str) -> int | None:
        target = self.root / path
        return target.stat().st_size if target.is_file() else None

    def delete(self, path: str) -> None:
        target = self.root / path
        if target.is_dir() and not target.is_symlink():
            shutil.rmtree(target)
        else:
            target.unlink(missing_ok=True)

    def rename(self, path: str, to: str) -> None:
        for folder, _, _ in os.walk(self.root / path, topdown=False):
            _sync_folder(Path(folder))
        os.rename(self.root / path, self.root / to)
        _sync_folder((self.root / to).parent)


class _LocalReader:
    chunk = 1 << 20  # still in the core's cache when it is hashed, long enough to release the interpreter

    def __init__(self, path: Path) -> None:
        try:
            self._fd = os.open(path, os.O_RDONLY)
        except FileNotFoundError:
            raise DamagedFile(f"{path}: missing") from None
        self._path = path

    def read_into(self, start: int, view: memoryview) -> None:
        while view:
            n = os.preadv(self._fd, [view], start)
            if not n:
                raise DamagedFile(f"{self._path}: truncated; {len(view)} bytes are missing at its end")
            view, start = view[n:], start + n

    def close(self) -> None:
        os.close(self._fd)


class _LocalWriter:
    def __init__(self, path: Path) -> None:
        self._fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)

    def write(self, view: memoryview) -> None:
        while view:
            view = view[os.write(self._fd, view) :]

    def close(self) -> None:
        try:
            os.fsync(self._fd)
        finally:
            os.close(self._fd)


def _sync_folder(path: Path) -> None:
    """Make the names in a folder durable; a file's own fsync does not."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


class RemoteStorage(Storage):
    """A folder of a `pyarrow.fs.FileSystem`.

    Args:
        filesystem: any pyarrow filesystem.
        root: path inside it, without scheme.
        label: what messages call it, by default the root.
    """

    renames = False

    def __init__(self, filesystem: Any, root: str, label: str | None = None) -> None:
        self._fs, self._root = filesystem, root.rstrip("/")
        self._label = self._root if label is None else label.rstrip("/")

    @classmethod
    def from_uri(cls, uri: str) -> RemoteStorage:
        from pyarrow import fs  # lazily: a local run pays nothing for it

        try:
            return cls(*fs.FileSystem.from_uri(uri), label=uri)
        except (ValueError, OSError) as error:
            raise ValueError(
                f"storage_path {uri!r} is not a location pyarrow can open ({error}); use a local path or a URI such as "
                "s3://bucket/folder, gs://bucket/folder or hdfs://host/folder"
            ) from error

    def __str__(self) -> str:
        return self._label

    def __truediv__(self, folder: str) -> RemoteStorage:
        return RemoteStorage(self._fs, self._at(folder), posixpath.join(self._label, folder))

    def _at(self, path: str) -> str:
        return posixpath.join(self._root, path) if path else self._root

    def reader(self, path: str) -> FileReader:
        try:
            return _RemoteReader(self._fs.open_input_file(self._at(path)), f"{self}/{path}")
        except FileNotFoundError:
            raise DamagedFile(f"{self}/{path}: missing") from None

    def writer(self, path: str) -> FileWriter:
        self._fs.create_dir(posixpath.dirname(self._at(path)), recursive=True)
        return self._fs.open_output_stream(self._at(path), compression=None)

    def write(self, path: str, data: bytes) -> None:
        with self.writer(path) as stream:
            stream.write(data)

    def files(self) -> dict[str, int]:
        found = [info for info in self._list(recursive=True) if info.is_file]
        return {posixpath.relpath(i.path, self._root): i.size for i in sorted(found, key=lambda i: i.path)}

    def folders(self) -> list[str]:
        from pyarrow.fs import FileType

        return sorted(info.base_name for info in self._list() if info.type == FileType.Directory)

    def _list(self, recursive: bool = False) -> list[Any]:
        from pyarrow.fs import FileSelector

        return self._fs.get_file_info(FileSelector(self._root, allow_not_found=True, recursive=recursive))

    def size(self, path: str) -> int | None:
        info = self._fs.get_file_info(self._at(path))
        return info.size if info.is_file else None

    def delete(self, path: str) -> None:
        from pyarrow.fs import FileType

        kind = self._fs.get_file_info(self._at(path)).type
        if kind == FileType.Directory:
            self._fs.delete_dir(self._at(path))
        elif kind == FileType.File:
            self._fs.delete_file(self._at(path))


class _RemoteReader:
    chunk = 16 << 20  # every read is a request

    def __init__(self, file: Any, name: str) -> None:
        self._file, self._name = file, name

    def read_into(self, start: int, view: memoryview) -> None:
        self._file.seek(start)
        while view:
            n = self._file.readinto(view)
            if not n:
                raise DamagedFile(f"{self._name}: truncated; {len(view)} bytes are missing at its end")
            view = view[n:]

    def close(self) -> None:
        self._file.close()
