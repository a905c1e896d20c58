"""Temporary directories that are locked while in use; those that a killed process has left are removed by the next one."""

from __future__ import annotations

import fcntl
import logging
import os
import shutil
import socket
import tempfile
from collections.abc import Generator
from contextlib import contextmanager, suppress
from pathlib import Path

from treegrpo.errors import ConfigError

log = logging.getLogger(__name__)


def _kernel() -> str:
    """Which running system this is. A directory's lock is known to it alone: on a file system that several machines share,
    one does not see that another holds it.
    """
    with suppress(OSError):
        return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii")[:8]
    return socket.gethostname()


PREFIX = f"treegrpo-sampler-{_kernel()}-"


@contextmanager
def locked_temp_dir(parent: Path | None = None) -> Generator[Path]:
    """Create an empty directory in ``parent``, or in the system's temporary directory, for the time of the block.

    It is locked meanwhile. The kernel unlocks it when its process ends, and other processes remove unlocked ones:
    on one machine, until it is started anew, there are never more of them than samplers that run, and those that ended
    since the last start.

    Raises:
        ConfigError: it cannot be made there.
    """
    parent = parent or Path(tempfile.gettempdir())
    _sweep(parent)
    path, lock = _make(parent)
    try:
        yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)
        os.close(lock)


def _make(parent: Path) -> tuple[Path, int]:
    while True:
        try:
            path = Path(tempfile.mkdtemp(prefix=PREFIX, dir=parent))
        except OSError as error:
            raise ConfigError(
                f"{parent} cannot be written to ({error.strerror}), where policy versions are put; name another directory: "
                "engine.weights_dir for SGLang, the variable TMPDIR for all else."
            ) from error
        if (lock := _lock(path)) is not None:
            if path.exists():
                return path, lock
            os.close(lock)  # another sampler that starts took it for a dead one's, before it was locked


def _sweep(parent: Path) -> None:
    """Remove the directories of samplers that were killed."""
    for path in parent.glob(f"{PREFIX}*"):
        with suppress(OSError):  # another user's, or removed meanwhile
            if path.lstat().st_uid == os.geteuid() and (lock := _lock(path)) is not None:
                shutil.rmtree(path, ignore_errors=True)
                os.close(lock)
                log.info("removed %s, which a killed sampler has left", path)


def _lock(path: Path) -> int | None:
    """A descriptor that holds the directory's lock; None if another process does, or the directory is gone."""
    with suppress(FileNotFoundError):
        lock = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(lock)
        else:
            return lock
    return None
