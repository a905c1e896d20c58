"""How much one may send, open and wait at the learner's gRPC server."""

from __future__ import annotations

import asyncio
import socket
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import grpc
import pytest

from bench.http2 import Connection, grpc_frame
from learner.intake.rpc import server
from learner.intake.rpc.auth_interceptor import CallLimits
from services.sampler.learner_link import channel as channel_module
from services.sampler.learner_link.channel import open_channel
from tests.intake.builders import PLAN, chain, step
from tests.security.credential_builders import access, impostor
from tests.security.grpc_server_harness import SECONDS, hello, serving, stream
from treegrpo.config.security import Role
from treegrpo.net import limits
from treegrpo.security.credentials import OPEN
from treegrpo.v1 import rollout_pb2 as pb
from treegrpo.v1 import rollout_pb2_grpc
from treegrpo.wire.codec import subtree_to_bytes
from treegrpo.wire.size_limits import TEXT_LENGTH, message_bytes


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
    async with serving(OPEN) as fixture:
        code, sentence = await stream(fixture, OPEN, first)
        assert (code, fixture.refused("hello")) == (grpc.StatusCode.INVALID_ARGUMENT, 1)
        assert says in sentence


async def test_one_sampler_too_many_is_refused_and_counted() -> None:
    async with serving(OPEN, max_samplers=1) as fixture:
        fixture.reception.join_sampler(pb.Hello(sampler="first"))
        code, sentence = await stream(fixture, OPEN, hello())
        assert (code, fixture.refused("peers")) == (grpc.StatusCode.RESOURCE_EXHAUSTED, 1)
        assert sentence == "1 samplers are connected, the most one learner takes; stop some."


async def test_a_stream_without_hello_is_closed() -> None:
    async with serving(OPEN, handshake_seconds=0.2) as fixture:
        code, sentence = await stream(fixture, OPEN)
        assert code is grpc.StatusCode.DEADLINE_EXCEEDED
        assert "send Hello" in sentence


async def test_a_message_beyond_the_limit_is_refused() -> None:
    async with serving(OPEN, 4096) as fixture, open_channel(fixture.address, OPEN) as channel:
        call = cast("Any", rollout_pb2_grpc.RolloutServiceStub(channel)).Rollout()
        await call.write(hello())
        await call.read()
        await call.write(hello(sampler="x" * 5000))
        assert await call.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert "larger than max" in await call.details()


async def test_half_a_message_beyond_the_limit_is_refused_at_its_first_bytes() -> None:
    """gRPC before 1.83.2 took in all of a message, up to 4 GiB, before it looked at its size."""
    async with serving(OPEN, 4096) as fixture:

        def open_after(length: int) -> int:
            with Connection(fixture.address) as connection:
                connection.call("/treegrpo.v1.RolloutService/Rollout", grpc_frame(b"", length))
                connection.pump(SECONDS if length > 4096 else 0.5, answered=length > 4096)
                return connection.open_streams

        assert await asyncio.to_thread(open_after, 4096) == 1
        assert await asyncio.to_thread(open_after, 1 << 31) == 0, (
            f"grpcio {grpc.__version__}: install what pyproject.toml asks for"
        )


@pytest.mark.parametrize("algorithm", [grpc.Compression.Gzip, grpc.Compression.Deflate])
async def test_compressed_messages_are_not_taken(algorithm: grpc.Compression) -> None:
    """They are a few bytes on the wire and megabytes behind it."""
    blank, ended = bytes(1 << 20), {grpc.StatusCode.UNIMPLEMENTED, grpc.StatusCode.INTERNAL}

    async with serving(OPEN) as fixture, open_channel(fixture.address, OPEN) as channel:
        call = cast("Any", channel).stream_stream("/treegrpo.v1.RolloutService/Rollout")(compression=algorithm)
        with suppress(grpc.aio.AioRpcError):
            await call.write(blank)
        assert await call.code() in ended
        assert (await stream(fixture, OPEN, hello()))[0] is grpc.StatusCode.OK


def test_neither_end_takes_compressed_messages() -> None:
    for options in (server.OPTIONS, channel_module.OPTIONS):
        assert (
            dict(options)["grpc.compression_enabled_algorithms_bitset"]
            == 1 << grpc.Compression.NoCompression.value
            == limits.PLAIN
        )


def test_what_all_calls_may_have_half_received_is_bounded() -> None:
    for context in (128, 4096, 32768, 1 << 20, 1 << 26):
        message = message_bytes(replace(PLAN, max_context=context))
        assert message <= limits.MESSAGE_BYTES
        assert limits.calls(message) * message <= limits.RECEIVE_BYTES
        assert 32 <= limits.samplers(message) < limits.calls(message)


def test_the_longest_branch_fits_into_a_message() -> None:
    """Of tokens that are long words, all of them in calls of a tool."""
    for context in (128, 4096, 32768):
        plan = replace(PLAN, max_context=context, max_action_tokens=context)
        longest = step(1, 0, actions=context, observations=context)
        text = "x" * min(TEXT_LENGTH, 16 * context)
        made = replace(chain("train-0000000-0123456789abcdef"), steps=(replace(longest, tool_arguments=text),) * plan.max_turns)
        assert len(subtree_to_bytes(replace(made, leaves=()))) / plan.max_turns < message_bytes(plan)


async def test_calls_of_a_sampler_that_its_certificate_names_are_bounded(made: Path) -> None:
    named = impostor(made / "named", made, "named")
    learner, call_limits = access(made, Role.LEARNER), CallLimits(calls_per_name=1)
    async with serving(learner, call_limits=call_limits) as fixture, open_channel(fixture.address, named) as channel:
        stub = cast("Any", rollout_pb2_grpc.RolloutServiceStub(channel))
        first = stub.Rollout()
        await first.write(hello())
        await first.read()
        second = stub.Rollout()
        assert await second.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert await second.details() == "Sampler s7 has 1 calls at once, the most that one may have; end some."
        assert fixture.refused("calls") == 1
        first.cancel()
        assert await stream(fixture, access(made, Role.SAMPLER), hello(sampler="other")) == (grpc.StatusCode.OK, "")


@pytest.mark.parametrize("tls", [False, True])
@pytest.mark.parametrize("said", [b"", b"PRI * HTTP/2.0\r\n", b"\x16\x03\x01"])
async def test_who_connects_and_says_nothing_more_is_hung_up_on(made: Path, said: bytes, *, tls: bool) -> None:
    quick = [(key, 300 if key == "grpc.server_handshake_timeout_ms" else value) for key, value in server.OPTIONS]
    async with serving(access(made, Role.LEARNER) if tls else OPEN, options=quick) as fixture:
        host, _, port = fixture.address.rpartition(":")
        with socket.create_connection((host, int(port))) as slow:
            slow.setblocking(False)
            loop = asyncio.get_running_loop()
            await loop.sock_sendall(slow, said)
            async with asyncio.timeout(SECONDS):
                while await loop.sock_recv(slow, 1024):
                    pass


async def test_calls_at_once_on_one_connection_are_bounded() -> None:
    few = [(key, 2 if key == "grpc.max_concurrent_streams" else value) for key, value in server.OPTIONS]
    async with serving(OPEN, options=few) as fixture, open_channel(fixture.address, OPEN) as channel:
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
