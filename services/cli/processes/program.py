"""The process of one part of a run: how it is started, and why it ended."""

from __future__ import annotations

import signal
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from treegrpo.runtime.child_process import ChildProcess
from treegrpo.runtime.exit_report import ExitReport, ExitReports, decisive_report
from treegrpo.runtime.process_environment import child_environment, python_command

PrintLine = Callable[[str], None]
"""Prints a line for the user."""


@dataclass(frozen=True, slots=True)
class Program:
    """A Python module to run with `python -m`, and the name by which users know it."""

    name: str
    module: str
    flags: tuple[str, ...] = ()
    """Flags of this process only, after those that all processes have."""


class PartProcess(ChildProcess):
    """A child process that runs one part of a run."""

    killed_seconds = 10.0
    reports: ExitReports

    @classmethod
    async def launch(cls, program: Program, arguments: Sequence[str], logs: Path) -> Self:
        """Start ``program`` with the common arguments and its own; output is appended to ``logs``/NAME.log."""
        command = python_command(program.module, *arguments, *program.flags)
        reports = ExitReports()
        environment = child_environment({**reports.environment, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"})
        child = await cls.spawn(program.name, command, environment, logs / f"{program.name}.log")
        child.reports = reports
        return child

    @property
    def code(self) -> int | None:
        """The exit code, None while it runs; negative after a signal, unless an error had been reported before."""
        return self.reports.exit_code(super().code)

    @property
    def exit_report(self) -> ExitReport | None:
        """The reason for its end that the process has reported; None if it has reported none."""
        return decisive_report(self.reports.read())

    def describe_exit(self) -> str:
        """A sentence about its end: exit code or signal, reason, log file."""
        code, report = self.code or 0, self.exit_report
        how = f"ended with code {code}" if code >= 0 else f"was killed by signal {-code} ({_signal_name(-code)})"
        why = f": {report.sentence}" if report else f"; {self._log_ending()}"
        return f"The {self.name} {how}{why} (log: {self.log})"

    def _log_ending(self) -> str:
        """A hint for a process that has reported no reason."""
        memory = "probably out of memory; " if self.code == -signal.SIGKILL else ""
        lines = self.read_last_lines()
        return f"{memory}its log ends with {lines[-1]!r}" if lines else f"{memory}its log is empty"


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:  # one of the system's own
        return "unknown"
