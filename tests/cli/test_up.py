"""The whole run on one machine: real processes, real gRPC, MQTT and HTTP, the shipped warm start."""

from __future__ import annotations

import asyncio
import os
import resource
import shlex
import signal
import sys
import uuid
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping
from pathlib import Path

import pytest

from services.cli.reports.progress_reader import read_progress
from services.cli.reports.summary import command_name
from services.cli.up import DRAIN_SECONDS
from tests.cli.command_harness import marked_environment, marked_processes, treegrpo
from tests.cli.small_run import SmallRun
from treegrpo.runtime.entrypoint import FAILED, TRANSIENT

SECONDS = 240.0
pytestmark = [pytest.mark.timeout(300), pytest.mark.whole_run]
FOREVER = "100000"


class UpProcess:
    """`treegrpo up` as a user sees it: its lines, its signals, its exit code."""

    def __init__(self, process: asyncio.subprocess.Process, mark: str) -> None:
        self.process = process
        self.lines: list[str] = []
        self.seconds = SECONDS
        """The longest that it may take to a line, or to its end."""
        self._mark = mark

    async def wait_for_line(self, part: str) -> str:
        """Read on to the next line with ``part``; fails at the end of the output."""
        assert self.process.stdout is not None
        async with asyncio.timeout(self.seconds):
            while line := (await self.process.stdout.readline()).decode():
                self.lines.append(line.rstrip())
                if part in line:
                    return line
        raise AssertionError(f"{part!r} was never said:\n" + "\n".join(self.lines))

    async def wait_for_end(self) -> int:
        """Read to the end; returns the exit code. Nothing is left running."""
        assert self.process.stdout is not None
        async with asyncio.timeout(self.seconds):
            self.lines += (await self.process.stdout.read()).decode().splitlines()
            code = await self.process.wait()
        assert marked_processes(self._mark) == []
        assert not any("Traceback" in line for line in self.lines), "\n".join(self.lines)
        return code

    @property
    def pids(self) -> list[int]:
        """All its processes."""
        return marked_processes(self._mark)

    def pid_of(self, module: str, variable: str = "") -> int:
        """A running process of ``module``, with ``variable`` in its environment."""
        names = {
            pid: Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
            for pid in self.pids
            if variable.encode() in Path(f"/proc/{pid}/environ").read_bytes()
        }
        return next(pid for pid, words in names.items() if module.encode() in words and not words[3].endswith(b"parent_death.py"))


Up = Callable[..., Awaitable[UpProcess]]


@pytest.fixture
async def up() -> AsyncGenerator[Up]:
    """Starts `treegrpo up`; kills what a failing test leaves, and its parts with it."""
    runs: list[UpProcess] = []

    async def start(*flags: str, program: str = "services.cli.main", variables: Mapping[str, str] | None = None) -> UpProcess:
        mark, command = uuid.uuid4().hex, [sys.executable, "-m", program, "up", *flags]
        output, given = asyncio.subprocess.PIPE, {**marked_environment(mark), **(variables or {})}
        process = await asyncio.create_subprocess_exec(
            *command, env=given, stdout=output, stderr=asyncio.subprocess.STDOUT, stdin=asyncio.subprocess.DEVNULL
        )
        runs.append(UpProcess(process, mark))
        return runs[-1]

    yield start
    for run in runs:
        if run.process.returncode is None:
            run.process.kill()
            await run.process.wait()


@pytest.fixture
def small_run(tmp_path: Path) -> SmallRun:
    return SmallRun(tmp_path)


async def set_state(small_run: SmallRun, state: str) -> None:
    """`treegrpo state`, to its end."""
    assert (await asyncio.to_thread(treegrpo, "state", state, *small_run.flags())).code == 0


SURROUNDINGS = {
    **dict.fromkeys(("http_proxy", "https_proxy", "all_proxy", "grpc_proxy"), "http://127.0.0.1:9"),
    "no_proxy": "",
    "NO_PROXY": "",
    "WORLD_SIZE": "2",
    "RANK": "0",
    "LOCAL_RANK": "0",
    "MASTER_ADDR": "127.0.0.1",
    "MASTER_PORT": "9",
    "PROMETHEUS_MULTIPROC_DIR": "/nowhere",
    "SSLKEYLOGFILE": "/nowhere/keys",
    "MPLBACKEND": "nonsense",
    "COLUMNS": "0",
    "PYTHONIOENCODING": "latin-1",
    "PYTHONWARNINGS": "error",
    "PYTHONOPTIMIZE": "2",
}
"""What shells, pods and development machines set, at its worst."""


async def test_a_run_trains_to_its_end_and_sums_up_and_is_not_begun_again(tmp_path: Path, up: Up) -> None:
    folder = tmp_path / "lr$a_$b [red] :smile:"
    folder.mkdir()
    small_run = SmallRun(folder)
    run = await up(*small_run.flags(sampler__count="2"), variables=SURROUNDINGS)
    assert await run.wait_for_end() == 0
    progress = read_progress(small_run.run_dir)
    assert [step.step for step in progress.steps] == [1, 2]
    assert [record.step for record in progress.evals] == [0, 2]
    final = small_run.run_dir / "checkpoints" / "final"
    assert run.lines[-5].startswith("held-out EM: ")
    assert run.lines[-2:] == [
        f"checkpoint: {final} (Hugging Face format)",
        f"next: {command_name()} eval --model.path {shlex.quote(str(final))}",
    ]
    assert (small_run.run_dir / "progress.png").is_file()
    assert {log.stem for log in (small_run.run_dir / "logs").iterdir()} == {
        *("broker", "retriever", "intake", "trainer", "sampler-0", "sampler-1")
    }

    again = await asyncio.to_thread(treegrpo, "up", *small_run.flags())
    assert (again.code, again.left) == (0, [])
    assert again.out == (
        f"The run in {small_run.run_dir} is finished: step 2 of 2 is done, and its model is in {final}. "
        "Raise train.steps to continue it, or choose another run.dir for a new run.\n"
    )
    other = await asyncio.to_thread(treegrpo, "up", *small_run.flags(train__steps="3", run__seed="8", rollout__trees="3"))
    assert (other.code, other.left) == (2, [])
    assert "run.seed was 0 and is 8, rollout.trees was 2 and is 3. Set them back" in other.sentence


async def test_a_second_command_is_refused_and_the_first_resumes_after_ctrl_c(
    small_run: SmallRun, up: Up, tmp_path: Path
) -> None:
    run = await up(*small_run.flags(train__steps=FOREVER))
    await run.wait_for_line("The broker is ready")
    (tmp_path / "elsewhere").mkdir()
    keys = SmallRun(tmp_path / "elsewhere").keys
    ports = {key: keys[key] for key in ("broker.address", "retriever.listen", "learner.listen", "learner.metrics")}
    flags = small_run.flags(train__steps=FOREVER, **{key.replace(".", "__"): value for key, value in ports.items()})
    second = await asyncio.to_thread(treegrpo, "up", *flags)
    assert (second.code, second.left, second.out) == (FAILED, [], "")
    assert second.sentence.startswith(f"Another `treegrpo up` or `treegrpo learner` works on the run in {small_run.run_dir}; ")

    await run.wait_for_line("step 1/")
    os.kill(run.pid_of("services.sampler"), signal.SIGKILL)
    await run.wait_for_line("starting it again")
    await run.wait_for_line("step ")
    run.process.send_signal(signal.SIGINT)
    assert await run.wait_for_end() == 0
    assert run.lines[-1].startswith(f"continue: {command_name()} up ")

    done = read_progress(small_run.run_dir).steps[-1].step
    again = await up(*small_run.flags(train__steps=str(done + 1)))
    assert await again.wait_for_end() == 0
    assert again.lines[0].startswith(f"Continuing the run in {small_run.run_dir} after step {done} of {done + 1}; each process")
    progress = read_progress(small_run.run_dir)
    assert [step.step for step in progress.steps] == list(range(1, done + 2))
    assert progress.steps[-1].version == f"1.{done + 1}"


async def test_a_second_ctrl_c_stops_all_ranks_at_once(small_run: SmallRun, up: Up) -> None:
    run = await up(*small_run.flags(train__steps=FOREVER, train__processes="2"))
    await run.wait_for_line("step 1/")
    run.process.send_signal(signal.SIGINT)
    run.process.send_signal(signal.SIGTERM)
    assert await run.wait_for_end() == 130


async def test_a_run_comes_to_its_end_whatever_part_of_it_is_killed(small_run: SmallRun, up: Up) -> None:
    parts = {"trainer": "learner.trainer", "intake": "learner.intake", "retriever": "services.retriever"}
    run = await up(*small_run.flags(train__steps="40", train__checkpoint_every="1"))
    for part, module in {**parts, "broker": "services.broker.server"}.items():
        await run.wait_for_line("step ")
        os.kill(run.pid_of(module), signal.SIGKILL)
        await run.wait_for_line(f"The {part} was killed by signal 9 (SIGKILL); ")
        if part != "trainer":
            await run.wait_for_line(f"The {part} is ready again after ")
    assert await run.wait_for_end() == 0
    progress = read_progress(small_run.run_dir)
    assert [step.step for step in progress.steps] == list(range(1, 41))
    assert progress.evals[-1].step == 40


async def test_a_dead_rank_restarts_the_trainer_and_ranks_drain_together(small_run: SmallRun, up: Up) -> None:
    run = await up(*small_run.flags(train__steps=FOREVER, train__processes="2"))
    await run.wait_for_line("step 1/")
    os.kill(run.pid_of("learner.trainer", variable="RANK=1"), signal.SIGKILL)
    lost = "Rank 1 of the trainer was killed by signal 9; probably out of memory."
    await run.wait_for_line(f"The trainer ended with code {TRANSIENT}: {lost} (log: ")
    await run.wait_for_line("held-out after step 0")
    await run.wait_for_line("step 1/")
    run.process.send_signal(signal.SIGINT)
    assert await run.wait_for_end() == 0


async def test_a_paused_run_that_drains_is_still_paused_when_it_is_resumed(small_run: SmallRun, up: Up) -> None:
    run = await up(*small_run.flags(train__steps=FOREVER))
    await run.wait_for_line("step 1/")
    await set_state(small_run, "paused")
    line = await run.wait_for_line("The run is paused; go on with: ")
    resume = [command_name(), "state", "running", *small_run.flags(train__steps=FOREVER)]
    assert line.rstrip() == f"The run is paused; go on with: {shlex.join(resume)}"
    await set_state(small_run, "draining")
    await run.wait_for_line("Draining: ")
    assert await run.wait_for_end() == 0
    assert run.lines[-1].startswith(f"continue: {command_name()} up ")

    done = read_progress(small_run.run_dir).steps[-1].step
    again = await up(*small_run.flags(train__steps=str(done + 1)))
    await again.wait_for_line("Continuing the run")
    await again.wait_for_line("The run is paused; go on with: ")
    assert not any("step " in line for line in again.lines[1:]), again.lines
    await set_state(small_run, "running")
    assert await again.wait_for_end() == 0
    assert any("no longer paused" in line for line in again.lines)
    assert read_progress(small_run.run_dir).steps[-1].step == done + 1


@pytest.mark.parametrize("module", ["learner.trainer", "learner.intake", "services.broker.server"])
async def test_ctrl_c_during_a_restart_delay_ends_the_run_in_order(small_run: SmallRun, up: Up, module: str) -> None:
    run = await up(*small_run.flags(train__steps=FOREVER), program="tests.cli.programs.slow_restart")
    await run.wait_for_line("step 1/")
    os.kill(run.pid_of(module), signal.SIGKILL)
    await run.wait_for_line("starting it again in 3600 s")
    run.process.send_signal(signal.SIGINT)
    assert await run.wait_for_end() == 0
    assert run.lines[-1].startswith(f"continue: {command_name()} up ")
    assert any("about to be started again" in line for line in run.lines) == (module == "learner.trainer")
    assert any((small_run.run_dir / "checkpoints").glob("step-*")) == (module != "learner.trainer")


async def test_an_error_that_stays_ends_the_run_with_its_sentence(small_run: SmallRun, up: Up) -> None:
    run = await up(*small_run.flags(train__steps=FOREVER, train__checkpoint_every="1"))
    await run.wait_for_line("step 2/")  # a checkpoint of the first stands
    small_run.train.write_text("{}\n")
    os.kill(run.pid_of("learner.intake"), signal.SIGKILL)
    assert await run.wait_for_end() == FAILED
    (error,) = [line for line in run.lines if line.startswith("error: ")]
    assert error.startswith(f"error: The intake ended with code 2: {small_run.train}, row 1: ")
    assert run.lines[-1].startswith(f"fix that, then continue: {command_name()} up ")


async def test_ctrl_c_while_the_trainer_waits_for_its_disk_ends_the_run_soon(small_run: SmallRun, up: Up) -> None:
    run = await up(*small_run.flags(train__steps=FOREVER, train__checkpoint_every="1"))
    await run.wait_for_line("step 2/")
    resource.prlimit(run.pid_of("learner.trainer"), resource.RLIMIT_FSIZE, (1 << 20, resource.RLIM_INFINITY))  # no weights fit
    await run.wait_for_line(f"The disk of {small_run.run_dir} refuses the trainer's writes: the trainer waits")
    run.process.send_signal(signal.SIGINT)
    async with asyncio.timeout(DRAIN_SECONDS / 4):
        assert await run.wait_for_end() == TRANSIENT
    (error,) = [line for line in run.lines if line.startswith("error: ")]
    assert error.startswith(f"error: The trainer ended with code {TRANSIENT}: ")
    assert "free space on its disk" in error
    assert run.lines[-1].startswith(f"continue: {command_name()} up ")
