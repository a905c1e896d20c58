"""Directories that are there completely or not at all, also on a disk that is full."""

from __future__ import annotations

import errno
import os
import re
import shutil
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

from torch.distributed.checkpoint.api import CheckpointException

from treegrpo.errors import DiskError

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
    """
    partial, old = (target.with_name(f".{target.name}.{kind}") for kind in ("partial", "old"))
    with on_disk(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(partial, ignore_errors=True)
        try:
            partial.mkdir()
            yield partial
            for file in [*partial.rglob("*"), partial]:
                _sync(file)
            shutil.rmtree(old, ignore_errors=True)
            if target.exists():
                target.rename(old)
            partial.rename(target)
        except BaseException:
            if old.exists() and not target.exists():
                old.rename(target)
            shutil.rmtree(partial, ignore_errors=True)  # gives back the room now
            raise
        _sync(target.parent)
        shutil.rmtree(old, ignore_errors=True)


@contextmanager
def on_disk(target: Path) -> Generator[None]:
    """Raise DiskError for whatever a disk that is full or fails raises in the block, where ``target`` is written.

    The sentence names what is being written, not the sibling it is written into.
    """
    try:
        yield
    except DiskError:
        raise
    except (Exception, CheckpointException) as error:
        cause = _system_error(error)
        if cause is None or cause.errno not in PASSING:
            raise
        named = target.with_name(target.name.removeprefix(".").removesuffix(".partial"))
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
