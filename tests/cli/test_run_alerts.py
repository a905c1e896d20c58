"""What `treegrpo up` says of a run that goes on all the same."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from pathlib import Path

import pytest
from pydantic import SecretStr

from services.cli.reports.metrics_client import open_metrics_client
from services.cli.reports.run_alerts import JOURNAL_BLOCKED, JOURNAL_SHORT, MISMATCH, TRAINER_BLOCKED, RunAlerts
from tests.ports import free_address, free_ports
from treegrpo.config.schema import Config
from treegrpo.observability.metrics import IntakeMetrics, TrainerMetrics, serve_metrics
from treegrpo.security.credentials import OPEN


def config(run_dir: Path, port: int = 0) -> Config:
    return Config.model_validate({"run": {"dir": str(run_dir)}, "learner": {"metrics": f"127.0.0.1:{port}"}})


@pytest.mark.parametrize(
    ("name", "begins", "over"),
    [
        (JOURNAL_SHORT, "is full: current leases finish, but no lease is granted; free space on it.", "has room again"),
        (JOURNAL_BLOCKED, "refuses the journal: nothing is acknowledged or granted", "takes the journal again."),
        (TRAINER_BLOCKED, "refuses the trainer's writes: the trainer waits; free space on it", "has taken what the trainer"),
    ],
)
async def test_a_full_disk_is_said_when_it_is_full_and_when_it_is_not_any_more(
    tmp_path: Path, name: str, begins: str, over: str
) -> None:
    said: list[str] = []
    alerts = RunAlerts(config(tmp_path), OPEN, said.append)
    for page in ({}, {name: 0.0}, {name: 1.0}, {name: 1.0}, {}, {name: 1.0}):  # a part that does not answer changes nothing
        alerts.update_alerts(page)
    assert [line.removeprefix(f"The disk of {tmp_path} ").startswith(begins) for line in said] == [True]
    assert alerts.trainer_blocked.is_set() == (name == TRAINER_BLOCKED)
    alerts.update_alerts({name: 0.0})
    assert len(said) == 2
    assert over in said[1]
    assert not alerts.trainer_blocked.is_set()


async def test_two_policies_at_lag_0_are_said_when_they_part_and_when_they_meet(tmp_path: Path) -> None:
    said: list[str] = []
    alerts = RunAlerts(config(tmp_path), OPEN, said.append)
    for value in (0.0, 0.0099, 0.011, 0.056, 0.002):
        alerts.update_alerts({MISMATCH: value})
    assert [line.split(":")[0] for line in said] == [
        "Sampler and trainer compute two policies",
        "Sampler and trainer agree again about what the policy is.",
    ]


async def test_a_newly_damaged_checkpoint_is_reported_once(tmp_path: Path) -> None:
    (tmp_path / "checkpoints" / "step-000002.damaged").mkdir(parents=True)
    said: list[str] = []
    alerts = RunAlerts(config(tmp_path), OPEN, said.append)
    new = tmp_path / "checkpoints" / "step-000004.damaged"
    new.mkdir()
    alerts.update_alerts({})
    alerts.update_alerts({})
    assert said == [f"A damaged checkpoint was renamed to {new}."]


async def test_it_is_read_from_the_pages_of_intake_and_trainer(tmp_path: Path) -> None:
    (port, _), said = free_ports(2), asyncio.Queue[str]()
    intake, trainer = IntakeMetrics(), TrainerMetrics()
    serve_metrics(intake, f"127.0.0.1:{port}", "learner.metrics", OPEN)
    serve_metrics(trainer, f"127.0.0.1:{port + 1}", "learner.metrics", OPEN)
    intake.journal_short.set(1)
    trainer.blocked.set(1)
    following = asyncio.create_task(RunAlerts(config(tmp_path, port), OPEN, said.put_nowait).follow_metrics())
    async with asyncio.timeout(10):
        assert "no lease is granted" in await said.get()
        assert "refuses the trainer's writes" in await said.get()
    following.cancel()
    await asyncio.gather(following, return_exceptions=True)


async def test_a_page_that_is_refused_is_as_good_as_none(tmp_path: Path) -> None:
    address = free_address()
    serve_metrics(IntakeMetrics(), address, "learner.metrics", replace(OPEN, metrics_token=SecretStr("secret")))
    async with open_metrics_client(OPEN) as read:
        assert await read(address) == {}
