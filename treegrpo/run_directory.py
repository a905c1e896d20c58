"""The run's directory holds questions, weights and logs: its owner alone reads it."""

from __future__ import annotations

from pathlib import Path

PRIVATE = 0o700


def make_run_dir(path: Path) -> None:
    """Make ``path`` for this user alone. One that is there keeps the rights that somebody has given it. Raises OSError."""
    path.mkdir(parents=True, exist_ok=True, mode=PRIVATE)
