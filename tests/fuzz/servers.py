"""Cases for the servers: what is sent to whom, and that it answers or hangs up within its time."""

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

from services.cli.processes.readiness import broker_ready, learner_ready, retriever_ready
from tests.fuzz import samples
from tests.fuzz.mutations import DRAWN, VALUES, bytewise, changes_of, packed, protobufs, raw, tree
from tests.fuzz.stage import Stage
from tests.security import mqtt
from treegrpo.config.schema import Config, RetrieverConfig
from treegrpo.v1 import rollout_pb2 as pb

CASE_SECONDS = 20.0
"""Longer than any server is patient."""
Feed = Callable[[Any], Awaitable[None]]
END: Any = cast("Any", grpc.aio).EOF


@dataclass(frozen=True)
class Served:
    """A door of a server."""

    name: str
    server: str
    cases: int
    """Of the 100,000 of all."""
    made: st.SearchStrategy[Any]
    open: Callable[[Stage], Any]
    """An async context manager of what feeds it a case."""
    well: Callable[[Stage], Awaitable[None]]
    """Returns if it still serves others."""


# ---- the learner's gRPC door


@asynccontextmanager
async def rollout(stage: Stage) -> AsyncGenerator[Feed]:
    """Hello, perhaps a mutated one, a demand, and what follows; the lease's id is put where the sample has one."""
    async with grpc.aio.insecure_channel(stage.intake.listen) as channel:

        async def feed(case: tuple[bool, bytes]) -> None:
            begun, data = case
            call = cast("Any", channel).stream_stream("/treegrpo.v1.RolloutService/Rollout")()
            with suppress(grpc.aio.AioRpcError, asyncio.InvalidStateError):
                if begun:
                    await call.write(pb.RolloutRequest(hello=samples.HELLO).SerializeToString())
                    await call.read()
                    await call.write(pb.RolloutRequest(demand=pb.Demand(leases=2)).SerializeToString())
                    first = await asyncio.wait_for(call.read(), CASE_SECONDS)
                    lease = pb.RolloutResponse.FromString(first).lease.id if first != END else ""
                    data = data.replace(samples.LEASE.encode(), (lease or samples.LEASE).encode()[: len(samples.LEASE)])
                await call.write(data)
                await call.done_writing()
                while await call.read() != END:
                    pass
            await call.code()

        yield feed


@asynccontextmanager
async def weights(stage: Stage) -> AsyncGenerator[Feed]:
    async with grpc.aio.insecure_channel(stage.intake.listen) as channel:
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


def dialling(address: Callable[[Stage], str]) -> Callable[[Stage], Any]:
    @asynccontextmanager
    async def connected(stage: Stage) -> AsyncGenerator[Feed]:
        host, _, port = address(stage).rpartition(":")

        async def feed(data: bytes) -> None:
            await said(*await asyncio.open_connection(host, int(port)), data)

        yield feed

    return connected


@asynccontextmanager
async def trainer(stage: Stage) -> AsyncGenerator[Feed]:
    async def feed(data: bytes) -> None:
        await said(*await asyncio.open_unix_connection(stage.socket), data)

    yield feed


def _framed(row: Any) -> bytes:
    body = cast("bytes", msgpack.packb(row))
    return struct.pack("<I", len(body)) + body


def _post(drawn: bytes) -> bytes:
    """A search: its JSON, then its head and all, changed."""
    _, parts, rest = changes_of(drawn)
    body = json.dumps(tree(samples.SEARCH[0], parts, VALUES)).encode()
    head = f"POST /retrieve HTTP/1.1\r\nHost: a\r\nConnection: close\r\nContent-Length: {len(body)}\r\n\r\n".encode()
    return bytewise(head + body, rest)


def _talk(drawn: bytes) -> bytes:
    """An MQTT conversation."""
    which, parts, rest = changes_of(drawn)
    packets = [
        mqtt.connect(
            f"s{which % 5}", "sampler" if which % 2 else "", "word", clean=which % 3 > 0, will=("treegrpo/r/x", b"gone")
        ),
        mqtt.subscribe("treegrpo/r/#", "treegrpo/+/state", qos=1),
        mqtt.publish("treegrpo/r/members/sampler/s1", b"payload", qos=1, retain=True),
        mqtt.publish("treegrpo/r/state", b"running"),
        mqtt.unsubscribe("treegrpo/r/#"),
        mqtt.packet(0xC0, b""),
        mqtt.DISCONNECT,
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
            packets[at] = mqtt.packet(much % 256, packets[at][2:])
    return bytewise(b"".join(packets), rest)


async def _intake(stage: Stage) -> None:
    await learner_ready(stage.intake.listen)
    assert (await stage.intake.samples())["treegrpo_journal_blocked"] == 0


QUICK = [row for row in samples.HANDOFF if row["type"] not in ("Take", "Evaluate")]
"""Those wait some seconds for what they ask for."""
SERVED = [
    Served("rollout", "intake", 6_000, st.tuples(st.booleans(), protobufs(samples.REQUESTS)), rollout, _intake),
    Served("weights", "intake", 1_500, st.tuples(st.integers(0, 9), protobufs(samples.ASKED)), weights, _intake),
    Served("trainer", "intake", 3_000, packed(QUICK, _framed), trainer, _intake),
    Served("metrics", "intake", 1_000, raw(samples.SCRAPES), dialling(lambda stage: stage.intake.metrics), _intake),
    Served(
        *("search", "retriever", 2_500, DRAWN.map(_post), dialling(lambda stage: stage.retriever)),
        lambda stage: retriever_ready(Config(retriever=RetrieverConfig(listen=stage.retriever))),
    ),
    Served(
        *("mqtt", "broker", 2_000, DRAWN.map(_talk), dialling(lambda stage: stage.intake.broker)),
        lambda stage: broker_ready(stage.intake.broker),
    ),
]
