"""A pause against what may happen meanwhile: the broker forgets, the learner drains, the operator speaks while nobody hears."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from learner.intake.coordinator.run_state import PAUSED_FILE, persist_pause_forever, restore_run_state
from services.sampler import service
from tests.control.broker_processes import Broker
from treegrpo.wire.control import ControlPlane, Member, RunState, publish_state

LEARNER = Member("learner", "learner", 1)


@pytest.mark.parametrize(
    ("retained", "noted", "then"),
    [
        (None, False, RunState.RUNNING),
        (None, True, RunState.PAUSED),
        (RunState.DRAINING, False, RunState.RUNNING),
        (RunState.DRAINING, True, RunState.PAUSED),
        (RunState.PAUSED, False, RunState.PAUSED),
        (RunState.RUNNING, True, RunState.RUNNING),
    ],
)
async def test_a_run_that_goes_on_is_paused_if_the_operator_said_so_last(
    broker: Broker, run: str, tmp_path: Path, retained: RunState | None, noted: bool, then: RunState
) -> None:
    if retained is not None:
        await publish_state(broker.address, run, retained)
    if noted:
        (tmp_path / PAUSED_FILE).touch()
    async with ControlPlane.connect(broker.address, run, LEARNER) as control:
        await restore_run_state(control, tmp_path)
        async with ControlPlane.connect(broker.address, run, Member("late", "sampler", 1)) as late:
            await late.wait_retained_state()
            assert late.announced_state is then


async def test_a_pause_is_noted_until_somebody_says_running(broker: Broker, run: str, tmp_path: Path) -> None:
    async with ControlPlane.connect(broker.address, run, LEARNER) as control, asyncio.timeout(30):
        noting = asyncio.create_task(persist_pause_forever(control, tmp_path))
        for state, noted in (("paused", True), ("draining", True), ("running", False)):
            await publish_state(broker.address, run, RunState(state))
            while control.announced_state is not RunState(state):
                await control.wait_change()
            await asyncio.sleep(0)  # whoever waits for the same change has had its turn
            assert (tmp_path / PAUSED_FILE).exists() == noted
        noting.cancel()
        await asyncio.gather(noting, return_exceptions=True)


async def test_a_sampler_started_while_the_run_drains_waits_for_its_end(
    broker: Broker, run: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", logger=service.__name__)
    await publish_state(broker.address, run, RunState.DRAINING)
    async with ControlPlane.connect(broker.address, run, Member("late", "sampler", 1)) as late, asyncio.timeout(30):
        starting = asyncio.create_task(service.wait_while_draining(late))
        await late.wait_retained_state()
        await asyncio.sleep(0)  # whoever waits for the same has had its turn
        assert "waiting until it is resumed" in caplog.text
        assert not starting.done()
        await publish_state(broker.address, run, RunState.RUNNING)
        await starting
