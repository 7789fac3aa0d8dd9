"""Storage on which a process dies, or waits, at a chosen operation."""

from __future__ import annotations

import threading

from raytron.checkpoint.storage import LocalStorage, RemoteStorage, Storage


class Crash(BaseException):
    """The process dies here: nothing handles it."""


class Fuse:
    """Counts operations; from number `at` on (None: never) none is carried out, also not while unwinding."""

    def __init__(self, at: int | None = None) -> None:
        self.at, self.count = at, 0

    def blown(self) -> bool:
        self.count += 1
        return self.at is not None and self.count > self.at

    def burn(self) -> None:
        if self.blown():
            raise Crash


class _Writer:
    def __init__(self, file, fuse: Fuse) -> None:
        self._file, self._fuse = file, fuse

    def write(self, view) -> None:
        if self._fuse.blown():
            if self._fuse.count == self._fuse.at + 1:
                self._file.write(view[: len(view) // 2])
            raise Crash
        self._file.write(view)

    def close(self) -> None:
        self._fuse.burn()
        self._file.close()

    def __enter__(self):
        return self

    def __exit__(self, kind, *_) -> None:
        if kind is None:
            self.close()


class _Mortal:
    fuse: Fuse

    def __truediv__(self, folder):
        return mortal(super().__truediv__(folder), self.fuse)

    def writer(self, path):
        self.fuse.burn()
        return _Writer(super().writer(path), self.fuse)

    def delete(self, path):
        self.fuse.burn()
        super().delete(path)

    def rename(self, path, to):
        self.fuse.burn()
        super().rename(path, to)
        self.fuse.burn()


class _MortalLocal(_Mortal, LocalStorage):
    pass


class _MortalRemote(_Mortal, RemoteStorage):
    pass


def mortal(storage: Storage, fuse: Fuse) -> Storage:
    """The same storage, whose operations burn the fuse."""
    kind = _MortalLocal if isinstance(storage, LocalStorage) else _MortalRemote
    twin = kind.__new__(kind)
    twin.__dict__.update(storage.__dict__, fuse=fuse)
    return twin


class GatedStorage(LocalStorage):
    """Files are opened for writing only once `gate` is open."""

    def __init__(self, root, gate: threading.Event) -> None:
        super().__init__(root)
        self._gate = gate

    def __truediv__(self, folder):
        return GatedStorage(self.root / folder, self._gate)

    def writer(self, path):
        assert self._gate.wait(60)
        return super().writer(path)
