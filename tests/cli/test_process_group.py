"""`ProcessGroup` with small programs for the parts of a run: restarted, given up, drained, stopped."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from services.cli.processes.part_supervisor import RESTARTS, SupervisedPart
from services.cli.processes.process_group import ProcessGroup
from services.cli.processes.program import Program
from services.cli.processes.readiness import wait_until_ready
from treegrpo.errors import DeadlineError, PartError, UnavailableError
from treegrpo.runtime.entrypoint import FAILED, TRANSIENT, exit_code
from treegrpo.runtime.supervisor import RestartPolicy
from treegrpo.timing.backoff import Backoff

SECONDS = 30.0
RETRIES = 2
QUICK = RestartPolicy(Backoff((0.0,), retries=RETRIES))
SLOW = RestartPolicy(Backoff((3600.0,)))


def waiting(name: str = "service") -> SupervisedPart:
    """Runs until it is told to end, with code 0; ready when it has lines so."""
    return SupervisedPart(Program(name, "tests.cli.programs.wait_for_sigterm"))


def ending(name: str, sentence: str, code: int, *, done: bool = False) -> SupervisedPart:
    """Ends at once with ``code`` and, unless it is 0, with ``sentence`` for its reason."""
    report = ("--report", sentence) if code else ()
    program = Program(name, "tests.cli.programs.print_and_exit", ("--say", "error: forged.", "--code", str(code), *report))
    return SupervisedPart(program, is_done=lambda: done)


def process_group(folder: Path, lines: list[str], policy: RestartPolicy = RESTARTS) -> ProcessGroup:
    return ProcessGroup([], folder, lines.append, policy=policy)


async def until(true: Callable[[], bool]) -> None:
    async def probe() -> None:
        if not true():
            raise UnavailableError("not yet")

    await wait_until_ready("service", probe, SECONDS)


async def started(folder: Path, name: str = "service", times: int = 1) -> None:
    """Wait until the program of that name has come to its first line so often."""
    await until(lambda: (folder / f"{name}.log").exists() and (folder / f"{name}.log").read_text().count("waiting") == times)


async def test_at_the_end_of_the_block_no_process_is_left(tmp_path: Path) -> None:
    async with process_group(tmp_path, []) as group:
        for name in ("service", "other"):
            await group.start_part(waiting(name))
            await started(tmp_path, name)
        children = [group.newest_process(name) for name in ("service", "other")]
    assert [child.code for child in children] == [0, 0]


async def test_a_service_that_never_gets_ready_has_a_deadline() -> None:
    async def has_no_end() -> None:
        raise UnavailableError("No learner answers at 127.0.0.1:1.")

    with pytest.raises(DeadlineError, match=r"The intake was not ready within 0 s: No learner answers at 127\.0\.0\.1:1\."):
        await wait_until_ready("intake", has_no_end, 0.01)


async def test_an_error_that_stays_ends_the_run_with_its_sentence_and_all_others(tmp_path: Path) -> None:
    async def has_no_end() -> None:
        raise UnavailableError("no answer")

    lines: list[str] = []
    group, broken = process_group(tmp_path, lines), ending("intake", "No such key.", FAILED)

    async def run() -> None:
        async with group:
            await group.start_part(waiting())
            await group.start_part(SupervisedPart(broken.program, has_no_end))

    with pytest.raises(PartError, match=r"The intake ended with code 2: No such key\."):
        await run()
    assert group.newest_process("service").code is not None
    assert lines == []


@pytest.mark.parametrize("code", [TRANSIENT, 1, 0])
async def test_what_may_pass_is_tried_again_and_in_the_end_given_up(tmp_path: Path, code: int) -> None:
    lines: list[str] = []
    async with process_group(tmp_path, lines, QUICK) as group:
        await group.start_part(waiting("trainer"))
        await group.start_part(ending("intake", "No broker.", code))
        why = r": No broker\." if code else "; its log ends with 'error: forged"
        with pytest.raises(
            PartError, match=rf"The intake ended with code {code}{why}.* started 3 times and is given up"
        ) as given_up:
            await asyncio.wait_for(group.wait_for_part("trainer"), SECONDS)
        assert exit_code(given_up.value) == (TRANSIENT if code == TRANSIENT else FAILED)
    assert ["starting it again in 0 s" in line for line in lines] == [True, True]


async def test_a_part_that_was_killed_is_started_again_and_the_others_go_on(tmp_path: Path) -> None:
    lines: list[str] = []
    async with process_group(tmp_path, lines, QUICK) as group:
        for name in ("trainer", "intake"):
            await group.start_part(waiting(name))
            await started(tmp_path, name)
        trainer, intake = group.newest_process("trainer"), group.newest_process("intake")
        os.kill(intake.pid, signal.SIGKILL)
        await started(tmp_path, "intake", times=2)
        assert (group.newest_process("trainer"), trainer.code) == (trainer, None)
        assert group.newest_process("intake") is not intake
    how = "was killed by signal 9 (SIGKILL); probably out of memory; its log ends with 'waiting'"
    assert lines == [f"The intake {how} (log: {tmp_path / 'intake.log'}); starting it again in 0 s."]


async def test_the_run_is_over_when_the_trainer_is_done(tmp_path: Path) -> None:
    async with process_group(tmp_path, []) as group:
        await group.start_part(waiting())
        await group.start_part(ending("trainer", "done", 0, done=True))
        async with asyncio.timeout(SECONDS):
            await group.wait_for_part("trainer")


@pytest.mark.parametrize(("code", "starts"), [(TRANSIENT, 3), (FAILED, 1)])
async def test_the_run_outlives_a_sampler_but_not_the_last(tmp_path: Path, code: int, starts: int) -> None:
    lines: list[str] = []
    async with process_group(tmp_path, lines, QUICK) as group:
        await group.start_part(waiting("trainer"))
        group.add_sampler(waiting("sampler-1"))
        group.add_sampler(ending("sampler-0", "No learner.", code))
        watching = asyncio.create_task(group.wait_for_part("trainer"))
        await until(lambda: len(lines) == starts)
        assert lines[-1].startswith(f"The sampler-0 ended with code {code}: No learner.")
        assert not watching.done()
        group.add_sampler(ending("sampler-2", "No learner.", code))
        await until(lambda: len(lines) == 2 * starts)
        assert not watching.done()
        for start in range(1, RETRIES + 2):
            await started(tmp_path, "sampler-1", times=start)
            os.kill(group.newest_process("sampler-1").pid, signal.SIGKILL)
        with pytest.raises(
            PartError, match="The sampler-0 ended with code 2: No learner" if code == FAILED else "The sampler-1 was killed"
        ):
            await asyncio.wait_for(watching, SECONDS)


async def test_a_sampler_that_ends_well_before_the_run_drains_is_started_again(tmp_path: Path) -> None:
    async with process_group(tmp_path, [], QUICK) as group:
        group.add_sampler(waiting("sampler-0"))
        await started(tmp_path, "sampler-0")
        first = group.newest_process("sampler-0")
        os.kill(first.pid, signal.SIGTERM)
        await started(tmp_path, "sampler-0", times=2)
        assert first.code == 0
        group.draining.set()
        second = group.newest_process("sampler-0")
        os.kill(second.pid, signal.SIGTERM)
        await group.wait_for_samplers(SECONDS)
        assert (second.code, group.newest_process("sampler-0")) == (0, second)


async def test_a_drain_cuts_a_back_off_short(tmp_path: Path) -> None:
    lines: list[str] = []
    async with process_group(tmp_path, lines, SLOW) as group:
        await group.start_part(ending("trainer", "No intake.", TRANSIENT))
        await until(lambda: bool(lines))
        assert not group.is_running("trainer")
        group.draining.set()
        async with asyncio.timeout(SECONDS):
            await group.wait_for_part("trainer")
    assert len(lines) == 1


async def test_a_part_of_a_run_that_drains_is_not_waited_for(tmp_path: Path) -> None:
    async with process_group(tmp_path, []) as group:
        group.draining.set()
        async with asyncio.timeout(SECONDS):
            await group.start_part(waiting())


async def test_who_does_not_end_in_time_is_killed_and_sooner_if_asked(tmp_path: Path) -> None:
    at_once = asyncio.Event()
    async with ProcessGroup([], tmp_path, print, at_once) as group:
        await group.start_part(waiting())
        await started(tmp_path)
        os.kill(group.newest_process("service").pid, signal.SIGSTOP)
        asyncio.get_running_loop().call_later(0.2, at_once.set)
    assert group.newest_process("service").code == -signal.SIGKILL


def failing(name: str, sentence: str) -> SupervisedPart:
    """Runs until it is told to end, and then ends for a reason that stays."""
    return SupervisedPart(Program(name, "tests.cli.programs.wait_for_sigterm", ("--report", sentence, "--code", str(FAILED))))


@pytest.mark.parametrize("drains", [False, True])
async def test_an_error_that_stays_is_heard_whether_the_run_drains_or_not(tmp_path: Path, drains: bool) -> None:
    async with process_group(tmp_path, []) as group:
        for part in (waiting("trainer"), failing("intake", "The run makes no progress.")):
            await group.start_part(part)
            await started(tmp_path, part.name)
        if drains:
            group.draining.set()
        group.signal_part("intake", signal.SIGTERM)
        with pytest.raises(PartError, match=r"The intake ended with code 2: The run makes no progress\."):
            await asyncio.wait_for(group.wait_for_part("trainer"), SECONDS)


async def test_what_a_part_says_only_when_it_is_stopped_is_the_reason_too(tmp_path: Path) -> None:
    transient, permanent = PartError("No intake answers.", is_transient=True), PartError("No such key.")
    async with process_group(tmp_path, []) as group:
        await group.start_part(failing("intake", "The run makes no progress."))
        await started(tmp_path, "intake")
        await group.start_part(ending("trainer", "done", 0, done=True))
        await asyncio.wait_for(group.wait_for_part("trainer"), SECONDS)
        assert (group.permanent_failure(), group.root_cause(transient)) == (None, transient)
    assert "The intake ended with code 2: The run makes no progress." in str(group.permanent_failure())
    assert str(group.root_cause(transient)) == str(group.permanent_failure())
    assert group.root_cause(permanent) is permanent
