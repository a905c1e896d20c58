"""Directories that are there completely or not at all, also on a disk that is full."""

from __future__ import annotations

import errno
import os
import re
import shutil
from collections.abc import Generator
from contextlib import contextmanager, suppress
from pathlib import Path

from torch.distributed.checkpoint.api import CheckpointException

from treegrpo.errors import DiskError, RunFileError

PASSING = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.ESTALE, errno.ETIMEDOUT})
"""What a disk says that may take the same later: it or a quota is full, it failed, a network drive was away. Anything else,
like a directory that may not be written to, stays as it is and is not waited for."""
_FROM_RUST = re.compile(r"\(os error (\d+)\)")
"""safetensors reports the system's errors in words."""
_HALF_WRITTEN = "unexpected pos"
"""What torch's writer says when it closes a file of which a write has failed; from another rank it comes without its cause."""


@contextmanager
def whole(target: Path) -> Generator[Path]:
    """Yield an empty sibling of ``target`` to write into; it takes the place of ``target`` when the block ends well.

    Its files are on the disk before it gets its name. What a crash leaves behind has a name that begins with a dot,
    is never read, and is removed by the next attempt. When the block raises, ``target`` is as it was and nothing is left.

    Raises:
        DiskError: the disk is full or fails for now.
        RunFileError: something is in the way that stays.
    """
    partial, old = (target.with_name(f".{target.name}.{kind}") for kind in ("partial", "old"))
    with on_disk(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        discard(partial)
        try:
            partial.mkdir()
            yield partial
            for file in [*partial.rglob("*"), partial]:
                _sync(file)
            discard(old)
            if os.path.lexists(target):
                target.rename(old)
            partial.rename(target)
        except BaseException:
            if os.path.lexists(old) and not os.path.lexists(target):
                old.rename(target)
            discard(partial)  # gives back the room now
            raise
        _sync(target.parent)
        discard(old)


def discard(path: Path) -> None:
    """Remove a directory with all that is in it, or whatever stands in its place; what cannot be removed stays."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with suppress(OSError):
            path.unlink(missing_ok=True)


@contextmanager
def on_disk(target: Path) -> Generator[None]:
    """Raise DiskError for whatever a disk that is full or fails raises in the block, where ``target`` is written.

    The sentence names what is being written, not the sibling it is written into. RunFileError is raised for what else the
    system says.
    """
    try:
        yield
    except (DiskError, RunFileError):
        raise
    except (Exception, CheckpointException) as error:
        cause = _system_error(error)
        if cause is None:
            raise
        named = target.with_name(target.name.removeprefix(".").removesuffix(".partial"))
        if cause.errno not in PASSING:
            said = cause.strerror or cause
            raise RunFileError(
                f"{named} could not be written ({said}); see what is in the way, and who may write there."
            ) from error
        raise DiskError(cause.errno, f"{named} could not be written ({cause.strerror}); make room on its disk.") from error


def _system_error(error: BaseException) -> OSError | None:
    """What the operating system said, whichever library has put it into its own words."""
    if isinstance(error, CheckpointException):  # of any rank; the same on all of them
        found = (_system_error(failure) for failure, _ in error.failures.values())
        return next((cause for cause in found if cause is not None), None)
    if isinstance(error, OSError):
        return error
    if match := _FROM_RUST.search(str(error)):
        number = int(match[1])
        return OSError(number, os.strerror(number))
    before = error.__cause__ or error.__context__
    if before is not None and (cause := _system_error(before)) is not None:
        return cause
    if _HALF_WRITTEN in str(error):
        return OSError(errno.EIO, "its file was cut short")
    return None


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
