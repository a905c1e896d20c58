"""One holder at a time: whoever comes second is refused."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

from treegrpo.errors import AddressInUseError


@contextmanager
def locked(path: Path, refusal: str) -> Generator[None]:
    """Hold the file ``path`` for the time of the block. The kernel lets go of it however this process ends.

    Raises:
        AddressInUseError: another holds it; ``refusal`` is the sentence.
    """
    handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(handle)
        raise AddressInUseError(refusal) from None
    try:
        yield
    finally:
        os.close(handle)
