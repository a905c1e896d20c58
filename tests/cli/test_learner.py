"""`python -m learner`: intake and trainer without a roof over them."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
import uuid
from pathlib import Path

import pytest

from tests.cli.machine import environment, marked
from tests.cli.workbench import Workbench
from tests.control.brokers import embedded
from treegrpo.settings import load

SECONDS = 100.0


@pytest.mark.parametrize("processes", ["1", "2"])
async def test_rank_0_starts_an_intake_and_ends_it_after_the_trainer(tmp_path: Path, processes: str) -> None:
    bench, mark = Workbench(tmp_path), uuid.uuid4().hex
    flags = bench.flags(train__processes=processes)
    broker = embedded(load(None, flags).broker.address)
    await broker.start()
    try:
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "learner", *flags), env=environment(mark), stderr=asyncio.subprocess.PIPE
        )
        assert process.stderr is not None
        said: list[str] = []
        async with asyncio.timeout(SECONDS):
            while sum("the trainer connected" in line for line in said) < 2:  # first it looked whether the intake serves
                said.append((await process.stderr.readline()).decode())
                assert said[-1], "".join(said)
            process.send_signal(signal.SIGTERM)
            said += (await process.stderr.read()).decode().splitlines(keepends=True)
            assert await process.wait() == (0 if processes == "1" else 128 + signal.SIGTERM), "".join(said)
    finally:
        await broker.stop()
    assert (bench.run_dir / "checkpoints" / "step-000000" / "state").is_dir()
    assert any("the trainer left" in line for line in said)
    assert not any("error: " in line or "Traceback" in line for line in said), "".join(said)
    assert marked(mark) == []


async def test_an_intake_that_cannot_start_is_said_and_ends_all(tmp_path: Path) -> None:
    bench, mark = Workbench(tmp_path), uuid.uuid4().hex
    bench.train.unlink()
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "learner", *bench.flags()), env=environment(mark), stderr=asyncio.subprocess.PIPE
    )
    async with asyncio.timeout(SECONDS):
        _, said = await process.communicate()
    errors = [line for line in said.decode().splitlines() if line.startswith("error: ")]
    assert str(bench.train) in errors[0]
    assert errors[1] == "error: The intake ended with code 2 before it served; its last words are above."
    assert process.returncode == 2
    assert marked(mark) == []


def intake_of(mark: str) -> int:
    """The process id of the one intake that inherited ``mark``."""
    (found,) = [pid for pid in marked(mark) if b"learner.intake" in Path(f"/proc/{pid}/cmdline").read_bytes()]
    return found


async def test_an_intake_that_is_killed_is_started_again_and_the_trainer_goes_on(tmp_path: Path) -> None:
    bench, mark = Workbench(tmp_path), uuid.uuid4().hex
    flags = bench.flags()
    broker = embedded(load(None, flags).broker.address)
    await broker.start()
    try:
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "learner", *flags), env=environment(mark), stderr=asyncio.subprocess.PIPE
        )
        assert process.stderr is not None
        said: list[str] = []

        async def heard(words: str) -> None:
            while not any(words in line for line in said):
                said.append((await process.stderr.readline()).decode())  # pyright: ignore[reportOptionalMemberAccess]
                assert said[-1], "".join(said)

        async with asyncio.timeout(SECONDS):
            await heard("the trainer left")  # it only looked whether the intake serves
            await heard("the trainer connected")
            os.kill(intake_of(mark), signal.SIGKILL)
            await heard("The trainer waits for it.")
            await heard("the intake is back after")
            process.send_signal(signal.SIGTERM)
            said += (await process.stderr.read()).decode().splitlines(keepends=True)
            assert await process.wait() == 0, "".join(said)
    finally:
        await broker.stop()
    assert sum("the intake ended with code -9 and is started again" in line for line in said) == 1
    assert not any("error: " in line or "Traceback" in line for line in said), "".join(said)
    assert marked(mark) == []
