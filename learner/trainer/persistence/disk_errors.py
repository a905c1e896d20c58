"""Disk errors: finds the system's error behind the exceptions of torch and safetensors, and raises DiskError for it."""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

from torch.distributed.checkpoint.api import CheckpointException

from treegrpo.errors import DiskError, RunFileError

TRANSIENT = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.ESTALE, errno.ETIMEDOUT})
"""Errors after which a write may succeed later: the disk or a quota is full, it failed, a network drive was unavailable.
Anything else, like a directory without write permission, is permanent and not retried."""
_FROM_RUST = re.compile(r"\(os error (\d+)\)")
"""safetensors reports system errors as text."""
_HALF_WRITTEN = "unexpected pos"
"""What torch's writer raises when it closes a file after a failed write; from another rank it comes without its cause."""


@contextmanager
def translate_disk_errors(target: Path) -> Generator[None]:
    """Raise DiskError for a transient system error in the block, where ``target`` is written, and RunFileError for others.

    The message names what is being written, not the partial sibling that it is written into.
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
        if cause.errno not in TRANSIENT:
            reason = cause.strerror or cause
            raise RunFileError(f"{named} could not be written ({reason}); check the path and its permissions.") from error
        raise DiskError(cause.errno, f"{named} could not be written ({cause.strerror}); free space on its disk.") from error


def _system_error(error: BaseException) -> OSError | None:
    """The OSError behind ``error``, which a library may have wrapped or turned into text."""
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
