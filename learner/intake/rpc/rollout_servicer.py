"""RolloutService: one stream per sampler, in and out of the desk."""

from __future__ import annotations

import asyncio
import logging
import math
import time
from typing import Any, cast

import grpc

from learner.intake.coordinator.coordinator import Desk
from learner.intake.coordinator.sampler_sessions import SamplerSession
from learner.intake.rpc.server import StreamAdmission
from treegrpo.errors import ContractError, describe
from treegrpo.net.limits import HANDSHAKE_SECONDS
from treegrpo.v1 import rollout_pb2 as pb
from treegrpo.v1 import rollout_pb2_grpc
from treegrpo.wire.codec import lease_end_from_pb

log = logging.getLogger(__name__)
LAST_WORD_SECONDS = 1.0
"""The longest that the end of a stream waits for the message before it."""
EOF: Any = cast("Any", grpc.aio).EOF
Context = grpc.aio.ServicerContext[pb.RolloutRequest, pb.RolloutResponse]


class RolloutServicer(rollout_pb2_grpc.RolloutServiceServicer):
    def __init__(self, desk: Desk, admission: StreamAdmission) -> None:
        self._desk = desk
        self._admission = admission

    async def Rollout(self, request_iterator: object, context: Context) -> None:  # noqa: ARG002 - named by the contract
        """Serve one sampler until either side closes the stream."""
        try:
            first = await self._read(context, HANDSHAKE_SECONDS)
        except ContractError as error:
            await self._admission.refuse(context, "message", grpc.StatusCode.INVALID_ARGUMENT, str(error))
        peer = self._desk.join(await self._admission.admit(first, context, len(self._desk.open_sessions)))
        writer = asyncio.create_task(self._write(peer, context), name=f"to-{peer.id}")
        refusal: ContractError | None = None
        try:
            await self._listen(peer, context)
        except TimeoutError:
            peer.disconnect_reason = peer.disconnect_reason or f"Sampler {peer.id} took too long."
        except ContractError as error:
            refusal = error
        finally:
            peer.close_outbox()
            self._desk.leave(peer)
            await asyncio.wait({writer}, timeout=LAST_WORD_SECONDS)
            writer.cancel()
        if refusal is not None:
            await self._admission.refuse(context, "message", grpc.StatusCode.INVALID_ARGUMENT, str(refusal))
        if peer.disconnect_reason:
            await context.abort(grpc.StatusCode.DEADLINE_EXCEEDED, peer.disconnect_reason)

    async def _listen(self, peer: SamplerSession, context: Context) -> None:
        """Hear a sampler to the end of its stream. Raises TimeoutError when the desk hangs up: it watches for silence."""
        try:
            async with asyncio.timeout(0.0 if peer.disconnect_reason else None) as peer.stream:
                while (request := await context.read()) != EOF:
                    self._hear(peer, request)
                    if self._desk.behind:  # what it says next stays in its stream, and its silence is our own
                        peer.last_heard = math.inf
                        await self._desk.caught_up()
                    peer.last_heard = time.monotonic()
        finally:
            peer.stream = None  # it may be hung up on while its last message is written

    async def _read(self, context: Context, seconds: float) -> pb.RolloutRequest | None:
        try:
            async with asyncio.timeout(seconds):
                request = await context.read()
        except TimeoutError:
            sentence = f"Nothing came for {seconds:.0f} s; send Hello and heartbeats."
            await self._admission.refuse(context, "slow", grpc.StatusCode.DEADLINE_EXCEEDED, sentence)
        return None if request == EOF else request

    async def _write(self, peer: SamplerSession, context: Context) -> None:
        """Whole messages to the end: the end of a stream behind half a message is one that no peer ever hears."""
        try:
            while (message := await peer.outbox.get()) is not None:
                await context.write(message)
        except (grpc.aio.BaseError, asyncio.InvalidStateError) as error:
            peer.disconnect(f"The stream to sampler {peer.id} broke ({describe(error)}); it has to join again.")

    def _hear(self, peer: SamplerSession, request: pb.RolloutRequest) -> None:
        match request.WhichOneof("kind"):
            case "demand":
                self._desk.demand(peer, request.demand.leases)
            case "subtree":
                self._desk.accept(peer, request.subtree)
            case "lease_end":
                self._desk.end(peer, lease_end_from_pb(request.lease_end))
            case "heartbeat":
                beat = request.heartbeat
                peer.waiting_for, peer.waited_seconds = " ".join(beat.waits_for.split()), beat.waited_seconds
            case kind:
                raise ContractError(
                    f"A sampler sent {kind or 'an empty message'} in the middle of its stream; see rollout.proto."
                )
