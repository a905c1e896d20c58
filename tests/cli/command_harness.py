"""Runs the `treegrpo` command, and finds the processes that it leaves behind."""

from __future__ import annotations

import os
import subprocess
import sys
import uuid
from dataclasses import dataclass
from pathlib import Path

MARK = "MARK_OF_THE_TEST"
SECONDS = 60.0


@dataclass(frozen=True)
class CommandResult:
    code: int
    out: str
    error: str
    left: list[int]
    """Processes it started that still run."""

    @property
    def sentence(self) -> str:
        """The only error line; fails when there are more, or a traceback."""
        assert "Traceback" not in self.error, self.error
        (line,) = [line for line in self.error.splitlines() if line.startswith("error: ")]
        return line.removeprefix("error: ")


def marked_processes(mark: str) -> list[int]:
    """The running processes that inherited ``mark``."""
    found: list[int] = []
    for entry in Path("/proc").iterdir():
        try:
            if entry.name.isdecimal() and f"{MARK}={mark}".encode() in (entry / "environ").read_bytes():
                found.append(int(entry.name))
        except OSError:  # it ended, or is not ours
            continue
    return found


def marked_environment(mark: str) -> dict[str, str]:
    return {**os.environ, MARK: mark, "OMP_NUM_THREADS": "1"}


def treegrpo(*arguments: str) -> CommandResult:
    """Run the command to its end."""
    mark = uuid.uuid4().hex
    command = [sys.executable, "-m", "services.cli.main", *arguments]
    done = subprocess.run(
        command,
        env=marked_environment(mark),
        capture_output=True,
        text=True,
        timeout=SECONDS,
        check=False,
        stdin=subprocess.DEVNULL,
    )
    return CommandResult(done.returncode, done.stdout, done.stderr, marked_processes(mark))
