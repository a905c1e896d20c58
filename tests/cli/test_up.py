"""The whole run on one machine: real processes, real gRPC, MQTT and HTTP, the shipped warm start."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
import uuid
from pathlib import Path

import pytest

from services.cli.progress import read_progress
from services.cli.summary import program
from tests.cli.machine import environment, marked
from tests.cli.workbench import Workbench

SECONDS = 100.0
FOREVER = "100000"


class Running:
    """`treegrpo up` as a user sees it: its lines, its signals, its exit code."""

    def __init__(self, process: asyncio.subprocess.Process, mark: str) -> None:
        self.process = process
        self.lines: list[str] = []
        self._mark = mark

    async def line(self, part: str) -> str:
        """Read on to the next line with ``part``; fails at the end of the output."""
        assert self.process.stdout is not None
        async with asyncio.timeout(SECONDS):
            while line := (await self.process.stdout.readline()).decode():
                self.lines.append(line.rstrip())
                if part in line:
                    return line
        raise AssertionError(f"{part!r} was never said:\n" + "\n".join(self.lines))

    async def end(self) -> int:
        """Read to the end; returns the exit code. Nothing is left running."""
        assert self.process.stdout is not None
        async with asyncio.timeout(SECONDS):
            self.lines += (await self.process.stdout.read()).decode().splitlines()
            code = await self.process.wait()
        assert marked(self._mark) == []
        assert not any("Traceback" in line for line in self.lines), "\n".join(self.lines)
        return code

    def pid_of(self, module: str, variable: str = "") -> int:
        """A running process of ``module``, with ``variable`` in its environment."""
        names = {
            pid: Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
            for pid in marked(self._mark)
            if variable.encode() in Path(f"/proc/{pid}/environ").read_bytes()
        }
        return next(pid for pid, words in names.items() if module.encode() in words and b"treegrpo.leash" not in words)


async def up(*flags: str) -> Running:
    mark = uuid.uuid4().hex
    command = [sys.executable, "-m", "services.cli.main", "up", *flags]
    output = asyncio.subprocess.PIPE
    process = await asyncio.create_subprocess_exec(
        *command, env=environment(mark), stdout=output, stderr=asyncio.subprocess.STDOUT, stdin=asyncio.subprocess.DEVNULL
    )
    return Running(process, mark)


@pytest.fixture
def bench(tmp_path: Path) -> Workbench:
    return Workbench(tmp_path)


async def test_a_run_trains_to_its_end_and_sums_up(bench: Workbench) -> None:
    run = await up(*bench.flags(sampler__count="2"))
    assert await run.end() == 0
    progress = read_progress(bench.run_dir)
    assert [step.step for step in progress.steps] == [1, 2]
    assert [record.step for record in progress.evals] == [0, 2]
    final = bench.run_dir / "checkpoints" / "final"
    assert run.lines[-5].startswith("held-out EM: ")
    assert run.lines[-2:] == [f"checkpoint: {final} (Hugging Face format)", f"next: {program()} eval --model.path {final}"]
    assert (bench.run_dir / "progress.png").is_file()
    assert {log.stem for log in (bench.run_dir / "logs").iterdir()} == {
        *("broker", "retriever", "intake", "trainer", "sampler-0", "sampler-1")
    }


async def test_a_dead_sampler_is_replaced_and_ctrl_c_leaves_a_checkpoint_to_resume_from(bench: Workbench) -> None:
    run = await up(*bench.flags(train__steps=FOREVER))
    await run.line("step 1/")
    os.kill(run.pid_of("services.sampler"), signal.SIGKILL)
    await run.line("starting it again")
    await run.line("step ")
    run.process.send_signal(signal.SIGINT)
    assert await run.end() == 0
    assert run.lines[-1].startswith(f"go on: {program()} up ")
    assert run.lines[-1].endswith("--resume")

    done = read_progress(bench.run_dir).steps[-1].step
    resumed = await up(*bench.flags(train__steps=str(done + 1)), "--resume")
    assert await resumed.end() == 0
    progress = read_progress(bench.run_dir)
    assert [step.step for step in progress.steps] == list(range(1, done + 2))
    assert progress.steps[-1].version == f"1.{done + 1}"


@pytest.mark.parametrize("processes", ["1", "2"])
async def test_a_second_ctrl_c_stops_at_once(bench: Workbench, processes: str) -> None:
    run = await up(*bench.flags(train__steps=FOREVER, train__processes=processes))
    await run.line("step 1/")
    run.process.send_signal(signal.SIGINT)
    run.process.send_signal(signal.SIGTERM)
    assert await run.end() == 130


async def test_the_death_of_the_trainer_ends_the_run_with_a_sentence(bench: Workbench) -> None:
    run = await up(*bench.flags(train__steps=FOREVER))
    await run.line("step 1/")
    os.kill(run.pid_of("learner.trainer"), signal.SIGKILL)
    assert await run.end() == 2
    assert run.lines[-1].startswith("error: The trainer ended by signal 9: ")


async def test_the_death_of_a_rank_is_the_death_of_the_trainer(bench: Workbench) -> None:
    run = await up(*bench.flags(train__steps=FOREVER, train__processes="2"))
    await run.line("step 1/")
    os.kill(run.pid_of("learner.trainer", variable="RANK=1"), signal.SIGKILL)
    assert await run.end() == 2
    lost = "Rank 0 of the trainer lost another; the log has why that one ended."
    assert run.lines[-1].startswith(f"error: The trainer ended with code 2: {lost} (log: ")


async def test_ranks_drain_together(bench: Workbench) -> None:
    run = await up(*bench.flags(train__steps=FOREVER, train__processes="2"))
    await run.line("step 1/")
    run.process.send_signal(signal.SIGINT)
    assert await run.end() == 0
    assert run.lines[-1].startswith(f"go on: {program()} up ")
    assert not any("error: " in log.read_text() for log in (bench.run_dir / "logs").iterdir())
