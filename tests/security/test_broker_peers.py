"""The embedded broker and who means it harm: MQTT by hand."""

from __future__ import annotations

import asyncio
import shutil
import ssl
from collections.abc import AsyncGenerator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from services.broker.limits import DEFAULT_LIMITS, BrokerLimits
from services.broker.server import LimitedBroker
from services.certs.issue import make_certificates
from services.cli.processes.readiness import probe_broker
from tests.security.credential_builders import access, impostor
from tests.security.raw_mqtt_client import (
    DISCONNECT,
    SECONDS,
    broker,
    connect,
    connected_client,
    open_connection,
    packet,
    publish,
    subscribe,
    text,
    unsubscribe,
)
from treegrpo.config.security import Role
from treegrpo.security.credentials import OPEN, Credentials
from treegrpo.wire.control import open_client

WORDS = {"learner": "l-word", "sampler": "s-word", "operator": "o-word"}
PUBLISH, SUBACK = 0x30, 0x90


def tls(who: Credentials) -> ssl.SSLContext:
    context = who.client_context()
    assert context is not None
    return context


@asynccontextmanager
async def guarded(made: Path, limits: BrokerLimits = DEFAULT_LIMITS) -> AsyncGenerator[tuple[str, LimitedBroker]]:
    async with broker(access(made, Role.BROKER), WORDS, limits) as there:
        yield there


async def until(condition: Callable[[], bool]) -> None:
    """For what amqtt tells nobody about."""
    async with asyncio.timeout(SECONDS):
        while not condition():  # noqa: ASYNC110
            await asyncio.sleep(0.01)


# ---- who is who


async def test_who_fails_to_come_in_changes_nothing_of_who_is_in(made: Path) -> None:
    """A second CONNECT with the same client id said that the first is the learner, before anybody looked at its password."""
    sampler, learner = tls(access(made, Role.SAMPLER)), tls(access(made, Role.LEARNER))
    async with (
        guarded(made) as (address, _),
        connected_client(address, connect("learner", "learner", "l-word"), learner) as listener,
        connected_client(address, connect("s7", "sampler", "s-word"), sampler) as first,
    ):
        await listener.send_packets(subscribe("treegrpo/#"))
        await listener.receive_packet()
        async with open_connection(address, sampler) as second:
            await second.send_packets(connect("s7", "learner", "wrong", clean=False, will=("treegrpo/r/state", b"draining")))
            assert (await second.receive_packet())[1][1] == 5
        await first.send_packets(publish("treegrpo/r/weights", b"6.6"), publish("treegrpo/r/members/sampler/s7", b"me"))
        assert await listener.receive_packet() == (PUBLISH, text("treegrpo/r/members/sampler/s7") + b"me")


@pytest.mark.parametrize("clean", [True, False])
async def test_nobody_takes_the_client_id_of_another_user(made: Path, *, clean: bool) -> None:
    async with (
        guarded(made) as (address, _),
        connected_client(address, connect("learner", "learner", "l-word"), tls(access(made, Role.LEARNER))) as learner,
    ):
        async with open_connection(address, tls(access(made, Role.SAMPLER))) as other:
            await other.send_packets(connect("learner", "sampler", "s-word", clean=clean))
            assert (await other.receive_packet())[1][1] == 5
        await learner.send_packets(subscribe("treegrpo/#"))
        assert (await learner.receive_packet())[0] == SUBACK


async def test_a_certificate_for_one_sampler_is_good_for_its_client_id_alone(made: Path, tmp_path: Path) -> None:
    named = tls(impostor(tmp_path, made, "named"))
    async with guarded(made) as (address, _):
        async with connected_client(address, connect("s7@0000000000000001", "sampler", "s-word"), named):
            pass
        async with open_connection(address, named) as forged:
            await forged.send_packets(connect("s8@0000000000000001", "sampler", "s-word"))
            assert (await forged.receive_packet())[1][1] == 5


async def test_a_connection_that_is_taken_over_ends(made: Path) -> None:
    sampler = tls(access(made, Role.SAMPLER))
    hello = connect("s7", "sampler", "s-word")
    async with (
        guarded(made) as (address, _),
        connected_client(address, hello, sampler) as first,
        connected_client(address, hello, sampler) as again,
    ):
        assert await first.wait_closed()
        await again.send_packets(subscribe("treegrpo/r/state"))
        assert (await again.receive_packet())[0] == SUBACK


async def test_a_refusal_is_logged_once(made: Path, caplog: pytest.LogCaptureFixture) -> None:
    sampler = tls(access(made, Role.SAMPLER))
    async with guarded(made) as (address, _), connected_client(address, connect("s7", "sampler", "s-word"), sampler) as client:
        await client.send_packets(*(publish(f"treegrpo/r/{number}\n", b"x") for number in range(50)), subscribe("treegrpo/#"))
        await client.receive_packet()
        await client.send_packets(publish("treegrpo/r/state", b"x"), unsubscribe("treegrpo/#"))
        await client.receive_packet()
    lines = [record.getMessage() for record in caplog.records if "may not publish" in record.getMessage()]
    assert lines == [r"refused 127.0.0.1 (MQTT user 'sampler'): it may not publish to 'treegrpo/r/0\n'"]


# ---- who is slow


@pytest.mark.parametrize("said", [b"", b"\x16\x03\x01"])
async def test_a_tls_handshake_that_is_slow_is_hung_up_on(made: Path, said: bytes) -> None:
    async with guarded(made, BrokerLimits(handshake_seconds=0.2)) as (address, _), open_connection(address) as client:
        await client.send_packets(said)
        assert await client.wait_closed()


@pytest.mark.parametrize("more", [b"", packet(0x30, b"x" * 99)[:20]])
async def test_who_misses_its_keep_alive_is_hung_up_on_and_its_will_is_read(more: bytes) -> None:
    async with (
        broker(limits=BrokerLimits(grace_seconds=0.1)) as (address, _),
        connected_client(address, connect("listener")) as listener,
    ):
        await listener.send_packets(subscribe("treegrpo/#"))
        await listener.receive_packet()
        async with connected_client(address, connect("s7", keepalive=1, will=("treegrpo/r/gone", b"s7"))) as silent:
            await silent.send_packets(more)
            assert await silent.wait_closed()
        assert await listener.receive_packet() == (PUBLISH | 2, text("treegrpo/r/gone") + b"\0\1s7")


async def test_no_keep_alive_is_no_way_to_stay_for_ever() -> None:
    limits = BrokerLimits(keepalive_seconds=0.2, grace_seconds=0.1)
    async with broker(limits=limits) as (address, _), connected_client(address, connect("s7", keepalive=0)) as silent:
        assert await silent.wait_closed()


async def test_who_does_not_read_is_hung_up_on() -> None:
    limits = BrokerLimits(unwritten_bytes=1 << 16)
    async with (
        broker(limits=limits) as (address, made),
        connected_client(address, connect("deaf")) as deaf,
        connected_client(address, connect("loud")) as loud,
    ):
        await deaf.send_packets(subscribe("treegrpo/#", qos=1))
        await deaf.receive_packet()
        for number in range(1, 40):
            await loud.send_packets(publish("treegrpo/r/x", b"x" * 4000, qos=1, number=number))
        await until(lambda: "deaf" not in made.sessions or made.sessions["deaf"][0].transitions.state != "connected")


async def test_who_does_not_acknowledge_is_hung_up_on() -> None:
    """amqtt would let it miss the message, and nobody would know."""
    async with (
        broker() as (address, _),
        connected_client(address, connect("deaf")) as deaf,
        connected_client(address, connect("loud")) as loud,
    ):
        await deaf.send_packets(subscribe("treegrpo/#", qos=1))
        await deaf.receive_packet()
        await loud.send_packets(publish("treegrpo/r/x", b"x", qos=1))
        assert (await deaf.receive_packet())[0] & 0xF0 == PUBLISH
        assert await deaf.wait_closed()


async def test_who_reads_gets_all_that_is_retained_however_much_that_is() -> None:
    async with broker(limits=BrokerLimits(unwritten_bytes=1 << 14, retained_at_once=4)) as (address, _):
        async with open_client(address, OPEN) as one:
            for number in range(40):
                await one.publish(f"treegrpo/r/members/{number}", b"x" * 3000, qos=1, retain=True)
        async with open_client(address, OPEN) as reader, asyncio.timeout(SECONDS):
            await reader.subscribe("treegrpo/#", qos=1)
            topics = {(await anext(aiter(reader.messages))).topic.value for _ in range(40)}
    assert len(topics) == 40


# ---- who asks for too much


async def test_a_client_that_left_is_not_remembered_whatever_it_asks_for() -> None:
    async with broker() as (address, made):
        for number in range(5):
            async with connected_client(address, connect(f"s{number}", clean=False)) as client:
                await client.send_packets(subscribe("treegrpo/#", qos=1), DISCONNECT)
                assert await client.wait_closed()
        await until(lambda: not made.sessions)
        assert not made.subscriptions


async def test_topic_filters_are_few_and_those_given_up_are_forgotten() -> None:
    async with broker(limits=BrokerLimits(filters=3)) as (address, made), connected_client(address, connect("s7")) as client:
        await client.send_packets(subscribe("a", "b", "c", "d", "e" * 2000))
        assert await client.receive_packet() == (SUBACK, b"\0\1\0\0\0\x80\x80")
        for name in "abc" * 20:
            await client.send_packets(unsubscribe(name), subscribe(f"{name}2"), unsubscribe(f"{name}2"))
            for _ in range(3):
                await client.receive_packet()
        assert len(made.subscriptions) <= 4


async def test_what_is_retained_is_bounded() -> None:
    async with broker(limits=BrokerLimits(retained=3)) as (address, made), connected_client(address, connect("s7")) as client:
        for number in range(9):
            await client.send_packets(publish(f"treegrpo/r/members/{number}", b"x", retain=True))
        await client.send_packets(
            publish("treegrpo/r/members/0", b"y" * 5000, retain=True), publish("treegrpo/r/state", b"new", retain=True)
        )
        await client.send_packets(subscribe("treegrpo/#", qos=0))
        await until(lambda: any(message.data == b"new" for message in made.retained_messages.values()))
        assert sorted(made.retained_messages) == [*(f"treegrpo/r/members/{number}" for number in range(3)), "treegrpo/r/state"]
        assert made.retained_messages["treegrpo/r/members/0"].data == b"x"


async def test_who_wants_messages_kept_until_he_says_so_is_hung_up_on() -> None:
    async with broker() as (address, _), connected_client(address, connect("s7")) as client:
        await client.send_packets(publish("treegrpo/r/x", b"x", qos=2))
        assert await client.wait_closed()


@pytest.mark.parametrize(
    "hello",
    [
        packet(0x10, b"\0\4MQTT"),
        packet(0x10, text("MQTT") + b"\4\xc2\0\x3c" + text(b"\xff\xfe") + text("u") + text("p")),
        packet(0x10, b""),
        packet(0x30, b"\0\1x"),
        packet(0xF0, b""),
        b"\x10\xff\xff\xff\xff\x7f",
        packet(0x10, text("MQTT") + b"\4\4\0\x3c" + text("s7") + text("treegrpo/x")),
        packet(0x10, text("MQIsdp") + b"\3\2\0\x3c" + text("s7")),
    ],
)
async def test_a_connect_that_is_none_takes_no_place(hello: bytes) -> None:
    """amqtt forgot to free the place of a connection that ended in an error of another kind than it thought of."""
    async with broker() as (address, made):
        for _ in range(3):
            async with open_connection(address) as client:
                await client.send_packets(hello)
                client.writer.write_eof()
                assert await client.wait_closed()
        await until(lambda: made._servers["default"].conn_count == 0)  # pyright: ignore[reportPrivateUsage]


async def test_one_connection_too_many_is_closed_at_once() -> None:
    async with (
        broker(limits=BrokerLimits(peers=1)) as (address, _),
        connected_client(address, connect("s7")),
        open_connection(address) as other,
    ):
        assert await other.wait_closed()


async def test_a_renewed_certificate_serves_without_a_restart_of_either_side(made: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(made, tmp_path / "certs")

    def words(who: Role) -> Any:
        return access(folder, who)

    passwords = {role: words(Role(role)).broker_password.get_secret_value() for role in ("sampler", "operator")}
    sampler = words(Role.SAMPLER)
    async with broker(words(Role.BROKER), passwords) as (address, _):
        await probe_broker(address, sampler)
        for path in [*folder.glob("*.pem"), *folder.glob("*.key")]:
            path.unlink()
        make_certificates(folder, [], [])  # of another authority: the old files could not serve them
        await probe_broker(address, sampler)
