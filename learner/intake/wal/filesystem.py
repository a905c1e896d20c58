"""The file layer below journal and snapshots: the few calls whose order decides what survives a crash.

Tests put another one in its place, which crashes or refuses at any of these calls.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import BinaryIO, Protocol

from treegrpo.storage.atomic import sync_path


class WritableFile(Protocol):
    """A file being written, from its beginning on."""

    def write(self, data: bytes) -> None:
        """Append all of ``data``. After an OSError a part of it may be there."""
        ...

    def sync(self) -> None:
        """Return when what was written is on the disk. After an OSError nobody knows what of it is."""
        ...

    def truncate(self, size: int) -> None: ...

    def close(self) -> None: ...


class FileSystem(Protocol):
    """Every call may raise OSError."""

    def create(self, path: Path) -> WritableFile:
        """An empty file to write; what was there before is gone."""
        ...

    def open(self, path: Path) -> BinaryIO:
        """A file to read."""
        ...

    def sync(self, path: Path) -> None:
        """Return when what is in a file is on the disk, whoever wrote it."""
        ...

    def reserve(self, path: Path, size: int) -> None:
        """A file that takes so many bytes, whatever is in it; one that is there stays."""
        ...

    def free(self, folder: Path) -> int:
        """Bytes that can still be written there."""
        ...

    def names(self, folder: Path) -> list[str]:
        """What is in a folder, sorted; nothing if there is no such folder."""
        ...

    def make_folder(self, path: Path) -> None:
        """With its parents, unless it is there; its name is on the disk then."""
        ...

    def rename(self, old: Path, new: Path) -> None: ...

    def remove(self, path: Path) -> None:
        """A file or an empty folder."""
        ...

    def sync_folder(self, path: Path) -> None:
        """Return when the names in a folder are on the disk."""
        ...


class _LocalFile:
    def __init__(self, path: Path) -> None:
        self._handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND | os.O_CLOEXEC, 0o644)

    def write(self, data: bytes) -> None:
        rest = memoryview(data)
        while rest:
            rest = rest[os.write(self._handle, rest) :]

    def sync(self) -> None:
        os.fsync(self._handle)

    def truncate(self, size: int) -> None:
        os.ftruncate(self._handle, size)

    def close(self) -> None:
        os.close(self._handle)


class LocalFileSystem:
    """The file system."""

    def create(self, path: Path) -> WritableFile:
        return _LocalFile(path)

    def open(self, path: Path) -> BinaryIO:
        return path.open("rb")

    def sync(self, path: Path) -> None:
        sync_path(path)

    def reserve(self, path: Path, size: int) -> None:
        handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            os.posix_fallocate(handle, 0, size)
        finally:
            os.close(handle)

    def free(self, folder: Path) -> int:
        return shutil.disk_usage(folder).free

    def names(self, folder: Path) -> list[str]:
        return sorted(entry.name for entry in folder.iterdir()) if folder.exists() else []

    def make_folder(self, path: Path) -> None:
        if not path.is_dir():
            self.make_folder(path.parent)
            path.mkdir(exist_ok=True)
            self.sync_folder(path.parent)

    def rename(self, old: Path, new: Path) -> None:
        old.rename(new)

    def remove(self, path: Path) -> None:
        path.rmdir() if path.is_dir() and not path.is_symlink() else path.unlink()

    def sync_folder(self, path: Path) -> None:
        sync_path(path)
