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
from treegrpo.errors import DeadlineError, UnavailableError

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


async def test_at_the_end_of_the_block_no_process_is_left(tmp_path: Path) -> None:
    async with crew(tmp_path, []) as running:
        first, second = await running.start(WAIT), await running.start(Program("other", WAIT.module))
        await started(first)
        await started(second)
    assert (first.code, second.code) == (0, 0)


async def test_a_service_that_ends_instead_of_getting_ready_is_reported_with_its_sentence(tmp_path: Path) -> None:
    async def never() -> None:
        raise UnavailableError("no answer")

    children: list[Child] = []

    async def run() -> None:
        async with crew(tmp_path, []) as running:
            children.append(await running.start(WAIT))
            await running.start(ending("intake", "error: No broker.", 2), never)

    with pytest.raises(UnavailableError, match=r"The intake ended with code 2: No broker\."):
        await run()
    assert children[0].code is not None


async def test_a_service_that_never_gets_ready_has_a_deadline() -> None:
    async def never() -> None:
        raise UnavailableError("No learner answers at 127.0.0.1:1.")

    with pytest.raises(DeadlineError, match=r"The intake was not ready within 0 s: No learner answers at 127\.0\.0\.1:1\."):
        await wait_ready("intake", never, 0.01)


async def test_the_end_of_any_needed_process_is_the_end_of_all(tmp_path: Path) -> None:
    children: list[Child] = []

    async def run() -> None:
        async with crew(tmp_path, []) as running:
            children.append(await running.start(WAIT))
            await running.start(ending("intake", "error: broken", 3))
            await running.watch(children[0])

    with pytest.raises(UnavailableError, match="The intake ended with code 3"):
        await run()
    assert children[0].code is not None


async def test_the_run_is_over_when_the_trainer_has_ended_well(tmp_path: Path) -> None:
    async with crew(tmp_path, []) as running:
        await running.start(WAIT)
        trainer = await running.start(ending("trainer", "done", 0))
        async with asyncio.timeout(SECONDS):
            await running.watch(trainer)


async def test_a_sampler_that_dies_is_started_again_and_in_the_end_given_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("services.cli.crew.RESTART_SECONDS", (0.0, 0.0))
    said: list[str] = []

    async def run() -> None:
        async with crew(tmp_path, said) as running:
            trainer = await running.start(WAIT)
            running.keep(ending("sampler-0", "error: No learner.", 2))
            await running.watch(trainer)

    with pytest.raises(UnavailableError, match="The sampler-0 ended with code 2: No learner"):
        await run()
    assert ["starting it again" in line for line in said] == [True, True, False]


async def test_samplers_that_were_told_to_drain_leave_the_last_word_to_the_trainer(tmp_path: Path) -> None:
    async with crew(tmp_path, []) as running:
        trainer = await running.start(WAIT)
        await started(trainer)
        running.keep(ending("sampler-0", "drained", 0))
        await running.farewell(SECONDS)
        watching = asyncio.create_task(running.watch(trainer))
        await trainer.stop(SECONDS)
        await watching
