"""The run lock: a second intake for the same run is refused before it reads or writes anything of it."""

from __future__ import annotations

from contextlib import AbstractContextManager
from pathlib import Path

from treegrpo.storage.file_lock import hold_file_lock

LOCK = "intake.lock"
"""A file in the run's directory."""


def lock_run(run_dir: Path) -> AbstractContextManager[None]:
    """Hold the run for the time of the block. Raises AddressInUseError: another intake holds it."""
    sentence = f"Another intake works on the run in {run_dir}; stop it, or set run.dir to another directory."
    return hold_file_lock(run_dir / LOCK, sentence)
