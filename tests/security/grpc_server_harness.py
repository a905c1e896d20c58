"""The intake's gRPC server in this process, without an intake behind it, and clients of it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any, cast

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_health.v1._async import HealthServicer

from learner.intake.coordinator.coordinator import Coordinator
from learner.intake.coordinator.sampler_sessions import SamplerSession
from learner.intake.rpc.auth_interceptor import CallLimits
from learner.intake.rpc.refused_calls import RefusedCalls
from learner.intake.rpc.rollout_servicer import RolloutServicer
from learner.intake.rpc.server import OPTIONS, create_server
from learner.intake.rpc.stream_admission import StreamAdmission
from learner.intake.rpc.weights_servicer import WeightsServicer
from services.sampler.learner_link.channel import open_channel
from tests.intake.server_harness import no_versions
from tests.ports import free_address
from treegrpo.net.limits import HANDSHAKE_SECONDS, MESSAGE_BYTES
from treegrpo.observability.metrics import IntakeMetrics
from treegrpo.security.credentials import Credentials
from treegrpo.v1 import rollout_pb2 as pb
from treegrpo.v1 import rollout_pb2_grpc, weights_pb2, weights_pb2_grpc

SECONDS = 10.0
HELLO = pb.Hello(sampler="s7", incarnation=1, engine="fake")


@dataclass
class FakeCoordinator:
    """Takes samplers in and says welcome: the coordinator's part in this."""

    open_sessions: dict[str, SamplerSession] = field(default_factory=dict[str, SamplerSession])
    is_behind: bool = False

    def join_sampler(self, hello: pb.Hello) -> SamplerSession:
        peer = SamplerSession(hello.sampler, hello.incarnation, hello.engine, hello.capacity, max_queued=16)
        self.open_sessions[hello.sampler] = peer
        peer.send_response(pb.RolloutResponse(welcome=pb.Welcome(run="test")))
        return peer

    def leave_sampler(self, peer: SamplerSession) -> None:
        self.open_sessions.pop(peer.id, None)


@dataclass
class GrpcServerFixture:
    address: str
    metrics: IntakeMetrics
    reception: FakeCoordinator

    def refused(self, reason: str) -> float:
        return self.metrics.registry.get_sample_value("treegrpo_peers_refused_total", {"reason": reason}) or 0.0

    @property
    def connections(self) -> float:
        return self.metrics.registry.get_sample_value("treegrpo_tls_connections_total") or 0.0

    @property
    def handshakes(self) -> float:
        return self.metrics.registry.get_sample_value("treegrpo_tls_handshakes_total") or 0.0


@asynccontextmanager
async def serving(
    learner: Credentials,
    message_bytes: int = MESSAGE_BYTES,
    *,
    max_samplers: int = 64,
    handshake_seconds: float = HANDSHAKE_SECONDS,
    call_limits: CallLimits | None = None,
    options: Sequence[tuple[str, int]] = OPTIONS,
) -> AsyncGenerator[GrpcServerFixture]:
    metrics, reception, address = IntakeMetrics(), FakeCoordinator(), free_address()
    refused_calls = RefusedCalls(metrics)
    server = create_server(address, learner, refused_calls, message_bytes, call_limits=call_limits, options=options)
    admission = StreamAdmission(refused_calls, max_samplers)
    rollout = RolloutServicer(cast("Coordinator", reception), admission, refused_calls, handshake_seconds)
    rollout_pb2_grpc.add_RolloutServiceServicer_to_server(rollout, server)
    weights_pb2_grpc.add_WeightsServiceServicer_to_server(WeightsServicer(no_versions(), metrics), server)
    healthy = HealthServicer()
    health_pb2_grpc.add_HealthServicer_to_server(healthy, server)
    await server.start()
    await healthy.set("", health_pb2.HealthCheckResponse.SERVING)
    try:
        yield GrpcServerFixture(address, metrics, reception)
    finally:
        await server.stop(None)


async def describe_weights(fixture: GrpcServerFixture, who: Credentials) -> grpc.StatusCode:
    """What somebody gets who asks for weights; NOT of a version: none is published."""
    async with open_channel(fixture.address, who) as channel:
        try:
            await cast("Any", weights_pb2_grpc.WeightsServiceStub(channel)).DescribeWeights(
                weights_pb2.DescribeWeightsRequest(), timeout=SECONDS
            )
        except grpc.aio.AioRpcError as error:
            return error.code() if "No policy version" not in (error.details() or "") else grpc.StatusCode.OK
    raise AssertionError("weights out of nowhere")


async def stream(fixture: GrpcServerFixture, who: Credentials, *requests: pb.RolloutRequest) -> tuple[grpc.StatusCode, str]:
    """What a rollout stream that begins so comes to: OK when it is welcomed."""
    async with open_channel(fixture.address, who) as channel:
        call = cast("Any", rollout_pb2_grpc.RolloutServiceStub(channel)).Rollout()
        try:
            async with asyncio.timeout(SECONDS):
                for request in requests:
                    await call.write(request)
                first = await call.read()
        except (grpc.aio.AioRpcError, asyncio.InvalidStateError):
            return await call.code(), await call.details()
        if isinstance(first, pb.RolloutResponse) and first.WhichOneof("kind") == "welcome":
            call.cancel()
            return grpc.StatusCode.OK, ""
        return await call.code(), await call.details()


def hello(**changes: Any) -> pb.RolloutRequest:
    changed = pb.Hello()
    changed.CopyFrom(HELLO)
    for name, value in changes.items():
        setattr(changed, name, value)
    return pb.RolloutRequest(hello=changed)
