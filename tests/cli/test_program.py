from __future__ import annotations

import asyncio
import os
import select
import signal
import sys
from pathlib import Path

import pytest

from services.cli.processes.program import PartProcess, Program
from services.cli.processes.readiness import wait_until_ready
from treegrpo.errors import UnavailableError

WAIT = Program("service", "tests.cli.programs.wait_for_sigterm")
SECONDS = 30.0


def ending(line: str, code: int, *report: str) -> Program:
    words = ("--say", line, "--code", str(code), *(("--report", *report) if report else ()))
    return Program("service", "tests.cli.programs.print_and_exit", words)


async def started(child: PartProcess) -> None:
    """Wait until the program has come to its first line."""

    async def probe() -> None:
        if "waiting" not in child.log.read_text():
            raise UnavailableError("not yet")

    await wait_until_ready(child.name, probe, SECONDS)


@pytest.mark.parametrize(
    ("line", "code", "report", "why"),
    [
        ("error: forged", 2, ["The port is taken."], ": The port is taken."),
        ("error: forged", 2, [], "; its log ends with 'error: forged'"),
        ("", 1, [], "; its log ends with '2026 INFO something before'"),
        ("last line", 1, ["ValueError: 3"], ": ValueError: 3"),
    ],
)
async def test_why_it_ended_is_what_it_reports_not_what_is_in_its_log(
    tmp_path: Path, line: str, code: int, report: list[str], why: str
) -> None:
    child = await PartProcess.launch(ending(line, code, *report), [], tmp_path)
    await child.ended
    assert child.describe_exit() == f"The service ended with code {code}{why} (log: {tmp_path / 'service.log'})"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
async def test_a_signal_does_not_hide_the_error_a_process_was_ending_with(tmp_path: Path, number: signal.Signals) -> None:
    words = ("--say", "waiting", "--code", "2", "--report", "The port is taken.", "--linger", "yes")
    child = await PartProcess.launch(Program("service", "tests.cli.programs.print_and_exit", words), [], tmp_path)
    await started(child)
    os.kill(child.pid, number)
    await child.ended
    assert child.code == 2
    assert child.describe_exit() == f"The service ended with code 2: The port is taken. (log: {child.log})"


async def test_what_an_earlier_process_said_is_not_repeated(tmp_path: Path) -> None:
    (tmp_path / "service.log").write_text("error: long ago\n")
    child = await PartProcess.launch(WAIT, [], tmp_path)
    await started(child)
    os.kill(child.pid, signal.SIGKILL)
    await child.ended
    how = "was killed by signal 9 (SIGKILL); probably out of memory; its log ends with 'waiting'"
    assert child.describe_exit() == f"The service {how} (log: {child.log})"


@pytest.mark.skipif(sys.platform != "linux", reason="Linux alone kills a child when its parent dies")
async def test_no_child_outlives_a_killed_parent(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "tests.cli.programs.parent", str(tmp_path)]
    parent = await asyncio.create_subprocess_exec(*command, stdout=asyncio.subprocess.PIPE)
    assert parent.stdout is not None
    child = os.pidfd_open(int(await parent.stdout.readline()))
    try:
        parent.kill()
        await parent.wait()
        ready, _, _ = await asyncio.to_thread(select.select, [child], [], [], SECONDS)
        assert ready == [child]
    finally:
        os.close(child)


async def test_a_process_whose_log_cannot_be_written_runs_without(tmp_path: Path) -> None:
    (tmp_path / "service.log").mkdir()
    child = await PartProcess.launch(ending("a line", 3, "ValueError: 3"), [], tmp_path)
    assert await child.ended == 3
    assert child.read_last_lines() == []
    assert "ended with code 3: ValueError: 3" in child.describe_exit()
