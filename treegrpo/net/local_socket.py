"""The path of the Unix socket on which the intake of a run serves its trainer."""

from __future__ import annotations

import hashlib
import tempfile
from pathlib import Path

MAX_SOCKET_PATH = 100
"""Bytes a Unix socket's path may have on every platform."""


def socket_path(run_dir: Path) -> str:
    """The path of the intake's socket: in the run's directory, or in the temporary one if that path is too long."""
    path = str(run_dir.absolute() / "intake.sock")
    if len(path.encode()) <= MAX_SOCKET_PATH:
        return path
    return f"{tempfile.gettempdir()}/treegrpo-{hashlib.sha256(path.encode()).hexdigest()[:16]}.sock"
