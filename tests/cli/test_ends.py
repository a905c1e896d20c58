"""How a run ends, whatever ended it and in whatever order its parts end: small programs for intake and trainer, a real broker."""

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
from services.cli.processes.readiness import wait_ready
from services.cli.reports.live_view import Screen
from tests.cli.workbench import Workbench
from tests.control.brokers import embedded
from treegrpo.config.loader import load_config
from treegrpo.errors import PartError, UnavailableError
from treegrpo.runtime.entrypoint import exit_code
from treegrpo.security.credentials import OPEN
from treegrpo.wire.control import RunState, publish_state

SECONDS = 60.0
NOWHERE, FULL = "The run leads nowhere.", "The disk is full."
GIVES_UP = ("--code", "2", "--report", NOWHERE)


class FakeScreen:
    """What is said."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def say(self, line: str) -> None:
        self.lines.append(line)

    def paused(self, _line: str) -> None: ...

    @asynccontextmanager
    async def follow(self, *_: object) -> AsyncGenerator[None]:
        yield


class House:
    """A run of small programs."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.bench = Workbench(folder)
        self.config = load_config(None, self.bench.flags(broker__embedded="false"))
        self.screen = FakeScreen()
        self.broker = embedded(self.config.broker.address)
        self._monkeypatch = monkeypatch

        async def ready(*_: object) -> None: ...

        monkeypatch.setattr(up, "learner_ready", ready)
        monkeypatch.setattr(up.Run, "check", ready)

    @asynccontextmanager
    async def run(self, intake: tuple[str, ...] = (), trainer: tuple[str, ...] = ()) -> AsyncGenerator[asyncio.Task[int]]:
        """`treegrpo learner` at work."""
        broker = ("--broker", self.config.broker.address)
        for name, flags in (("INTAKE", intake), ("TRAINER", ("--follow", "yes", *trainer))):
            self._monkeypatch.setattr(up, name, Program(name.lower(), "tests.cli.programs.part", (*broker, *flags)))
        await self.broker.start()
        run = up.Run(self.config, [], cast("Screen", self.screen), "", everything=False)
        task = asyncio.create_task(run())
        try:
            for name in ("intake", "trainer"):
                await wait_ready(name, lambda name=name: self._pid(name), SECONDS)
            yield task
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
            await self.broker.stop()

    async def _pid(self, name: str) -> None:
        log = self.bench.run_dir / "logs" / f"{name}.log"
        if not log.exists() or "pid " not in log.read_text():
            raise UnavailableError("not yet")

    def log(self, name: str) -> str:
        return (self.bench.run_dir / "logs" / f"{name}.log").read_text()

    def fault(self, name: str) -> None:
        os.kill(int(self.log(name).split("pid ")[1].split()[0]), signal.SIGUSR1)

    async def drain(self) -> None:
        await publish_state(self.config.broker.address, "test", RunState.DRAINING, OPEN)


@pytest.fixture
def house(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> House:
    return House(tmp_path, monkeypatch)


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
    house: House, intake: tuple[str, ...], trainer: tuple[str, ...]
) -> None:
    async with house.run(intake, trainer) as run:
        house.fault("intake")
        with pytest.raises(PartError, match=f"The intake ended with code 2: {NOWHERE}") as ended:
            await asyncio.wait_for(run, SECONDS)
    assert exit_code(ended.value) == 2
    assert "a checkpoint" in house.log("trainer")


async def test_a_drain_that_fails_ends_with_its_reason_and_code(house: House) -> None:
    async with house.run(trainer=("--code", "75", "--report", FULL)) as run:
        await house.drain()
        with pytest.raises(PartError, match=f"The trainer ended with code 75: {FULL}") as ended:
            await asyncio.wait_for(run, SECONDS)
    assert exit_code(ended.value) == 75


@pytest.mark.parametrize("how", ["state", "terminal", "no broker"])
async def test_somebodys_drain_is_a_good_end(house: House, how: str) -> None:
    async with house.run() as run:
        if how == "state":
            await house.drain()
        if how == "no broker":
            await house.broker.stop()
        for number in {"terminal": [signal.SIGHUP] * 2, "no broker": [signal.SIGTERM]}.get(how, []):
            os.kill(os.getpid(), number)  # the second SIGHUP does not hurry
        assert await asyncio.wait_for(run, SECONDS) == 0
    assert "a checkpoint" in house.log("trainer")
    assert any("could not be set" in line for line in house.screen.lines) == (how == "no broker")


def test_ctrl_c_before_anything_is_started_is_the_last_word(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(_arguments: object) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr(main, "isolate_process", lambda: None)
    monkeypatch.setattr("sys.argv", ["treegrpo", "doctor"])
    monkeypatch.setattr(main, "run", interrupted)
    with pytest.raises(SystemExit) as ended:
        main.main()
    assert ended.value.code == main.INTERRUPTED
    assert capsys.readouterr().err == "Stopped by Ctrl-C before it was done.\n"
