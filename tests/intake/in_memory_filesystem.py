"""A disk in memory that knows what it has been made to keep, crashes at a chosen call, and refuses for a while.

What a crash leaves is harsher than most file systems: of what was not synced, any part of the bytes and any of the
changes of names may be there.
"""

from __future__ import annotations

import errno
import io
import random
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO


class CrashError(Exception):
    """The machine stopped. Nothing in the project catches it."""


@dataclass(eq=False)
class InMemoryInode:
    data: bytearray = field(default_factory=bytearray)
    durable: bytes = b""
    reserved: int = 0
    """Bytes that it takes beside its data."""
    failed: bool = False
    """An fsync failed: the kernel calls what it could not write clean, so a later one would say yes and keep nothing."""


class InMemoryFileSystem:
    def __init__(self) -> None:
        self.files: dict[Path, InMemoryInode] = {}
        self.kept_files: dict[Path, InMemoryInode] = {}
        self.folders: set[Path] = {Path("/")}
        self.log: list[str] = []
        """The calls so far."""
        self.crash_at: int | None = None
        self.size = 1 << 30
        """Bytes that it takes."""
        self.partial = 0.0
        """Share of the bytes of a write that a crash or a refusal lets through."""
        self.full: dict[str, int] = {}
        """By call, how often it is still refused."""
        self.crashed = False

    # ---- what goes wrong

    def call(self, name: str) -> None:
        if self.crashed:
            raise CrashError
        self.log.append(name)
        if len(self.log) == self.crash_at:
            self.crashed = True
            raise CrashError
        if self.full.get(name, 0) > 0:
            self.full[name] -= 1
            raise OSError(errno.EIO if name == "sync" else errno.ENOSPC, "No space left on device")

    def after_crash(self, kept: float = 0.0, *, names: str = "lost", zeros: bool = False, seed: int = 0) -> InMemoryFileSystem:
        """The disk as the next start finds it.

        Args:
            kept: share of each file's unsynced bytes that is there.
            names: what is there of unsynced new, moved and removed names: "lost", "kept" or "some".
            zeros: the unsynced bytes' room is there, but zeros stand in it.
            seed: picks which of the names, when some.
        """
        left, pick = InMemoryFileSystem(), random.Random(seed)
        left.folders = set(self.folders)
        for path in sorted({*self.files, *self.kept_files}):
            volatile = names == "kept" or (names == "some" and pick.random() < 0.5)
            inode = (self.files if volatile else self.kept_files).get(path)
            if inode is not None:
                left.files[path] = left.kept_files[path] = _survivor(inode, kept, zeros)
                left.folders |= set(path.parents)
        return left

    def after_kill(self) -> InMemoryFileSystem:
        """The same disk as the next process finds it: all that was written, durable or not."""
        left = InMemoryFileSystem()
        left.folders, left.kept_files = set(self.folders), dict(self.kept_files)
        again = {inode: InMemoryInode(bytearray(inode.data), inode.durable, inode.failed) for inode in self.files.values()}
        left.files = {path: again[inode] for path, inode in self.files.items()}
        left.kept_files = {path: again.get(inode, inode) for path, inode in self.kept_files.items()}
        return left

    # ---- Disk

    def sync_file(self, path: Path) -> None:
        InMemoryFile(self, self.files[path]).flush_to_disk()

    def create_file(self, path: Path) -> InMemoryFile:
        self.call("create")
        if path.parent not in self.folders:
            raise FileNotFoundError(errno.ENOENT, "No such folder", str(path.parent))
        if path not in self.files:
            self.files[path] = InMemoryInode()
        self.files[path].data.clear()
        return InMemoryFile(self, self.files[path])

    def open_file(self, path: Path) -> BinaryIO:
        if path not in self.files:
            raise FileNotFoundError(errno.ENOENT, "No such file", str(path))
        return io.BytesIO(self.files[path].data)

    def free_bytes(self, folder: Path) -> int:
        return self.size - sum(len(inode.data) + inode.reserved for inode in self.files.values())

    def preallocate(self, path: Path, size: int) -> None:
        self.call("reserve")
        self.take(size)
        self.files[path] = InMemoryInode(reserved=size)

    def take(self, size: int) -> None:
        """Raises OSError if there is no room for so many bytes more."""
        if self.free_bytes(Path("/")) < size:
            raise OSError(errno.ENOSPC, "No space left on device")

    def list_names(self, folder: Path) -> list[str]:
        return sorted({path.name for path in (*self.files, *self.folders) if path.parent == folder != path})

    def make_directory(self, path: Path) -> None:
        self.call("make_folder")
        self.folders |= {path, *path.parents}

    def rename_path(self, old: Path, new: Path) -> None:
        self.call("rename")
        if old in self.folders:
            if any(path.parent == new for path in self.files):
                raise OSError(errno.ENOTEMPTY, "Directory not empty", str(new))
            self.folders = {new / path.relative_to(old) if path.is_relative_to(old) else path for path in self.folders}
        for path in [path for path in self.files if path.is_relative_to(old)]:
            self.files[new / path.relative_to(old)] = self.files.pop(path)

    def remove_path(self, path: Path) -> None:
        self.call("remove")
        if path in self.folders:
            if self.list_names(path):
                raise OSError(errno.ENOTEMPTY, "Directory not empty", str(path))
            self.folders.remove(path)
        else:
            del self.files[path]

    def sync_directory(self, path: Path) -> None:
        """Of a folder that moved, also where it was: one journal holds both names."""
        self.call("sync_folder")
        self.kept_files = {
            **{p: inode for p, inode in self.kept_files.items() if not self._within(p, path)},
            **{p: inode for p, inode in self.files.items() if self._within(p, path) and self._named(p, path)},
        }

    def _within(self, file: Path, folder: Path) -> bool:
        return file.is_relative_to(folder)

    def _named(self, file: Path, folder: Path) -> bool:
        """Its name is in ``folder`` itself, or in a folder there where its name was durable under any name before."""
        return file.parent == folder or any(inode is self.files[file] for inode in self.kept_files.values())


class InMemoryFile:
    def __init__(self, disk: InMemoryFileSystem, inode: InMemoryInode) -> None:
        self._disk = disk
        self._inode = inode

    def append_bytes(self, data: bytes) -> None:
        try:
            self._disk.call("write")
        except (CrashError, OSError):
            self._inode.data += data[: int(len(data) * self._disk.partial)]
            raise
        self._disk.take(len(data))
        self._inode.data += data

    def flush_to_disk(self) -> None:
        try:
            self._disk.call("sync")
        except OSError:
            self._inode.failed = True
            raise
        if not self._inode.failed:
            self._inode.durable = bytes(self._inode.data)

    def truncate_to(self, size: int) -> None:
        self._disk.call("truncate")
        del self._inode.data[size:]

    def close_file(self) -> None:
        pass


def _survivor(inode: InMemoryInode, kept: float, zeros: bool) -> InMemoryInode:
    """Durable bytes, and of a longer file the share ``kept`` of what is behind them."""
    data, durable = bytes(inode.data), inode.durable
    if not data.startswith(durable):  # cut back and not synced since
        return InMemoryInode(bytearray(durable), durable)
    extra = data[len(durable) : len(durable) + round((len(data) - len(durable)) * kept)]
    whole = durable + (bytes(len(extra)) if zeros else extra)
    return InMemoryInode(bytearray(whole), whole)
