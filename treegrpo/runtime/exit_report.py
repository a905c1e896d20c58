"""The exit report: a process's reason for its end, written for its parent.

    parent ── VARIABLE = path of a file in memory ──► child, and what the child starts
    parent ◄── a line of JSON for each error ──────── child

It is not the log, since other programs write there too. It is in memory, since a full disk is one of the reasons to end.
A process without such a parent writes no report.
"""

from __future__ import annotations

import json
import os
import tempfile
import traceback
import weakref
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass

from treegrpo.errors import RankError, TreeGrpoError

VARIABLE = "_TREEGRPO_EXIT_REPORT"
"""In the environment; it does not have the prefix of configuration keys."""
FAILED = 2
TRANSIENT = 75
"""EX_TEMPFAIL of sysexits.h."""
CRASHED = 1
"""Python's exit code after an uncaught exception."""
READ_BYTES = 1 << 20
SENTENCE_CHARACTERS = 4096


@dataclass(frozen=True, slots=True)
class ExitReport:
    """Why a process ended."""

    code: int
    """Its exit code; negative: the signal that killed it."""
    sentence: str
    secondary: bool = False
    """It ended because another process did, whose report has the reason."""


def exit_code(error: TreeGrpoError) -> int:
    """The exit code of a process after ``error``."""
    return TRANSIENT if error.is_transient else FAILED


def exit_report_for(error: BaseException) -> ExitReport:
    """The report of a process that ends with ``error``: its message, or, after a crash, the last line of the traceback."""
    if isinstance(error, TreeGrpoError):
        return ExitReport(exit_code(error), str(error)[:SENTENCE_CHARACTERS], isinstance(error, RankError))
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return ExitReport(CRASHED, traceback.format_exception_only(error)[-1].strip()[:SENTENCE_CHARACTERS])


def decisive_report(reports: Iterable[ExitReport]) -> ExitReport | None:
    """The most important report: a permanent error, else a crash, else a transient error; the first of several."""
    order = {FAILED: 0, TRANSIENT: 2}
    return min(reports, key=lambda report: (report.secondary, order.get(report.code, 1)), default=None)


def write_exit_report(report: ExitReport) -> None:
    """Write a report for the parent, if it reads any."""
    if path := os.environ.get(VARIABLE):
        with suppress(OSError), open(path, "ab", buffering=0) as file:  # noqa: PTH123  # one write, appended
            file.write(json.dumps(asdict(report)).encode() + b"\n")


class ExitReports:
    """The parent's side: the reports of one child and of its descendants. The file is closed with this object."""

    def __init__(self) -> None:
        if hasattr(os, "memfd_create"):
            self._file = os.memfd_create("exit-report")
            self._path = f"/proc/{os.getpid()}/fd/{self._file}"
            weakref.finalize(self, os.close, self._file)
        else:
            self._file, self._path = tempfile.mkstemp(prefix="exit-report-")
            weakref.finalize(self, os.close, self._file)
            weakref.finalize(self, os.unlink, self._path)

    @property
    def environment(self) -> Mapping[str, str]:
        """The variables that the child needs."""
        return {VARIABLE: self._path}

    def read(self) -> list[ExitReport]:
        """All reports so far; invalid lines are skipped."""
        reports: list[ExitReport] = []
        for line in os.pread(self._file, READ_BYTES, 0).splitlines():
            with suppress(ValueError, TypeError):
                reports.append(ExitReport(**json.loads(line)))
        return reports

    def exit_code(self, code: int | None) -> int | None:
        """The child's exit ``code``, None while it runs; after a signal (negative), that of an error it had reported before.

        A stop signal may reach a process that is already ending with an error.
        """
        if code is not None and code < 0 and (report := decisive_report(self.read())) is not None:
            return report.code
        return code
