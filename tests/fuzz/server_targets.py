"""Fuzz targets that are servers: what is sent to which, and that it answers or disconnects in time."""

from __future__ import annotations

import asyncio
import json
import struct
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from typing import Any, cast

import grpc
import msgpack
from hypothesis import strategies as st

from services.cli.processes.readiness import probe_broker, probe_learner, probe_retriever
from tests.fuzz import sample_messages
from tests.fuzz.mutations import DRAWN, VALUES, bytewise, packed, parse_mutations, protobufs, raw, tree
from tests.fuzz.server_processes import FuzzedServers
from tests.security import raw_mqtt_client
from treegrpo.config.schema import Config, RetrieverConfig
from treegrpo.v1 import rollout_pb2 as pb

CASE_SECONDS = 20.0
"""Longer than the time limits of all servers."""
Feed = Callable[[Any], Awaitable[None]]
END: Any = cast("Any", grpc.aio).EOF


@dataclass(frozen=True)
class ServerTarget:
    """An interface of a server."""

    name: str
    server: str
    cases: int
    """Of the 100,000 of all."""
    made: st.SearchStrategy[Any]
    connect: Callable[[FuzzedServers], Any]
    """An async context manager of a function that sends it a case."""
    probe: Callable[[FuzzedServers], Awaitable[None]]
    """Returns if the server still serves others."""


# ---- the learner's gRPC server


@asynccontextmanager
async def rollout(servers: FuzzedServers) -> AsyncGenerator[Feed]:
    """Hello, perhaps a mutated one, a demand, and what follows; the lease's id is put where the sample has one."""
    async with grpc.aio.insecure_channel(servers.intake.listen) as channel:

        async def feed(case: tuple[bool, bytes]) -> None:
            begun, data = case
            call = cast("Any", channel).stream_stream("/treegrpo.v1.RolloutService/Rollout")()
            with suppress(grpc.aio.AioRpcError, asyncio.InvalidStateError):
                if begun:
                    await call.write(pb.RolloutRequest(hello=sample_messages.HELLO).SerializeToString())
                    await call.read()
                    await call.write(pb.RolloutRequest(demand=pb.Demand(leases=2)).SerializeToString())
                    first = await asyncio.wait_for(call.read(), CASE_SECONDS)
                    lease = pb.RolloutResponse.FromString(first).lease.id if first != END else ""
                    data = data.replace(
                        sample_messages.LEASE.encode(), (lease or sample_messages.LEASE).encode()[: len(sample_messages.LEASE)]
                    )
                await call.write(data)
                await call.done_writing()
                while await call.read() != END:
                    pass
            await call.code()

        yield feed


@asynccontextmanager
async def weights(servers: FuzzedServers) -> AsyncGenerator[Feed]:
    async with grpc.aio.insecure_channel(servers.intake.listen) as channel:
        methods = ("WeightsService/FetchWeights", "WeightsService/DescribeWeights")
        paths = [*(f"/treegrpo.v1.{method}" for method in methods), "/grpc.health.v1.Health/Check"]

        async def feed(case: tuple[int, bytes]) -> None:
            call = cast("Any", channel).stream_stream(paths[case[0] % len(paths)])()
            with suppress(grpc.aio.AioRpcError, asyncio.InvalidStateError):
                await call.write(case[1])
                await call.done_writing()
                while await call.read() != END:
                    pass
            await call.code()

        yield feed


# ---- raw sockets


async def said(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, data: bytes) -> None:
    """Send, say that nothing more comes, and read to the end."""
    with suppress(ConnectionError):
        writer.write(data)
        await writer.drain()
        writer.write_eof()
        while await reader.read(1 << 16):
            pass
    writer.transport.abort()


def dialling(address: Callable[[FuzzedServers], str]) -> Callable[[FuzzedServers], Any]:
    @asynccontextmanager
    async def connected(servers: FuzzedServers) -> AsyncGenerator[Feed]:
        host, _, port = address(servers).rpartition(":")

        async def feed(data: bytes) -> None:
            await said(*await asyncio.open_connection(host, int(port)), data)

        yield feed

    return connected


@asynccontextmanager
async def trainer(servers: FuzzedServers) -> AsyncGenerator[Feed]:
    async def feed(data: bytes) -> None:
        await said(*await asyncio.open_unix_connection(servers.socket), data)

    yield feed


def _framed(row: Any) -> bytes:
    body = cast("bytes", msgpack.packb(row))
    return struct.pack("<I", len(body)) + body


def _post(drawn: bytes) -> bytes:
    """A search: its JSON, then its head and all, changed."""
    _, parts, rest = parse_mutations(drawn)
    body = json.dumps(tree(sample_messages.SEARCH[0], parts, VALUES)).encode()
    head = f"POST /retrieve HTTP/1.1\r\nHost: a\r\nConnection: close\r\nContent-Length: {len(body)}\r\n\r\n".encode()
    return bytewise(head + body, rest)


def _talk(drawn: bytes) -> bytes:
    """An MQTT conversation."""
    which, parts, rest = parse_mutations(drawn)
    packets = [
        raw_mqtt_client.connect(
            f"s{which % 5}", "sampler" if which % 2 else "", "word", clean=which % 3 > 0, will=("treegrpo/r/x", b"gone")
        ),
        raw_mqtt_client.subscribe("treegrpo/r/#", "treegrpo/+/state", qos=1),
        raw_mqtt_client.publish("treegrpo/r/members/sampler/s1", b"payload", qos=1, retain=True),
        raw_mqtt_client.publish("treegrpo/r/state", b"running"),
        raw_mqtt_client.unsubscribe("treegrpo/r/#"),
        raw_mqtt_client.packet(0xC0, b""),
        raw_mqtt_client.DISCONNECT,
    ]
    for what, where, much in parts:
        at = where % len(packets)
        if what % 4 == 0:
            packets[at] = bytewise(packets[at], [(what // 4, much, much)])
        elif what % 4 == 1:
            packets.insert(at, packets[much % len(packets)])
        elif what % 4 == 2 and len(packets) > 1:
            del packets[at]
        else:
            packets[at] = raw_mqtt_client.packet(much % 256, packets[at][2:])
    return bytewise(b"".join(packets), rest)


async def _intake(servers: FuzzedServers) -> None:
    await probe_learner(servers.intake.listen)
    assert (await servers.intake.samples())["treegrpo_journal_blocked"] == 0


QUICK = [row for row in sample_messages.HANDOFF if row["type"] not in ("Take", "Evaluate")]
"""Those wait some seconds for what they ask for."""
SERVER_TARGETS = [
    ServerTarget("rollout", "intake", 6_000, st.tuples(st.booleans(), protobufs(sample_messages.REQUESTS)), rollout, _intake),
    ServerTarget("weights", "intake", 1_500, st.tuples(st.integers(0, 9), protobufs(sample_messages.ASKED)), weights, _intake),
    ServerTarget("trainer", "intake", 3_000, packed(QUICK, _framed), trainer, _intake),
    ServerTarget(
        "metrics", "intake", 1_000, raw(sample_messages.SCRAPES), dialling(lambda servers: servers.intake.metrics), _intake
    ),
    ServerTarget(
        *("search", "retriever", 2_500, DRAWN.map(_post), dialling(lambda servers: servers.retriever)),
        lambda servers: probe_retriever(Config(retriever=RetrieverConfig(listen=servers.retriever))),
    ),
    ServerTarget(
        *("mqtt", "broker", 2_000, DRAWN.map(_talk), dialling(lambda servers: servers.intake.broker)),
        lambda servers: probe_broker(servers.intake.broker),
    ),
]
