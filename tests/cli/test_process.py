from __future__ import annotations

import asyncio
import os
import select
import sys
from pathlib import Path

import pytest

from services.cli.crew import Crew
from services.cli.process import Child, Program
from services.cli.ready import wait_ready
from treegrpo.errors import UnavailableError

WAIT = Program("service", "tests.cli.programs.wait")
SECONDS = 30.0


def ending(name: str, sentence: str, code: int) -> Program:
    return Program(name, "tests.cli.programs.say_and_end", ("--say", sentence, "--code", str(code)))


async def started(child: Child) -> None:
    """Wait until the program has come to its first line."""

    async def probe() -> None:
        if "waiting" not in child.log.read_text():
            raise UnavailableError("not yet")

    await wait_ready(child.name, probe, SECONDS)


def crew(folder: Path, said: list[str]) -> Crew:
    return Crew([], folder, said.append)


@pytest.mark.parametrize(
    ("sentence", "words"),
    [("error: The port is taken.", "The port is taken."), ("ValueError: 3", "ValueError: 3"), ("", "2026 INFO something before")],
)
async def test_the_last_words_are_the_error_or_the_last_line(tmp_path: Path, sentence: str, words: str) -> None:
    child = await Child.start(ending("service", sentence, 2), [], tmp_path)
    await child.ended
    assert child.last_words() == words
    assert child.obituary() == f"The service ended with code 2: {words} (log: {tmp_path / 'service.log'})"


async def test_the_last_words_of_an_earlier_process_are_not_repeated(tmp_path: Path) -> None:
    (tmp_path / "service.log").write_text("error: long ago\n")
    child = await Child.start(WAIT, [], tmp_path)
    await started(child)
    await child.stop(SECONDS)
    assert child.last_words() == "waiting"
    assert child.code == 0


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
    child = await Child.start(ending("service", "ValueError: 3", 3), [], tmp_path)
    assert await child.ended == 3
    assert child.said() == []
    assert "ended with code 3" in child.obituary()
