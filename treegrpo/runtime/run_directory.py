"""Run directory: creates it, and checks that files can be written, locked and listened on in it; the checks leave nothing."""

from __future__ import annotations

import errno
import fcntl
import os
import socket
import tempfile
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

from treegrpo.errors import ConfigError
from treegrpo.net.local_socket import MAX_SOCKET_PATH, socket_path

PRIVATE = 0o700
"""Questions, weights and logs are for their owner alone."""
PROBE_BYTES = 64 << 10
"""Written and flushed to see whether there is room at all."""


def check_run_directory(run_dir: Path, key: str = "run.dir") -> None:
    """Check that a run can begin or continue in ``run_dir``, which need not exist yet. Raises ConfigError."""
    there = check_writable(run_dir, key)
    _tried(_lock, there, f"{key} = {run_dir} is on a file system without file locks")
    path = Path(socket_path(run_dir))
    if len(str(path).encode()) > MAX_SOCKET_PATH:
        raise ConfigError(
            f"{key} = {run_dir} is too long for the run's socket, and so is the directory for temporary files; set TMPDIR to "
            f"one of at most {MAX_SOCKET_PATH - 32} bytes."
        )
    where = there if path.is_relative_to(run_dir.absolute()) else path.parent
    _tried(_listen, where, f"{key} = {run_dir}: no socket can be made in {where}")


def check_writable(folder: Path, key: str) -> Path:
    """Check that a file can be written in ``folder`` or its nearest existing parent, and return that. Raises ConfigError."""
    try:
        there = _nearest(folder.absolute())
    except OSError as error:
        raise ConfigError(f"{key} = {folder} cannot be made ({error.strerror}); choose another directory.") from error
    if there.is_symlink() and not there.exists():
        raise ConfigError(f"{key} = {folder} leads to the link {there}, whose target does not exist; fix it or choose another.")
    if not there.is_dir():
        what = "is a file" if there == folder.absolute() else f"lies below {there}, which is a file"
        raise ConfigError(f"{key} = {folder} {what}; give a directory.")
    _tried(_write, there, f"{key} = {folder} cannot be written to")
    return there


def _nearest(path: Path) -> Path:
    """``path``, or its nearest existing parent. Raises OSError: a name is too long, or a directory cannot be read."""
    for place in (path, *path.parents):
        try:
            place.lstat()
        except (FileNotFoundError, NotADirectoryError):
            continue
        return place
    return Path(path.anchor)


def _tried(probe: Callable[[Path], None], folder: Path, sentence: str) -> None:
    try:
        probe(folder)
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        remedy = "free space there, or choose another directory" if full else "choose another directory"
        raise ConfigError(f"{sentence} ({error.strerror or error}); {remedy}.") from error


def _write(folder: Path) -> None:
    with tempfile.TemporaryFile(dir=folder) as file:
        file.write(bytes(PROBE_BYTES))
        file.flush()
        os.fsync(file.fileno())


def _lock(folder: Path) -> None:
    with tempfile.TemporaryFile(dir=folder) as file:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)


def _listen(folder: Path) -> None:
    """Bind a probe socket by its name relative to ``folder``, since its full path may be too long for a socket."""
    with tempfile.TemporaryDirectory(dir=folder, prefix=".probe-") as name:
        place = os.open(name, os.O_RDONLY | os.O_DIRECTORY)
        try:
            with closing(socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)) as listener:
                listener.bind(f"/proc/self/fd/{place}/s")
        finally:
            os.close(place)


def make_run_directory(path: Path) -> None:
    """Create ``path`` with access for this user only. An existing directory keeps its mode. Raises OSError."""
    path.mkdir(parents=True, exist_ok=True, mode=PRIVATE)
