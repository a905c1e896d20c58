"""File lock: one process holds it at a time, the next one is refused."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

from treegrpo.errors import AddressInUseError
from treegrpo.storage.run_files import unusable_file_error


@contextmanager
def hold_file_lock(path: Path, refusal: str) -> Generator[None]:
    """Hold the file ``path`` for the time of the block. The kernel lets go of it however this process ends.

    Raises:
        AddressInUseError: another holds it; ``refusal`` is the sentence.
        RunFileError: there is no file to be held, and none can be made.
    """
    try:
        handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    except OSError as error:
        raise unusable_file_error(path, error) from error
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        os.close(handle)
        if isinstance(error, BlockingIOError):
            raise AddressInUseError(refusal) from None
        raise unusable_file_error(path, error) from error  # a file system without locks
    try:
        yield
    finally:
        os.close(handle)
