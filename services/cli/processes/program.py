"""One program of a run as a child process: how it is started, and why it ended."""

from __future__ import annotations

import signal
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from treegrpo.runtime.child_process import ChildProcess
from treegrpo.runtime.exit_report import ExitReport, ExitReports, decisive_report
from treegrpo.runtime.process_environment import child_environment, python_command


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
    reports: ExitReports

    @classmethod
    async def start(cls, program: Program, arguments: Sequence[str], logs: Path) -> Self:
        """Start ``program`` with the arguments all have and its own; output is appended to ``logs``/NAME.log."""
        command = python_command(program.module, *arguments, *program.flags)
        reports = ExitReports()
        environment = child_environment({**reports.environment, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"})
        child = await cls.spawn(program.name, command, environment, logs / f"{program.name}.log")
        child.reports = reports
        return child

    @property
    def report(self) -> ExitReport | None:
        """Why it ends, in its own words; None while it has said nothing."""
        return decisive_report(self.reports.read())

    def obituary(self) -> str:
        """One sentence: what ended, how, why, where to read more."""
        code, report = self.code or 0, self.report
        how = f"ended with code {code}" if code >= 0 else f"was killed by signal {-code} ({_signal_name(-code)})"
        why = f": {report.sentence}" if report else f"; {self._last_line()}"
        return f"The {self.name} {how}{why} (log: {self.log})"

    def _last_line(self) -> str:
        """What stands in for the reason of a process that had no time to give one."""
        memory = "if nobody sent it, memory ran out; " if self.code == -signal.SIGKILL else ""
        lines = self.read_last_lines()
        return f"{memory}its log ends with {lines[-1]!r}" if lines else f"{memory}its log is empty"


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:  # one of the system's own
        return "unknown"
