"""One intake for a run: whoever comes second is refused before it reads or writes anything of it."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

from treegrpo.errors import AddressInUseError

LOCK = "intake.lock"
"""A file in the run's directory. The kernel unlocks it however its process ends."""


@contextmanager
def only_intake(run_dir: Path) -> Generator[None]:
    """Hold the run for the time of the block. Raises AddressInUseError: another intake holds it."""
    handle = os.open(run_dir / LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(handle)
        raise AddressInUseError(
            f"Another intake works on the run in {run_dir}; stop it, or set run.dir to another directory."
        ) from None
    try:
        yield
    finally:
        os.close(handle)
