"""How much one may send, open and wait at the learner's gRPC door."""

from __future__ import annotations

import asyncio
import socket
from pathlib import Path
from typing import Any, cast

import grpc
import pytest

from learner.intake import doors, rollout
from services.sampler import channel as channel_module
from services.sampler.channel import open_channel
from tests.security.door import SECONDS, hello, serving, stream
from tests.security.people import access
from treegrpo import limits
from treegrpo.access import OPEN
from treegrpo.security import Role
from treegrpo.v1 import rollout_pb2 as pb
from treegrpo.v1 import rollout_pb2_grpc


@pytest.mark.parametrize(
    ("first", "says"),
    [
        (pb.RolloutRequest(heartbeat=pb.Heartbeat()), "begins with Hello"),
        (pb.RolloutRequest(), "begins with Hello"),
        (hello(sampler=""), "Hello.sampler is ''"),
        (hello(sampler="x" * 65), "1 to 64 letters"),
        (hello(sampler="a/b"), "Hello.sampler is 'a/b'"),
        (hello(engine="\n"), "Hello.engine is"),
    ],
)
async def test_a_stream_that_begins_otherwise_is_refused_and_counted(first: pb.RolloutRequest, says: str) -> None:
    async with serving(OPEN) as door:
        code, sentence = await stream(door, OPEN, first)
        assert (code, door.refused("hello")) == (grpc.StatusCode.INVALID_ARGUMENT, 1)
        assert says in sentence


async def test_one_sampler_too_many_is_refused_and_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "PEERS", 1)
    async with serving(OPEN) as door:
        door.reception.join(pb.Hello(sampler="first"))
        code, sentence = await stream(door, OPEN, hello())
        assert (code, door.refused("peers")) == (grpc.StatusCode.RESOURCE_EXHAUSTED, 1)
        assert sentence == "1 samplers are connected, the most one learner takes; stop some."


async def test_a_stream_without_hello_is_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rollout, "HANDSHAKE_SECONDS", 0.2)
    async with serving(OPEN) as door:
        code, sentence = await stream(door, OPEN)
        assert code is grpc.StatusCode.DEADLINE_EXCEEDED
        assert "send Hello" in sentence


async def test_a_message_beyond_the_limit_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    small = [(key, 4096 if key == "grpc.max_receive_message_length" else value) for key, value in doors.OPTIONS]
    monkeypatch.setattr(doors, "OPTIONS", small)
    async with serving(OPEN) as door, open_channel(door.address, OPEN) as channel:
        call = cast("Any", rollout_pb2_grpc.RolloutServiceStub(channel)).Rollout()
        await call.write(hello())
        await call.read()
        await call.write(hello(sampler="x" * 5000))
        assert await call.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert "larger than max" in await call.details()


def test_both_ends_have_the_same_limit() -> None:
    for name in ("grpc.max_receive_message_length", "grpc.max_send_message_length"):
        assert dict(doors.OPTIONS)[name] == dict(channel_module.OPTIONS)[name] == limits.MESSAGE_BYTES == 32 << 20


@pytest.mark.parametrize("tls", [False, True])
@pytest.mark.parametrize("said", [b"", b"PRI * HTTP/2.0\r\n", b"\x16\x03\x01"])
async def test_who_connects_and_says_nothing_more_is_hung_up_on(
    made: Path, monkeypatch: pytest.MonkeyPatch, said: bytes, *, tls: bool
) -> None:
    quick = [(key, 300 if key == "grpc.server_handshake_timeout_ms" else value) for key, value in doors.OPTIONS]
    monkeypatch.setattr(doors, "OPTIONS", quick)
    async with serving(access(made, Role.LEARNER) if tls else OPEN) as door:
        host, _, port = door.address.rpartition(":")
        with socket.create_connection((host, int(port))) as slow:
            slow.setblocking(False)
            loop = asyncio.get_running_loop()
            await loop.sock_sendall(slow, said)
            async with asyncio.timeout(SECONDS):
                while await loop.sock_recv(slow, 1024):
                    pass


async def test_calls_at_once_on_one_connection_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    few = [(key, 2 if key == "grpc.max_concurrent_streams" else value) for key, value in doors.OPTIONS]
    monkeypatch.setattr(doors, "OPTIONS", few)
    async with serving(OPEN) as door, open_channel(door.address, OPEN) as channel:
        stub, calls = cast("Any", rollout_pb2_grpc.RolloutServiceStub(channel)), list[Any]()
        for number in range(2):
            calls.append(stub.Rollout())
            await calls[-1].write(hello(sampler=f"s{number}"))
            await calls[-1].read()
        calls.append(stub.Rollout())
        third = asyncio.ensure_future(calls[2].write(hello(sampler="s2")))
        welcome = asyncio.ensure_future(calls[2].read())
        await calls[0].write(pb.RolloutRequest(heartbeat=pb.Heartbeat()))
        await asyncio.wait({welcome}, timeout=0.2)
        assert not welcome.done()
        calls[0].cancel()
        await asyncio.gather(third, welcome)
        for call in calls:
            call.cancel()
