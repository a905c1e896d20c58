"""Exit reports, and what the edge of a process makes of the errors that reach it."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from treegrpo.config.schema import Config
from treegrpo.errors import ConfigError, JournalError, RankError, TreeGrpoError, UnavailableError
from treegrpo.runtime.entrypoint import find_own_error, report_error, run_service
from treegrpo.runtime.exit_report import VARIABLE, ExitReport, ExitReports, decisive_report, exit_report_for, write_exit_report

STAYS, PASSES, CRASH = ConfigError("no such key"), UnavailableError("nobody answers"), KeyError("bug")


@pytest.fixture
def reports(monkeypatch: pytest.MonkeyPatch) -> ExitReports:
    """Those of this process."""
    reports = ExitReports()
    for name, value in reports.environment.items():
        monkeypatch.setenv(name, value)
    return reports


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ([], None),
        ([ExitReport(75, "a"), ExitReport(75, "b")], "a"),
        ([ExitReport(75, "a"), ExitReport(1, "b"), ExitReport(2, "c")], "c"),
        ([ExitReport(75, "a"), ExitReport(-9, "b")], "b"),
        ([ExitReport(75, "lost another", secondary=True), ExitReport(75, "full disk")], "full disk"),
        ([ExitReport(75, "lost another", secondary=True), ExitReport(-9, "killed")], "killed"),
    ],
)
def test_a_permanent_error_goes_before_a_crash_before_a_transient_one(given: list[ExitReport], expected: str | None) -> None:
    assert getattr(decisive_report(given), "sentence", None) == expected


@pytest.mark.parametrize(
    ("error", "report"),
    [
        (STAYS, ExitReport(2, "no such key")),
        (PASSES, ExitReport(75, "nobody answers")),
        (RankError("rank 0 failed"), ExitReport(75, "rank 0 failed", secondary=True)),
        (CRASH, ExitReport(1, "KeyError: 'bug'")),
        (ExceptionGroup("tasks", [ExceptionGroup("inner", [CRASH])]), ExitReport(1, "KeyError: 'bug'")),
        (JournalError("x" * 9000), ExitReport(2, "x" * 4096)),
    ],
)
def test_a_report_is_the_sentence_or_the_last_line_of_the_traceback(error: BaseException, report: ExitReport) -> None:
    assert exit_report_for(error) == report


@pytest.mark.parametrize(
    ("errors", "expected"),
    [([PASSES, STAYS], STAYS), ([STAYS, PASSES], STAYS), ([CRASH, PASSES], PASSES), ([CRASH], None), ([PASSES, PASSES], PASSES)],
)
def test_of_several_errors_the_one_that_stays_is_told(errors: list[Exception], expected: TreeGrpoError | None) -> None:
    assert find_own_error(ExceptionGroup("tasks", [ExceptionGroup("inner", errors)])) is expected


def test_a_process_reports_what_it_ends_of_and_its_parent_alone_reads_it(
    reports: ExitReports, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.ERROR):
        assert report_error(ExceptionGroup("tasks", [CRASH, PASSES])) == 75
    assert capsys.readouterr().err == "error: nobody answers\n"
    assert "another exception was raised as well: 'bug'" in caplog.text
    with pytest.raises(KeyError):
        report_error(CRASH)
    assert reports.read() == [ExitReport(75, "nobody answers"), ExitReport(1, "KeyError: 'bug'")]
    assert ExitReports().read() == []


def test_lines_that_are_no_report_are_left_out(reports: ExitReports) -> None:
    with open(os.environ[VARIABLE], "ab") as file:  # noqa: PTH123
        file.write(b"garbage\n{}\n[1]\n")
    write_exit_report(ExitReport(2, "a\nb"))
    assert reports.read() == [ExitReport(2, "a\nb")]


def test_without_a_parent_that_listens_nothing_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(VARIABLE, raising=False)
    write_exit_report(ExitReport(2, "nobody hears"))
    monkeypatch.setenv(VARIABLE, "/proc/1/fd/999999")
    write_exit_report(ExitReport(2, "nobody hears"))


def test_a_service_that_is_cancelled_unasked_has_crashed(reports: ExitReports) -> None:
    async def service(_config: Config) -> None:
        raise asyncio.CancelledError

    with pytest.raises(RuntimeError, match="without a stop signal"):
        run_service(service, [])
    assert reports.read() == [ExitReport(1, "RuntimeError: The service was cancelled without a stop signal.")]


SERVICE = """
import asyncio
from treegrpo.runtime.entrypoint import run_service

async def serve(config):
    print("serving", flush=True)
    await asyncio.Event().wait()

run_service(serve, [])
"""


@pytest.mark.parametrize(
    ("number", "before", "code"),
    [
        (signal.SIGTERM, [], 0),
        (signal.SIGINT, [], 0),
        (signal.SIGHUP, [], 0),
        (signal.SIGHUP, ["nohup"], -signal.SIGKILL),
    ],
)
def test_a_stop_signal_ends_a_service_in_order_but_not_sighup_under_nohup(
    number: signal.Signals, before: list[str], code: int, tmp_path: Path
) -> None:
    command = [*before, sys.executable, "-c", SERVICE]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, stdin=subprocess.DEVNULL, cwd=tmp_path
    ) as one:
        assert one.stdout is not None
        assert one.stdout.readline() == b"serving\n"
        one.send_signal(number)
        if code:  # it goes on
            with pytest.raises(subprocess.TimeoutExpired):
                one.wait(0.5)
            one.kill()
        assert one.wait(30) == code
