"""RolloutService: one bidirectional stream per sampler, between gRPC and the coordinator."""

from __future__ import annotations

import asyncio
import logging
import math
import time
from typing import Any, cast

import grpc

from learner.intake.coordinator.coordinator import Coordinator
from learner.intake.coordinator.sampler_sessions import SamplerSession
from learner.intake.rpc.refused_calls import RefusedCalls
from learner.intake.rpc.stream_admission import StreamAdmission
from treegrpo.errors import ContractError, describe
from treegrpo.net.limits import HANDSHAKE_SECONDS
from treegrpo.v1 import rollout_pb2 as pb
from treegrpo.v1 import rollout_pb2_grpc
from treegrpo.wire.codec import lease_end_from_pb

log = logging.getLogger(__name__)
FLUSH_SECONDS = 1.0
"""The end of a stream waits for the message before it for so long at most."""
EOF: Any = cast("Any", grpc.aio).EOF
Context = grpc.aio.ServicerContext[pb.RolloutRequest, pb.RolloutResponse]


class RolloutServicer(rollout_pb2_grpc.RolloutServiceServicer):
    def __init__(
        self,
        coordinator: Coordinator,
        admission: StreamAdmission,
        refused_calls: RefusedCalls,
        handshake_seconds: float = HANDSHAKE_SECONDS,
    ) -> None:
        """``handshake_seconds``: time limit for a stream's first message."""
        self._coordinator = coordinator
        self._admission = admission
        self._refused_calls = refused_calls
        self._handshake_seconds = handshake_seconds

    async def Rollout(self, request_iterator: object, context: Context) -> None:  # noqa: ARG002 - named by the contract
        """Serve one sampler until either side closes the stream."""
        try:
            first = await self._read_first(context)
        except ContractError as error:
            await self._refused_calls.abort_call(context, "message", grpc.StatusCode.INVALID_ARGUMENT, str(error))
        hello = await self._admission.admit_stream(first, context, len(self._coordinator.open_sessions))
        session = self._coordinator.join_sampler(hello)
        writer = asyncio.create_task(self._write_outbox(session, context), name=f"to-{session.id}")
        refusal: ContractError | None = None
        try:
            await self._read_requests(session, context)
        except TimeoutError:
            session.disconnect_reason = session.disconnect_reason or f"Sampler {session.id} took too long."
        except ContractError as error:
            refusal = error
        finally:
            session.close_outbox()
            self._coordinator.leave_sampler(session)
            await asyncio.wait({writer}, timeout=FLUSH_SECONDS)
            writer.cancel()
        if refusal is not None:
            await self._refused_calls.abort_call(context, "message", grpc.StatusCode.INVALID_ARGUMENT, str(refusal))
        if session.disconnect_reason:
            await context.abort(grpc.StatusCode.DEADLINE_EXCEEDED, session.disconnect_reason)

    async def _read_first(self, context: Context) -> pb.RolloutRequest | None:
        """The first message; None if the stream ends without one."""
        seconds = self._handshake_seconds
        try:
            async with asyncio.timeout(seconds):
                request = await context.read()
        except TimeoutError:
            sentence = f"Nothing came for {seconds:.0f} s; send Hello and heartbeats."
            await self._refused_calls.abort_call(context, "slow", grpc.StatusCode.DEADLINE_EXCEEDED, sentence)
        return None if request == EOF else request

    async def _read_requests(self, session: SamplerSession, context: Context) -> None:
        """Read a stream to its end. Raises TimeoutError when the session is disconnected, for silence or a full outbox."""
        try:
            async with asyncio.timeout(0.0 if session.disconnect_reason else None) as session.stream:
                while (request := await context.read()) != EOF:
                    self._handle_request(session, request)
                    if self._coordinator.is_behind:  # the next message stays in the stream: the delay is not the sampler's
                        session.last_heard = math.inf
                        await self._coordinator.wait_for_journal()
                    session.last_heard = time.monotonic()
        finally:
            session.stream = None  # it may be disconnected while its last message is written

    async def _write_outbox(self, session: SamplerSession, context: Context) -> None:
        """Write the outbox to the stream; it ends between messages, never within one."""
        try:
            while (message := await session.outbox.get()) is not None:
                await context.write(message)
        except (grpc.aio.BaseError, asyncio.InvalidStateError) as error:
            session.disconnect(f"The stream to sampler {session.id} broke ({describe(error)}); it has to join again.")

    def _handle_request(self, session: SamplerSession, request: pb.RolloutRequest) -> None:
        match request.WhichOneof("kind"):
            case "demand":
                self._coordinator.set_demand(session, request.demand.leases)
            case "subtree":
                self._coordinator.accept_subtree(session, request.subtree)
            case "lease_end":
                self._coordinator.end_lease(session, lease_end_from_pb(request.lease_end))
            case "heartbeat":
                beat = request.heartbeat
                session.waiting_for, session.waited_seconds = " ".join(beat.waits_for.split()), beat.waited_seconds
            case kind:
                raise ContractError(
                    f"A sampler sent {kind or 'an empty message'} in the middle of its stream; see rollout.proto."
                )
