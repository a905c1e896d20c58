"""One run owns a name on a broker: the next one is refused, or comes after it, and nobody disturbs the other."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager
from typing import Any

import aiomqtt
import pytest

from tests.control.broker_processes import Broker
from treegrpo.core.step import PolicyVersion
from treegrpo.errors import RunError
from treegrpo.net.address import split_address
from treegrpo.timing.backoff import Backoff
from treegrpo.wire import control, run_name_owner
from treegrpo.wire.control import LIMITS, ControlLimits, ControlPlane, RunState, publish_state
from treegrpo.wire.run_name_owner import Member

SECONDS = 30.0
VERSION = PolicyVersion(1, 7)


def learner(
    broker: Broker, name: str, run: str, incarnation: int, limits: ControlLimits = LIMITS
) -> AbstractAsyncContextManager[ControlPlane]:
    member = Member("learner", "learner", incarnation, "127.0.0.1:9400", run)
    return ControlPlane.connect(broker.address, name, member, limits=limits)


def watcher(broker: Broker, name: str, incarnation: int = 99) -> AbstractAsyncContextManager[ControlPlane]:
    return ControlPlane.connect(broker.address, name, Member("watcher", "operator", incarnation))


def raw(broker: Broker) -> aiomqtt.Client:
    return aiomqtt.Client(*split_address(broker.address, "broker.address"))


async def until(plane: ControlPlane, condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(SECONDS):
        while not condition():
            await plane.wait_change()


async def say(broker: Broker, name: str, topic: str, payload: bytes) -> None:
    async with raw(broker) as client:
        await client.publish(f"treegrpo/{name}/{topic}", payload, qos=1, retain=True)


async def retained(broker: Broker, name: str) -> dict[str, bytes]:
    """What the broker tells a new-comer, by topic."""
    found: dict[str, bytes] = {}
    async with raw(broker) as client, asyncio.timeout(SECONDS):
        await client.subscribe(f"treegrpo/{name}/#", qos=1)
        await client.publish(f"treegrpo/{name}/end", b"x", qos=1)
        async for message in client.messages:
            if (topic := message.topic.value.removeprefix(f"treegrpo/{name}/")) == "end":
                break
            found[topic] = bytes(message.payload)
    return found


@pytest.mark.parametrize("other", ["another-run", "one-run"], ids=["another-run", "a-copy-of-it"])
async def test_a_second_learner_is_refused_and_disturbs_nobody(broker: Broker, run: str, other: str) -> None:
    async with learner(broker, run, "one-run", 1) as first, watcher(broker, run) as seen:
        await first.announce_version(VERSION)
        await first.set_state(RunState.RUNNING)
        await until(seen, lambda: seen.version == VERSION)
        with pytest.raises(
            RunError, match=rf"^run\.name = {run} is taken .* by the run one-run.*127\.0\.0\.1:9400; set run\.name"
        ):
            async with learner(broker, run, other, 2):
                pytest.fail("it came in")
        await until(seen, lambda: not any(one.incarnation == 2 and one.alive for one in seen.members.values()))
        assert first.lost is None
        assert (seen.state, seen.version) == (RunState.RUNNING, VERSION)
        assert (first.state, first.version) == (RunState.RUNNING, VERSION)


async def test_of_two_learners_that_come_at_once_one_is_refused(broker: Broker, run: str) -> None:
    ended = asyncio.Event()

    async def come(number: int) -> bool:
        try:
            async with learner(broker, run, f"run-{number}", number):
                await ended.wait()
        except RunError:
            ended.set()
            return False
        return True

    async with asyncio.timeout(SECONDS):
        assert sorted(await asyncio.gather(come(1), come(2))) == [False, True]


async def test_runs_of_two_names_share_a_broker_whatever_their_parts_are_called(broker: Broker, run: str) -> None:
    async with learner(broker, f"{run}-a", "a", 1) as a, learner(broker, f"{run}-b", "b", 2) as b:
        parts = [Member("sampler-0", "sampler", number) for number in (3, 4)]
        async with (
            ControlPlane.connect(broker.address, f"{run}-a", parts[0]) as first,
            ControlPlane.connect(broker.address, f"{run}-b", parts[1]) as second,
        ):
            for plane in (a, b):
                await until(plane, lambda plane=plane: len(plane.members) == 2)
            await a.set_state(RunState.DRAINING)
            await b.set_state(RunState.PAUSED)
            await until(first, lambda: first.state is RunState.DRAINING)
            await until(second, lambda: second.state is RunState.PAUSED)
            assert [plane.lost for plane in (a, b, first, second)] == [None] * 4


async def test_a_crashed_owner_of_the_same_run_is_followed_at_once(broker: Broker, run: str) -> None:
    crashed = Member("learner", "learner", 1, run="one-run", owner=True)
    await say(broker, run, crashed.topic, crashed.payload())
    async with asyncio.timeout(run_name_owner.ANSWER_SECONDS + 5.0), learner(broker, run, "one-run", 2) as again:
        assert again.lost is None


async def test_a_crashed_owner_of_another_run_is_waited_for_until_its_will(broker: Broker, run: str) -> None:
    crashed = Member("learner", "learner", 1, run="another-run", owner=True)
    await say(broker, run, crashed.topic, crashed.payload())
    async with asyncio.timeout(run_name_owner.WILL_SECONDS), watcher(broker, run) as seen:
        coming = asyncio.create_task(_stay(broker, run))
        await until(seen, lambda: any(one.incarnation == 2 for one in seen.members.values()))
        assert not any(one.owner for one in seen.members.values() if one.incarnation == 2)
        will = Member("learner", "learner", 1, alive=False)
        await say(broker, run, will.topic, will.payload())
        await until(seen, lambda: any(one.owner for one in seen.members.values() if one.incarnation == 2))
        coming.cancel()
        await asyncio.gather(coming, return_exceptions=True)


async def test_a_will_that_never_comes_is_not_waited_for_for_ever(broker: Broker, run: str) -> None:
    limits = ControlLimits(will_seconds=0.2)
    crashed = Member("learner", "learner", 1, run="another-run", owner=True)
    await say(broker, run, crashed.topic, crashed.payload())
    async with asyncio.timeout(SECONDS), learner(broker, run, "one-run", 2, limits) as plane:
        assert plane.lost is None


async def _stay(broker: Broker, run: str) -> None:
    async with learner(broker, run, "one-run", 2):
        await asyncio.get_running_loop().create_future()


async def test_what_a_run_that_ended_left_behind_does_not_reach_the_next(broker: Broker, run: str) -> None:
    async with learner(broker, run, "ended", 1) as ended:
        await ended.announce_version(VERSION)
        await ended.set_state(RunState.DRAINING)
        await until(ended, lambda: ended.announced_state is RunState.DRAINING)
    async with learner(broker, run, "ended", 2) as again:
        assert (again.announced_state, again.version) == (RunState.DRAINING, VERSION)
    async with learner(broker, run, "next", 3) as following:
        assert (following.state, following.announced_state, following.version) == (RunState.RUNNING, None, None)
        await until(following, lambda: "learner@0000000000000003" in following.members)
        left = await retained(broker, run)
    assert set(left) == {"owner", "members/learner/learner@0000000000000003"}
    assert left["owner"] == b"next"


async def test_the_operators_word_before_the_first_run_of_a_name_is_heard(broker: Broker, run: str) -> None:
    await publish_state(broker.address, run, RunState.PAUSED)
    async with learner(broker, run, "first", 1) as first:
        assert first.announced_state is RunState.PAUSED


async def test_who_lost_the_broker_and_then_its_name_ends_with_the_reason(broker: Broker, run: str) -> None:
    limits = ControlLimits(backoff=Backoff((2.0,)))

    async def lose_it() -> None:
        async with asyncio.timeout(SECONDS), learner(broker, run, "one-run", 1, limits) as first:
            inner: Any = first._client._client  # pyright: ignore[reportPrivateUsage, reportOptionalMemberAccess]
            inner.socket().shutdown(socket.SHUT_RDWR)
            async with learner(broker, run, "another-run", 2):
                await asyncio.get_running_loop().create_future()

    with pytest.raises(RunError, match=rf"run\.name = {run} is taken .* by the run another-run"):
        await lose_it()


async def test_the_owner_removes_what_nobody_should_have_retained(broker: Broker, run: str) -> None:
    left = Member("gone", "sampler", 7, alive=False)
    async with learner(broker, run, "one-run", 1) as owner, raw(broker) as outsider:
        for number in range(50):
            await outsider.publish(f"treegrpo/{run}/members/sampler/x{number}", b"x" * 100, qos=1, retain=True)
        await outsider.publish(f"treegrpo/{run}/{left.topic}", left.payload(), qos=1, retain=True)
        await until(owner, lambda: left.client in owner.members)
        async with asyncio.timeout(SECONDS):
            while set(await retained(broker, run)) != {"owner", "members/learner/learner@0000000000000001"}:
                pass
        assert not owner.members[left.client].alive, "the intake still has to hear of it"


async def test_a_broker_that_keeps_silent_about_the_run_is_refused(
    broker: Broker, run: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As Mosquitto does whose access list names another run."""

    def elsewhere(_: ControlPlane) -> list[str]:
        return [f"treegrpo/{run}-other/#"]

    monkeypatch.setattr(ControlPlane, "_topics", elsewhere)

    async def at_once(_: ControlPlane) -> None:
        return

    monkeypatch.setattr(ControlPlane, "wait_retained_state", at_once)
    with pytest.raises(control.ConfigError, match=rf"does not pass on what the learner says about run\.name = {run}"):
        async with learner(broker, run, "one-run", 1):
            pytest.fail("it came in")
