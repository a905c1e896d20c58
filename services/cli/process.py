"""One program of a run as a child process: how it is started, and what it said when it ended."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from treegrpo.child import ChildProcess
from treegrpo.edge import ERROR_MARK
from treegrpo.process_environment import child_environment, python


@dataclass(frozen=True, slots=True)
class Program:
    """What to run: a name for people and a module for `python -m`."""

    name: str
    module: str
    flags: tuple[str, ...] = ()
    """Flags of this process alone, after those all have."""


class Child(ChildProcess):
    """A part of a run."""

    killed_seconds = 10.0

    @classmethod
    async def start(cls, program: Program, arguments: Sequence[str], logs: Path) -> Self:
        """Start ``program`` with the arguments all have and its own; output is appended to ``logs``/NAME.log."""
        command = python(program.module, *arguments, *program.flags)
        environment = child_environment({"OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"})
        return await cls.spawn(program.name, command, environment, logs / f"{program.name}.log")

    def last_words(self) -> str:
        """The sentence the process ended with, or the last line of its log. Of several ranks' the first is the cause."""
        lines = self.said()
        if not lines:
            return "it said nothing"
        return next((line.removeprefix(ERROR_MARK) for line in lines if line.startswith(ERROR_MARK)), lines[-1])

    def obituary(self) -> str:
        """One sentence: what ended, how, what it said last, where to read more."""
        how = f"with code {self.code}" if (self.code or 0) >= 0 else f"by signal {-(self.code or 0)}"
        return f"The {self.name} ended {how}: {self.last_words()} (log: {self.log})"
