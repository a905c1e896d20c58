"""Atomic writes: a file or directory is there completely or not at all, also after a crash of the machine.

    write_atomically    .NAME.partial ─► fsync ─► rename ─► fsync of the directory
    replace_directory   the same for a directory and every file in it

A directory cannot be renamed over another: between two renames the one before is .NAME.old, and a crash at that moment leaves
no NAME. A failed write leaves nothing. What a crash leaves behind has a name that begins with a dot, is never read, and is
removed by the next write of the same name, or by `remove_partial_files`.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Generator, Iterable
from contextlib import contextmanager, suppress
from pathlib import Path

OWNER_ONLY = 0o600
"""The mode of a file with a secret."""


def partial_path(target: Path) -> Path:
    """Where the next content of ``target`` is written."""
    return target.with_name(f".{target.name}.partial")


def sync_path(path: Path) -> None:
    """Flush a file, or the names in a directory, to the disk. Raises OSError."""
    handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_atomically(path: Path, data: bytes, mode: int = 0o666) -> None:
    """Replace the file ``path`` by one with ``data``; ``mode`` less the umask is that of the new file.

    Raises OSError: ``path`` is as it was, or, if only the last flush of its directory failed, new and perhaps lost in a crash.
    """
    partial = partial_path(path)
    partial.unlink(missing_ok=True)
    try:
        with os.fdopen(os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, mode), "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except BaseException:
        with suppress(OSError):
            partial.unlink(missing_ok=True)
        raise
    sync_path(path.parent)


def remove_partial_files(folder: Path, names: Iterable[str]) -> None:
    """Remove what crashes during `write_atomically` have left of files in ``folder``.

    ``names`` are the names of the files, or glob patterns. No process may be writing there. Raises OSError.
    """
    for name in names:
        for partial in folder.glob(partial_path(Path(name)).name):
            if partial.is_file():
                partial.unlink(missing_ok=True)


@contextmanager
def replace_directory(target: Path) -> Generator[Path]:
    """Yield an empty sibling of ``target`` to write into; it takes the place of ``target`` when the block ends well.

    When the block raises, ``target`` is as it was and nothing else is left. Raises OSError.
    """
    partial, old = partial_path(target), target.with_name(f".{target.name}.old")
    target.parent.mkdir(parents=True, exist_ok=True)
    remove_tree(partial)
    try:
        partial.mkdir()
        yield partial
        for path in [*partial.rglob("*"), partial]:
            sync_path(path)
        remove_tree(old)
        if os.path.lexists(target):
            target.rename(old)
        partial.rename(target)
    except BaseException:
        if os.path.lexists(old) and not os.path.lexists(target):
            old.rename(target)
        remove_tree(partial)  # gives back the room now
        raise
    sync_path(target.parent)
    remove_tree(old)


def remove_tree(path: Path) -> None:
    """Remove a directory tree, or a file at ``path``; errors are ignored."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with suppress(OSError):
            path.unlink(missing_ok=True)
