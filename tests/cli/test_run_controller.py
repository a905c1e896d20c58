"""How `RunController` ends a run, for each cause and order of ends: small programs for intake and trainer, a real broker."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import cast

import pytest

from services.cli import main, up
from services.cli.processes.program import Program
from services.cli.processes.readiness import wait_until_ready
from services.cli.reports.live_view import LiveView
from services.cli.up import RunController, RunPrograms
from tests.cli.small_run import SmallRun
from tests.control.broker_processes import embedded
from treegrpo.config.loader import load_config
from treegrpo.errors import PartError, UnavailableError
from treegrpo.runtime.entrypoint import exit_code
from treegrpo.security.credentials import OPEN
from treegrpo.wire.control import RunState, publish_state

SECONDS = 60.0
NOWHERE, FULL = "The run makes no progress.", "The disk is full."
GIVES_UP = ("--code", "2", "--report", NOWHERE)


class FakeLiveView:
    """Records the printed lines."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def print_line(self, line: str) -> None:
        self.lines.append(line)

    def show_paused(self, _sentence: str) -> None: ...

    @asynccontextmanager
    async def follow_run(self, *_: object) -> AsyncGenerator[None]:
        yield


class SmallProgramRun:
    """A run whose intake and trainer are small programs."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.small_run = SmallRun(folder)
        self.config = load_config(None, self.small_run.flags(broker__embedded="false"))
        self.view = FakeLiveView()
        self.broker = embedded(self.config.broker.address)

        async def ready(*_: object) -> None: ...

        monkeypatch.setattr(up, "probe_learner", ready)
        monkeypatch.setattr(up.RunController, "check_configuration", ready)

    @asynccontextmanager
    async def running(self, intake: tuple[str, ...] = (), trainer: tuple[str, ...] = ()) -> AsyncGenerator[asyncio.Task[int]]:
        """`treegrpo learner` at work."""
        broker = ("--broker", self.config.broker.address)
        programs = RunPrograms(
            intake=Program("intake", "tests.cli.programs.fake_part", (*broker, *intake)),
            trainer=Program("trainer", "tests.cli.programs.fake_part", (*broker, "--follow", "yes", *trainer)),
        )
        await self.broker.start()
        controller = RunController(self.config, [], cast("LiveView", self.view), "", everything=False, programs=programs)
        task = asyncio.create_task(controller())
        try:
            for name in ("intake", "trainer"):
                await wait_until_ready(name, lambda name=name: self._pid(name), SECONDS)
            yield task
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
            await self.broker.stop()

    async def _pid(self, name: str) -> None:
        log = self.small_run.run_dir / "logs" / f"{name}.log"
        if not log.exists() or "pid " not in log.read_text():
            raise UnavailableError("not yet")

    def log(self, name: str) -> str:
        return (self.small_run.run_dir / "logs" / f"{name}.log").read_text()

    def trigger_fault(self, name: str) -> None:
        os.kill(int(self.log(name).split("pid ")[1].split()[0]), signal.SIGUSR1)

    async def publish_draining(self) -> None:
        await publish_state(self.config.broker.address, "test", RunState.DRAINING, OPEN)


@pytest.fixture
def fixture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> SmallProgramRun:
    return SmallProgramRun(tmp_path, monkeypatch)


@pytest.mark.parametrize(
    ("intake", "trainer"),
    [
        (("--fault", "says", *GIVES_UP), ()),
        (("--fault", "late", *GIVES_UP), ()),
        (GIVES_UP, ()),
        (GIVES_UP, ("--code", "75", "--report", FULL)),
        (("--fault", "late", *GIVES_UP), ("--code", "75", "--report", FULL)),
    ],
)
async def test_an_intake_that_gives_up_is_why_the_run_ends_in_whatever_order(
    fixture: SmallProgramRun, intake: tuple[str, ...], trainer: tuple[str, ...]
) -> None:
    async with fixture.running(intake, trainer) as run:
        fixture.trigger_fault("intake")
        with pytest.raises(PartError, match=f"The intake ended with code 2: {NOWHERE}") as ended:
            await asyncio.wait_for(run, SECONDS)
    assert exit_code(ended.value) == 2
    assert "a checkpoint" in fixture.log("trainer")


async def test_a_drain_that_fails_ends_with_its_reason_and_code(fixture: SmallProgramRun) -> None:
    async with fixture.running(trainer=("--code", "75", "--report", FULL)) as run:
        await fixture.publish_draining()
        with pytest.raises(PartError, match=f"The trainer ended with code 75: {FULL}") as ended:
            await asyncio.wait_for(run, SECONDS)
    assert exit_code(ended.value) == 75


@pytest.mark.parametrize("how", ["state", "terminal", "no broker"])
async def test_somebodys_drain_is_a_good_end(fixture: SmallProgramRun, how: str) -> None:
    async with fixture.running() as run:
        if how == "state":
            await fixture.publish_draining()
        if how == "no broker":
            await fixture.broker.stop()
        for number in {"terminal": [signal.SIGHUP] * 2, "no broker": [signal.SIGTERM]}.get(how, []):
            os.kill(os.getpid(), number)  # the second SIGHUP does not hurry
        assert await asyncio.wait_for(run, SECONDS) == 0
    assert "a checkpoint" in fixture.log("trainer")
    assert any("could not be set" in line for line in fixture.view.lines) == (how == "no broker")


def test_ctrl_c_before_anything_is_started_is_the_last_word(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(_arguments: object) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr(main, "isolate_process", lambda: None)
    monkeypatch.setattr("sys.argv", ["treegrpo", "doctor"])
    monkeypatch.setattr(main, "run_command", interrupted)
    with pytest.raises(SystemExit) as ended:
        main.main()
    assert ended.value.code == main.INTERRUPTED
    assert capsys.readouterr().err == "Stopped by Ctrl-C before it was done.\n"
