"""One child process: started on a leash, its output in a log file, its last words at hand."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from treegrpo.edge import ERROR_MARK
from treegrpo.leash import leashed

TAIL_BYTES = 16384
KILLED_SECONDS = 10.0
"""To wait for a process that was killed; one that a device holds may take for ever."""


@dataclass(frozen=True, slots=True)
class Program:
    """What to run: a name for people and a module for `python -m`."""

    name: str
    module: str
    flags: tuple[str, ...] = ()
    """Flags of this process alone, after those all have."""


class Child:
    """A running program. Its own session, so a terminal's Ctrl-C reaches only the command, which then decides."""

    def __init__(self, program: Program, process: asyncio.subprocess.Process, log: Path, offset: int) -> None:
        self.program = program
        self.log = log
        self._process = process
        self._offset = offset
        self.ended = asyncio.create_task(process.wait(), name=f"end-of-{program.name}")

    @classmethod
    async def start(cls, program: Program, arguments: Sequence[str], logs: Path) -> Self:
        """Start ``program`` with the arguments all have and its own; output is appended to ``logs``/NAME.log."""
        command = [sys.executable, "-m", program.module, *arguments, *program.flags]
        path = logs / f"{program.name}.log"
        with path.open("ab") as log:
            process = await asyncio.create_subprocess_exec(
                *leashed(command),
                stdin=asyncio.subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
                env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"},
            )
            return cls(program, process, path, log.tell())

    @property
    def name(self) -> str:
        return self.program.name

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def code(self) -> int | None:
        """The exit code; negative after a signal, None while it runs."""
        return self._process.returncode

    async def stop(self, grace: float, at_once: asyncio.Event | None = None) -> None:
        """Ask it to end; kill it after ``grace`` seconds, or as soon as ``at_once`` is set."""
        hurry = asyncio.create_task((at_once or asyncio.Event()).wait(), name=f"hurry-{self.name}")
        for wish, patience, cut_short in ((signal.SIGTERM, grace, {hurry}), (signal.SIGKILL, KILLED_SECONDS, set[Any]())):
            if self.ended.done():
                break
            with suppress(ProcessLookupError):
                os.killpg(self.pid, wish)
            await asyncio.wait({self.ended, *cut_short}, timeout=patience, return_when=asyncio.FIRST_COMPLETED)
        hurry.cancel()

    def last_words(self) -> str:
        """The sentence the process ended with, or the last line of its log. Of several ranks' the first is the cause."""
        with self.log.open("rb") as log:
            size = log.seek(0, os.SEEK_END)
            log.seek(max(self._offset, size - TAIL_BYTES))
            lines = [line for line in log.read().decode(errors="replace").splitlines() if line.strip()]
        if not lines:
            return "it said nothing"
        return next((line.removeprefix(ERROR_MARK) for line in lines if line.startswith(ERROR_MARK)), lines[-1])

    def obituary(self) -> str:
        """One sentence: what ended, how, what it said last, where to read more."""
        how = f"with code {self.code}" if (self.code or 0) >= 0 else f"by signal {-(self.code or 0)}"
        return f"The {self.name} ended {how}: {self.last_words()} (log: {self.log})"
