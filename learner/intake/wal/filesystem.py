"""The file system calls of journal and snapshots, whose order decides what survives a crash.

Tests pass one in memory that crashes or refuses at any of these calls.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import BinaryIO, Protocol

from treegrpo.storage.atomic import sync_path


class WritableFile(Protocol):
    """A file that is written from its beginning on."""

    def append_bytes(self, data: bytes) -> None:
        """Append all of ``data``. After an OSError a part of it may be there."""
        ...

    def flush_to_disk(self) -> None:
        """Call fsync: return when what was written is on the disk. After an OSError any part of it may be."""
        ...

    def truncate_to(self, size: int) -> None: ...

    def close_file(self) -> None: ...


class FileSystem(Protocol):
    """Every call may raise OSError."""

    def create_file(self, path: Path) -> WritableFile:
        """Create an empty file to write; an existing one is replaced."""
        ...

    def open_file(self, path: Path) -> BinaryIO:
        """Open a file to read."""
        ...

    def sync_file(self, path: Path) -> None:
        """Call fsync on a file that any process may have written."""
        ...

    def preallocate(self, path: Path, size: int) -> None:
        """Make a file that takes ``size`` bytes of the disk; an existing one stays."""
        ...

    def free_bytes(self, folder: Path) -> int:
        """Bytes that can still be written to the disk of ``folder``."""
        ...

    def list_names(self, folder: Path) -> list[str]:
        """The names in a folder, sorted; none if there is no such folder."""
        ...

    def make_directory(self, path: Path) -> None:
        """Create a folder with its parents, durably, unless it is there."""
        ...

    def rename_path(self, old: Path, new: Path) -> None: ...

    def remove_path(self, path: Path) -> None:
        """Remove a file or an empty folder."""
        ...

    def sync_directory(self, path: Path) -> None:
        """Call fsync on a folder: return when its names are on the disk."""
        ...


class _LocalFile:
    def __init__(self, path: Path) -> None:
        self._handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND | os.O_CLOEXEC, 0o644)

    def append_bytes(self, data: bytes) -> None:
        rest = memoryview(data)
        while rest:
            rest = rest[os.write(self._handle, rest) :]

    def flush_to_disk(self) -> None:
        os.fsync(self._handle)

    def truncate_to(self, size: int) -> None:
        os.ftruncate(self._handle, size)

    def close_file(self) -> None:
        os.close(self._handle)


class LocalFileSystem:
    """The file system of this machine."""

    def create_file(self, path: Path) -> WritableFile:
        return _LocalFile(path)

    def open_file(self, path: Path) -> BinaryIO:
        return path.open("rb")

    def sync_file(self, path: Path) -> None:
        sync_path(path)

    def preallocate(self, path: Path, size: int) -> None:
        handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            os.posix_fallocate(handle, 0, size)
        finally:
            os.close(handle)

    def free_bytes(self, folder: Path) -> int:
        return shutil.disk_usage(folder).free

    def list_names(self, folder: Path) -> list[str]:
        return sorted(entry.name for entry in folder.iterdir()) if folder.exists() else []

    def make_directory(self, path: Path) -> None:
        if not path.is_dir():
            self.make_directory(path.parent)
            path.mkdir(exist_ok=True)
            self.sync_directory(path.parent)

    def rename_path(self, old: Path, new: Path) -> None:
        old.rename(new)

    def remove_path(self, path: Path) -> None:
        path.rmdir() if path.is_dir() and not path.is_symlink() else path.unlink()

    def sync_directory(self, path: Path) -> None:
        sync_path(path)
