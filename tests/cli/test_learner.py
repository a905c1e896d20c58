"""`python -m learner`: intake and trainer without `treegrpo up`."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
import uuid
from collections.abc import AsyncGenerator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from tests.cli.command_harness import marked_environment, marked_processes
from tests.cli.small_run import SmallRun
from tests.control.broker_processes import embedded
from treegrpo.config.loader import load_config

pytestmark = pytest.mark.whole_run
SECONDS = 100.0


class LearnerProcess:
    """A learner that runs, and the lines of its log so far."""

    def __init__(self, process: asyncio.subprocess.Process, mark: str) -> None:
        self.lines: list[str] = []
        self._process = process
        self._mark = mark

    async def wait_for_lines(self, words: str, times: int = 1) -> None:
        """Read on until so many lines have ``words``."""
        assert self._process.stderr is not None
        while sum(words in line for line in self.lines) < times:
            self.lines.append((await self._process.stderr.readline()).decode())
            assert self.lines[-1], "".join(self.lines)

    async def terminate(self) -> int:
        """Send it SIGTERM; its exit code."""
        assert self._process.stderr is not None
        self._process.send_signal(signal.SIGTERM)
        self.lines += (await self._process.stderr.read()).decode().splitlines(keepends=True)
        return await self._process.wait()

    def intake_pid(self) -> int:
        """The process id of its one intake."""
        (found,) = [pid for pid in marked_processes(self._mark) if b"learner.intake" in Path(f"/proc/{pid}/cmdline").read_bytes()]
        return found


async def start(flags: Sequence[str], mark: str) -> asyncio.subprocess.Process:
    command = (sys.executable, "-m", "learner", *flags)
    return await asyncio.create_subprocess_exec(*command, env=marked_environment(mark), stderr=asyncio.subprocess.PIPE)


@asynccontextmanager
async def learner(flags: Sequence[str]) -> AsyncGenerator[LearnerProcess]:
    """A learner with a broker, which the block ends; it has told of no error, and nothing of it is left."""
    mark, broker = uuid.uuid4().hex, embedded(load_config(None, flags).broker.address)
    await broker.start()
    try:
        one = LearnerProcess(await start(flags, mark), mark)
        async with asyncio.timeout(SECONDS):
            yield one
    finally:
        await broker.stop()
    assert not any("error: " in line or "Traceback" in line for line in one.lines), "".join(one.lines)
    assert marked_processes(mark) == []


@pytest.mark.parametrize("processes", ["1", "2"])
async def test_rank_0_starts_an_intake_and_ends_it_after_the_trainer(tmp_path: Path, processes: str) -> None:
    small_run = SmallRun(tmp_path)
    async with learner(small_run.flags(train__processes=processes)) as one:
        await one.wait_for_lines("the trainer connected", 2)  # first it looked whether the intake serves
        assert await one.terminate() == (0 if processes == "1" else 128 + signal.SIGTERM), "".join(one.lines)
    assert (small_run.run_dir / "checkpoints" / "step-000000" / "state").is_dir()
    assert any("the trainer left" in line for line in one.lines)


async def test_an_intake_that_cannot_start_is_said_and_ends_all(tmp_path: Path) -> None:
    small_run, mark = SmallRun(tmp_path), uuid.uuid4().hex
    small_run.train.unlink()
    process = await start(small_run.flags(), mark)
    async with asyncio.timeout(SECONDS):
        _, said = await process.communicate()
    errors = [line for line in said.decode().splitlines() if line.startswith("error: ")]
    assert str(small_run.train) in errors[0]
    assert errors[1] == errors[0].replace("error: ", "error: The intake ended with code 2: ")
    assert process.returncode == 2
    assert marked_processes(mark) == []


async def test_an_intake_that_is_killed_is_started_again_and_the_trainer_goes_on(tmp_path: Path) -> None:
    async with learner(SmallRun(tmp_path).flags()) as one:
        await one.wait_for_lines("the trainer connected", 2)  # first it looked whether the intake serves
        os.kill(one.intake_pid(), signal.SIGKILL)
        await one.wait_for_lines("The trainer waits for it.")
        await one.wait_for_lines("the intake is back after")
        assert await one.terminate() == 0, "".join(one.lines)
    assert sum("The intake ended with code -9: it reported no reason" in line for line in one.lines) == 1
