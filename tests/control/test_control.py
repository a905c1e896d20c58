from __future__ import annotations

import asyncio
import logging
import sys
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager

import aiomqtt
import pytest

from tests.control.broker_processes import Broker
from tests.ports import free_address
from treegrpo.core.step import PolicyVersion
from treegrpo.errors import UnavailableError
from treegrpo.net.address import split_address
from treegrpo.wire.control import ControlPlane, Member, RunState, publish_state

SECONDS = 30.0
VERSION = PolicyVersion(1, 7)

SAMPLER = """
import asyncio, sys
from treegrpo.wire.control import ControlPlane, Member

async def main():
    async with ControlPlane.connect(sys.argv[1], sys.argv[2], Member("doomed", "sampler", 5)):
        await asyncio.get_running_loop().create_future()

asyncio.run(main())
"""


def join(broker: Broker, run: str, name: str, incarnation: int = 1) -> AbstractAsyncContextManager[ControlPlane]:
    role = "learner" if name == "learner" else "operator"  # who reads everything, unlike a sampler
    return ControlPlane.connect(broker.address, run, Member(name, role, incarnation))


def there(plane: ControlPlane, name: str) -> list[Member]:
    """Those called ``name`` that are alive."""
    return [member for member in plane.members.values() if member.id == name and member.alive]


async def until(plane: ControlPlane, condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(SECONDS):
        while not condition():
            await plane.wait_change()


def raw(broker: Broker) -> aiomqtt.Client:
    host, port = split_address(broker.address, "broker.address")
    return aiomqtt.Client(host, port)


async def test_a_late_comer_finds_state_version_and_members(broker: Broker, run: str) -> None:
    async with join(broker, run, "learner") as learner:
        await learner.set_state(RunState.PAUSED)
        await learner.announce_version(VERSION)
        async with join(broker, run, "late") as late:
            await until(late, lambda: late.version == VERSION and late.state is RunState.PAUSED and bool(there(late, "learner")))


async def test_everybody_hears_changes(broker: Broker, run: str) -> None:
    async with join(broker, run, "learner") as learner, join(broker, run, "a") as a, join(broker, run, "b") as b:
        await learner.announce_version(VERSION)
        await learner.set_state(RunState.DRAINING)
        for plane in (learner, a, b):
            await until(plane, lambda plane=plane: plane.version == VERSION and plane.state is RunState.DRAINING)


async def test_the_state_can_be_set_from_outside(broker: Broker, run: str) -> None:
    async with join(broker, run, "learner") as learner:
        await publish_state(broker.address, run, RunState.PAUSED)
        await until(learner, lambda: learner.state is RunState.PAUSED)


async def test_another_run_on_the_same_broker_hears_nothing(broker: Broker, run: str) -> None:
    async with join(broker, run, "learner") as learner:
        await publish_state(broker.address, f"{run}-other", RunState.DRAINING)
        await publish_state(broker.address, run, RunState.PAUSED)
        await until(learner, lambda: learner.state is not RunState.RUNNING)
        assert learner.state is RunState.PAUSED


async def test_a_member_that_leaves_says_so(broker: Broker, run: str) -> None:
    async with join(broker, run, "learner") as learner:
        async with join(broker, run, "guest"):
            await until(learner, lambda: bool(there(learner, "guest")))
        await until(learner, lambda: not there(learner, "guest"))


async def test_the_last_will_tells_of_a_member_that_was_killed(broker: Broker, run: str) -> None:
    async with join(broker, run, "learner") as learner:
        doomed = await asyncio.create_subprocess_exec(sys.executable, "-c", SAMPLER, broker.address, run)
        await until(learner, lambda: bool(there(learner, "doomed")))
        doomed.kill()
        await doomed.wait()
        await until(learner, lambda: not there(learner, "doomed"))
        assert learner.members["doomed@0000000000000005"].incarnation == 5


async def test_a_late_will_of_an_earlier_connection_buries_nobody(broker: Broker, run: str) -> None:
    async with join(broker, run, "learner") as learner, join(broker, run, "guest", 2) as anonymous, raw(broker) as ghost:
        await until(learner, lambda: bool(there(learner, "guest")))
        will = Member("guest", "operator", 2, alive=False)
        await ghost.publish(f"treegrpo/{run}/{will.topic}", will.payload(), qos=1, retain=True)
        await until(learner, lambda: not there(learner, "guest"))
        await until(learner, lambda: there(learner, "guest") == [Member("guest", "operator", 2)])
        await until(anonymous, lambda: bool(there(anonymous, "guest")))


async def test_after_the_broker_restarts_everything_is_there_again(broker: Broker, run: str) -> None:
    async with join(broker, run, "learner") as learner:
        await learner.announce_version(VERSION)
        await learner.set_state(RunState.PAUSED)
        await until(learner, lambda: learner.version == VERSION)
        await broker.stop()
        await broker.start()
        async with join(broker, run, "late") as late:
            await until(late, lambda: late.version == VERSION and late.state is RunState.PAUSED and bool(there(late, "learner")))


async def test_a_state_set_from_outside_outlives_a_restart_of_the_broker(broker: Broker, run: str) -> None:
    async with join(broker, run, "learner") as learner:
        await learner.set_state(RunState.RUNNING)
        await publish_state(broker.address, run, RunState.PAUSED)
        await until(learner, lambda: learner.state is RunState.PAUSED)
        await broker.stop()
        await broker.start()
        async with join(broker, run, "late") as late:
            await until(late, lambda: bool(there(late, "learner")))
            await until(late, lambda: late.state is RunState.PAUSED)


@pytest.mark.parametrize(
    ("topic", "payload"), [("state", b"asleep"), ("weights", b"\xff\xfe"), ("members/x", b"\xc1"), ("members/y", b"\x01")]
)
async def test_garbage_is_ignored_with_a_warning(
    broker: Broker, run: str, caplog: pytest.LogCaptureFixture, topic: str, payload: bytes
) -> None:
    async with join(broker, run, "learner") as learner, raw(broker) as outsider:
        with caplog.at_level(logging.WARNING, logger="treegrpo.wire.control"):
            await outsider.publish(f"treegrpo/{run}/{topic}", payload, qos=1)
            await publish_state(broker.address, run, RunState.PAUSED)
            await until(learner, lambda: learner.state is RunState.PAUSED)
        assert any(topic in record.getMessage() for record in caplog.records)
        assert learner.version is None


async def test_no_broker_is_one_sentence_that_names_the_address() -> None:
    address = free_address()
    with pytest.raises(UnavailableError, match=address):
        async with ControlPlane.connect(address, "nowhere", Member("a", "sampler", 1)):
            pass
    with pytest.raises(UnavailableError, match=address):
        await publish_state(address, "nowhere", RunState.PAUSED)
