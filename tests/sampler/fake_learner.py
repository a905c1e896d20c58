"""A learner behind the real contract: a grpc.aio server in this process that does what a test tells it."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import grpc

from services.sampler.learner_link.channel import OPTIONS
from tests.sampler.fakes import plan
from treegrpo.core.lease import Lease, Plan
from treegrpo.core.step import PolicyVersion
from treegrpo.v1 import rollout_pb2, rollout_pb2_grpc, weights_pb2, weights_pb2_grpc
from treegrpo.wire.codec import lease_to_pb, plan_to_pb, version_from_pb, version_to_pb

CHUNK = 4


class FakeLearner(rollout_pb2_grpc.RolloutServiceServicer, weights_pb2_grpc.WeightsServiceServicer):
    def __init__(self) -> None:
        self.plan: Plan = plan()
        self.void: list[str] = []
        self.refusal = ""
        self.hellos: asyncio.Queue[rollout_pb2.Hello] = asyncio.Queue()
        self.requests: asyncio.Queue[rollout_pb2.RolloutRequest] = asyncio.Queue()
        """What came after Hello, heartbeats apart."""
        self.beats: asyncio.Queue[rollout_pb2.Heartbeat] = asyncio.Queue()
        self.goodbyes: asyncio.Queue[str] = asyncio.Queue()
        self._broken: asyncio.Queue[None] = asyncio.Queue()
        self._context: Any = None
        self.versions: dict[PolicyVersion, dict[str, bytes]] = {}
        self.corrupt: list[str] = []
        """Files of which the next sending is corrupt, one entry for each time."""
        self.interrupt: list[str] = []
        """Files of which the next sending breaks after its first chunk."""
        self.forgotten: set[PolicyVersion] = set()
        """Versions that are described but no longer sent."""
        self.late = 0
        """Times that a description is asked for in vain."""
        self.described: asyncio.Queue[PolicyVersion] = asyncio.Queue()
        """What was answered to each who asked for the newest."""
        self.fetched: list[tuple[PolicyVersion, str, int]] = []
        """(version, file, offset) of every fetch."""

    # ---- rollout

    async def Rollout(self, request_iterator: object, context: Any) -> None:
        hello = await context.read()
        self._context = context
        if self.refusal:
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, self.refusal)
        welcome = rollout_pb2.Welcome(run="test", void_leases=self.void, plan=plan_to_pb(self.plan))
        await context.write(rollout_pb2.RolloutResponse(welcome=welcome))
        self.hellos.put_nowait(hello.hello)
        breaking = asyncio.create_task(self._broken.get())
        while True:
            reading = asyncio.create_task(context.read())
            await asyncio.wait({reading, breaking}, return_when=asyncio.FIRST_COMPLETED)
            if breaking.done():
                reading.cancel()
                await context.abort(grpc.StatusCode.UNAVAILABLE, "the test broke the stream")
            request = reading.result()
            if request is grpc.aio.EOF:  # pyright: ignore[reportAttributeAccessIssue]
                breaking.cancel()
                self.goodbyes.put_nowait(hello.hello.sampler)
                return
            if request.WhichOneof("kind") == "heartbeat":
                self.beats.put_nowait(request.heartbeat)
            else:
                self.requests.put_nowait(request)

    async def say(self, **message: Any) -> None:
        await self._context.write(rollout_pb2.RolloutResponse(**message))

    async def grant(self, lease: Lease) -> None:
        await self.say(lease=lease_to_pb(lease))

    async def ack(self, request: rollout_pb2.RolloutRequest) -> None:
        subtree = request.subtree
        await self.say(ack=rollout_pb2.Ack(lease=subtree.lease, tree=subtree.tree, index=subtree.index))

    async def next(self, kind: str) -> Any:
        """The next request, which must be of this kind."""
        request = await self.requests.get()
        assert request.WhichOneof("kind") == kind, request
        return request

    def break_stream(self) -> None:
        self._broken.put_nowait(None)

    # ---- weights

    async def DescribeWeights(self, request: object, context: Any) -> weights_pb2.DescribeWeightsResponse:
        if self.late or not self.versions:
            self.late = max(0, self.late - 1)
            await context.abort(grpc.StatusCode.UNAVAILABLE, "no policy version yet")
        version = max(self.versions)
        self.described.put_nowait(version)
        files = [
            weights_pb2.WeightFile(name=name, bytes=len(data), sha256=hashlib.sha256(data).digest())
            for name, data in self.versions[version].items()
        ]
        return weights_pb2.DescribeWeightsResponse(version=version_to_pb(version), files=files)

    async def FetchWeights(
        self, request: weights_pb2.FetchWeightsRequest, context: Any
    ) -> AsyncIterator[weights_pb2.FetchWeightsResponse]:
        version = version_from_pb(request.version)
        self.fetched.append((version, request.name, request.offset))
        if version in self.forgotten:
            await context.abort(grpc.StatusCode.NOT_FOUND, "gone")
        data = self.versions[version][request.name]
        if request.name in self.corrupt:
            self.corrupt.remove(request.name)
            data = data[:-1] + bytes([data[-1] ^ 1])
        for offset in range(request.offset, len(data), CHUNK):
            yield weights_pb2.FetchWeightsResponse(offset=offset, data=data[offset : offset + CHUNK])
            if request.name in self.interrupt:
                self.interrupt.remove(request.name)
                await context.abort(grpc.StatusCode.UNAVAILABLE, "the test broke the stream")


@asynccontextmanager
async def serving(learner: FakeLearner) -> AsyncGenerator[grpc.aio.Channel]:
    """A channel to ``learner``."""
    server = grpc.aio.server()
    rollout_pb2_grpc.add_RolloutServiceServicer_to_server(learner, server)
    weights_pb2_grpc.add_WeightsServiceServicer_to_server(learner, server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    try:
        async with grpc.aio.insecure_channel(f"127.0.0.1:{port}", options=OPTIONS) as channel:
            yield channel
    finally:
        await server.stop(grace=None)
