"""The crew of a run with small programs for its parts: started again, given up, drained, stopped."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from services.cli.processes.part_supervisor import Part
from services.cli.processes.process_group import Crew
from services.cli.processes.program import Program
from services.cli.processes.readiness import wait_ready
from treegrpo.errors import DeadlineError, PartError, UnavailableError
from treegrpo.runtime.entrypoint import FAILED, TRANSIENT, exit_code

SECONDS = 30.0
QUICK = (0.0, 0.0)
FOREVER = (3600.0,)


def waiting(name: str = "service") -> Part:
    """Runs until it is told to end, with code 0; ready when it has said so."""
    return Part(Program(name, "tests.cli.programs.wait"))


def ending(name: str, sentence: str, code: int, *, done: bool = False) -> Part:
    """Ends at once with ``code`` and, unless it is 0, with ``sentence`` for its reason."""
    report = ("--report", sentence) if code else ()
    program = Program(name, "tests.cli.programs.say_and_end", ("--say", "error: forged.", "--code", str(code), *report))
    return Part(program, done=lambda: done)


def crew(folder: Path, said: list[str]) -> Crew:
    return Crew([], folder, said.append)


def back_off(monkeypatch: pytest.MonkeyPatch, seconds: tuple[float, ...]) -> None:
    monkeypatch.setattr("services.cli.processes.part_supervisor.RESTART_SECONDS", seconds)


async def until(true: Callable[[], bool]) -> None:
    async def probe() -> None:
        if not true():
            raise UnavailableError("not yet")

    await wait_ready("service", probe, SECONDS)


async def started(folder: Path, name: str = "service", times: int = 1) -> None:
    """Wait until the program of that name has come to its first line so often."""
    await until(lambda: (folder / f"{name}.log").exists() and (folder / f"{name}.log").read_text().count("waiting") == times)


async def test_at_the_end_of_the_block_no_process_is_left(tmp_path: Path) -> None:
    async with crew(tmp_path, []) as running:
        for name in ("service", "other"):
            await running.start(waiting(name))
            await started(tmp_path, name)
        children = [running.newest(name) for name in ("service", "other")]
    assert [child.code for child in children] == [0, 0]


async def test_a_service_that_never_gets_ready_has_a_deadline() -> None:
    async def never() -> None:
        raise UnavailableError("No learner answers at 127.0.0.1:1.")

    with pytest.raises(DeadlineError, match=r"The intake was not ready within 0 s: No learner answers at 127\.0\.0\.1:1\."):
        await wait_ready("intake", never, 0.01)


async def test_an_error_that_stays_ends_the_run_with_its_sentence_and_all_others(tmp_path: Path) -> None:
    async def never() -> None:
        raise UnavailableError("no answer")

    said: list[str] = []
    running, broken = crew(tmp_path, said), ending("intake", "No such key.", FAILED)

    async def run() -> None:
        async with running:
            await running.start(waiting())
            await running.start(Part(broken.program, never))

    with pytest.raises(PartError, match=r"The intake ended with code 2: No such key\."):
        await run()
    assert running.newest("service").code is not None
    assert said == []


@pytest.mark.parametrize("code", [TRANSIENT, 1, 0])
async def test_what_may_pass_is_tried_again_and_in_the_end_given_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    back_off(monkeypatch, QUICK)
    said: list[str] = []
    async with crew(tmp_path, said) as running:
        await running.start(waiting("trainer"))
        await running.start(ending("intake", "No broker.", code))
        why = r": No broker\." if code else "; its log ends with 'error: forged"
        with pytest.raises(
            PartError, match=rf"The intake ended with code {code}{why}.* started 3 times and is given up"
        ) as given_up:
            await asyncio.wait_for(running.watch("trainer"), SECONDS)
        assert exit_code(given_up.value) == (TRANSIENT if code == TRANSIENT else FAILED)
    assert ["starting it again in 0 s" in line for line in said] == [True, True]


async def test_a_part_that_was_killed_is_started_again_and_the_others_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    back_off(monkeypatch, QUICK)
    said: list[str] = []
    async with crew(tmp_path, said) as running:
        for name in ("trainer", "intake"):
            await running.start(waiting(name))
            await started(tmp_path, name)
        trainer, intake = running.newest("trainer"), running.newest("intake")
        os.kill(intake.pid, signal.SIGKILL)
        await started(tmp_path, "intake", times=2)
        assert (running.newest("trainer"), trainer.code) == (trainer, None)
        assert running.newest("intake") is not intake
    how = "was killed by signal 9 (SIGKILL); if nobody sent it, memory ran out; its log ends with 'waiting'"
    assert said == [f"The intake {how} (log: {tmp_path / 'intake.log'}); starting it again in 0 s."]


async def test_the_run_is_over_when_the_trainer_is_done(tmp_path: Path) -> None:
    async with crew(tmp_path, []) as running:
        await running.start(waiting())
        await running.start(ending("trainer", "done", 0, done=True))
        async with asyncio.timeout(SECONDS):
            await running.watch("trainer")


@pytest.mark.parametrize(("code", "starts"), [(TRANSIENT, 3), (FAILED, 1)])
async def test_the_run_outlives_a_sampler_but_not_the_last(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int, starts: int
) -> None:
    back_off(monkeypatch, QUICK)
    said: list[str] = []
    async with crew(tmp_path, said) as running:
        await running.start(waiting("trainer"))
        running.add(waiting("sampler-1"))
        running.add(ending("sampler-0", "No learner.", code))
        watching = asyncio.create_task(running.watch("trainer"))
        await until(lambda: len(said) == starts)
        assert said[-1].startswith(f"The sampler-0 ended with code {code}: No learner.")
        assert not watching.done()
        running.add(ending("sampler-2", "No learner.", code))
        await until(lambda: len(said) == 2 * starts)
        assert not watching.done()
        back_off(monkeypatch, ())
        await started(tmp_path, "sampler-1")
        os.kill(running.newest("sampler-1").pid, signal.SIGKILL)
        with pytest.raises(
            PartError, match="The sampler-0 ended with code 2: No learner" if code == FAILED else "The sampler-1 was killed"
        ):
            await asyncio.wait_for(watching, SECONDS)


async def test_a_sampler_that_ends_well_before_the_run_drains_is_started_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    back_off(monkeypatch, QUICK)
    async with crew(tmp_path, []) as running:
        running.add(waiting("sampler-0"))
        await started(tmp_path, "sampler-0")
        first = running.newest("sampler-0")
        os.kill(first.pid, signal.SIGTERM)
        await started(tmp_path, "sampler-0", times=2)
        assert first.code == 0
        running.drain.set()
        second = running.newest("sampler-0")
        os.kill(second.pid, signal.SIGTERM)
        await running.farewell(SECONDS)
        assert (second.code, running.newest("sampler-0")) == (0, second)


async def test_a_drain_cuts_a_back_off_short(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    back_off(monkeypatch, FOREVER)
    said: list[str] = []
    async with crew(tmp_path, said) as running:
        await running.start(ending("trainer", "No intake.", TRANSIENT))
        await until(lambda: bool(said))
        assert not running.runs("trainer")
        running.drain.set()
        async with asyncio.timeout(SECONDS):
            await running.watch("trainer")
    assert len(said) == 1


async def test_a_part_of_a_run_that_drains_is_not_waited_for(tmp_path: Path) -> None:
    async with crew(tmp_path, []) as running:
        running.drain.set()
        async with asyncio.timeout(SECONDS):
            await running.start(waiting())


async def test_who_does_not_end_in_time_is_killed_and_sooner_if_asked(tmp_path: Path) -> None:
    at_once = asyncio.Event()
    async with Crew([], tmp_path, print, at_once) as running:
        await running.start(waiting())
        await started(tmp_path)
        os.kill(running.newest("service").pid, signal.SIGSTOP)
        asyncio.get_running_loop().call_later(0.2, at_once.set)
    assert running.newest("service").code == -signal.SIGKILL


def failing(name: str, sentence: str) -> Part:
    """Runs until it is told to end, and then ends for a reason that stays."""
    return Part(Program(name, "tests.cli.programs.wait", ("--report", sentence, "--code", str(FAILED))))


@pytest.mark.parametrize("drains", [False, True])
async def test_an_error_that_stays_is_heard_whether_the_run_drains_or_not(tmp_path: Path, drains: bool) -> None:
    async with crew(tmp_path, []) as running:
        for part in (waiting("trainer"), failing("intake", "The run leads nowhere.")):
            await running.start(part)
            await started(tmp_path, part.name)
        if drains:
            running.drain.set()
        running.tell("intake", signal.SIGTERM)
        with pytest.raises(PartError, match=r"The intake ended with code 2: The run leads nowhere\."):
            await asyncio.wait_for(running.watch("trainer"), SECONDS)


async def test_what_a_part_says_only_when_it_is_stopped_is_the_reason_too(tmp_path: Path) -> None:
    transient, permanent = PartError("No intake answers.", is_transient=True), PartError("No such key.")
    async with crew(tmp_path, []) as running:
        await running.start(failing("intake", "The run leads nowhere."))
        await started(tmp_path, "intake")
        await running.start(ending("trainer", "done", 0, done=True))
        await asyncio.wait_for(running.watch("trainer"), SECONDS)
        assert (running.failure(), running.cause(transient)) == (None, transient)
    assert "The intake ended with code 2: The run leads nowhere." in str(running.failure())
    assert str(running.cause(transient)) == str(running.failure())
    assert running.cause(permanent) is permanent
