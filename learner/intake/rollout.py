"""RolloutService: one stream per sampler, in and out of the desk."""

from __future__ import annotations

import asyncio
import logging
from typing import Any, cast

import grpc

from learner.intake.desk import Desk
from learner.intake.peers import Peer
from treegrpo.codec import lease_end_from_pb
from treegrpo.errors import ContractError
from treegrpo.v1 import rollout_pb2 as pb
from treegrpo.v1 import rollout_pb2_grpc

log = logging.getLogger(__name__)
SILENCE_SECONDS = 60.0
"""A sampler says something at least this often; heartbeats come every few seconds."""

EOF: Any = cast("Any", grpc.aio).EOF
Context = grpc.aio.ServicerContext[pb.RolloutRequest, pb.RolloutResponse]


class RolloutServer(rollout_pb2_grpc.RolloutServiceServicer):
    def __init__(self, desk: Desk) -> None:
        self._desk = desk

    async def Rollout(self, request_iterator: object, context: Context) -> None:  # noqa: ARG002 - named by the contract
        """Serve one sampler until either side closes the stream."""
        first = await self._read(context)
        if first is None or first.WhichOneof("kind") != "hello" or not first.hello.sampler:
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, "A rollout stream begins with Hello and the sampler's name.")
        peer = self._desk.join(first.hello)
        writer = asyncio.create_task(self._write(peer, context), name=f"to-{peer.id}")
        try:
            while (request := await self._read(context)) is not None:
                self._hear(peer, request)
        except ContractError as error:
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, str(error))
        finally:
            writer.cancel()
            self._desk.leave(peer)

    async def _read(self, context: Context) -> pb.RolloutRequest | None:
        try:
            async with asyncio.timeout(SILENCE_SECONDS):
                request = await context.read()
        except TimeoutError:
            await context.abort(grpc.StatusCode.DEADLINE_EXCEEDED, f"Nothing came for {SILENCE_SECONDS:.0f} s; send heartbeats.")
        return None if request == EOF else request

    async def _write(self, peer: Peer, context: Context) -> None:
        while True:
            await context.write(await peer.outbox.get())

    def _hear(self, peer: Peer, request: pb.RolloutRequest) -> None:
        match request.WhichOneof("kind"):
            case "demand":
                self._desk.demand(peer, request.demand.leases)
            case "subtree":
                self._desk.accept(peer, request.subtree)
            case "lease_end":
                self._desk.end(peer, lease_end_from_pb(request.lease_end))
            case "heartbeat":
                pass
            case kind:
                raise ContractError(
                    f"A sampler sent {kind or 'an empty message'} in the middle of its stream; see rollout.proto."
                )
