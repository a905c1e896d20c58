"""Who comes in to the intake's gRPC server, and how much they may do there.

TLS asks everybody for a certificate of our authority; a stranger, an expired certificate and plain text end there. `Gate` lets
each role call what is its own, `Admission` looks at the first message of a rollout stream. What is refused is counted, and
logged once for each peer and reason.

    RolloutService, WeightsService   samplers
    Health                           every role

No call publishes weights: the trainer hands them over by a local socket.
"""

from __future__ import annotations

import inspect
import logging
import re
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any, NamedTuple, cast

import grpc

from treegrpo import limits
from treegrpo.access import Access, Keys, roles_in
from treegrpo.errors import ConfigError
from treegrpo.security import Role
from treegrpo.telemetry import IntakeMetrics
from treegrpo.v1 import rollout_pb2 as pb

log = logging.getLogger(__name__)
ALLOWED = {
    "treegrpo.v1.RolloutService": {Role.SAMPLER},
    "treegrpo.v1.WeightsService": {Role.SAMPLER},
    "grpc.health.v1.Health": set(Role),
}
NAME = re.compile(rf"[A-Za-z0-9_.-]{{1,{limits.NAME_BYTES}}}")
REMEMBERED = 1024
"""Refusals remembered, so that each is logged once."""
OPTIONS = [
    ("grpc.max_receive_message_length", limits.MESSAGE_BYTES),
    ("grpc.max_send_message_length", limits.MESSAGE_BYTES),
    ("grpc.max_concurrent_streams", limits.STREAMS),
    ("grpc.max_allowed_incoming_connections", limits.PEERS),
    ("grpc.server_handshake_timeout_ms", int(1000 * limits.HANDSHAKE_SECONDS)),
    ("grpc.max_connection_idle_ms", int(1000 * limits.IDLE_SECONDS)),
    ("grpc.keepalive_time_ms", 30_000),
    ("grpc.keepalive_timeout_ms", 10_000),
    ("grpc.http2.min_recv_ping_interval_without_data_ms", 10_000),
    ("grpc.http2.max_ping_strikes", 0),
    ("grpc.so_reuseport", 0),
]

Context = grpc.aio.ServicerContext[Any, Any]


class Refusal(NamedTuple):
    """A call's end: gRPC's code and a sentence that says what to do."""

    code: grpc.StatusCode
    sentence: str


class Watch:
    """Counts refusals, and logs each once."""

    def __init__(self, metrics: IntakeMetrics) -> None:
        self._metrics = metrics
        self._said: dict[tuple[str, str], None] = {}

    def refused(self, peer: str, reason: str, sentence: str) -> None:
        """``reason``: few values, the metric's label."""
        self._metrics.peers_refused.labels(reason).inc()
        key = (peer.rpartition(":")[0], sentence)  # a peer comes back from another port
        if key not in self._said:
            log.warning("refused %s: %s", peer, sentence)
            self._said[key] = None
            while len(self._said) > REMEMBERED:
                del self._said[next(iter(self._said))]

    def handshake(self) -> None:
        self._metrics.handshakes.inc()


class Gate(grpc.aio.ServerInterceptor):
    """Lets each role call what is its own."""

    def __init__(self, watch: Watch) -> None:
        self._watch = watch

    async def intercept_service(self, continuation: Callable[..., Awaitable[Any]], handler_call_details: Any) -> Any:
        handler = await continuation(handler_call_details)
        if handler is None:
            return None  # no such method: gRPC says so
        method = str(handler_call_details.method)
        shape = f"{'stream' if handler.request_streaming else 'unary'}_{'stream' if handler.response_streaming else 'unary'}"
        guarded = self._guarded(getattr(handler, shape), method)
        make = getattr(grpc, f"{shape}_rpc_method_handler")
        return make(guarded, handler.request_deserializer, handler.response_serializer)

    def _guarded(self, serve: Callable[..., Any], method: str) -> Callable[..., Any]:
        """``serve`` behind the gate; a coroutine stays one, a generator too: gRPC asks which it is."""
        if inspect.isasyncgenfunction(serve):

            async def generate(request: object, context: Context) -> AsyncIterator[Any]:
                await self._check(method, context)
                async for response in serve(request, context):
                    yield response

            return generate

        async def answer(request: object, context: Context) -> Any:
            await self._check(method, context)
            return await serve(request, context)

        return answer

    async def _check(self, method: str, context: Context) -> None:
        holder = holder_of(context)
        allowed = ALLOWED.get(method.strip("/").partition("/")[0], set[Role]())
        if holder is None or holder[0] not in allowed:
            who = f"The role {holder[0].value}" if holder else "A certificate without a role"
            sentence = (
                f"{who} may not call {method}; that is for {', '.join(sorted(role.value for role in allowed)) or 'nobody'}."
            )
            self._watch.refused(context.peer(), "role", sentence)
            await context.abort(grpc.StatusCode.PERMISSION_DENIED, sentence)


class Admission:
    """Looks at the Hello of a rollout stream."""

    def __init__(self, watch: Watch) -> None:
        self._watch = watch

    async def admit(self, first: pb.RolloutRequest | None, context: Context, connected: int) -> pb.Hello:
        """The Hello, or the end of the call; ``connected``: samplers that have a stream."""
        reason, refusal = _judge(first, holder_of(context), connected)
        if refusal is not None:
            self._watch.refused(context.peer(), reason, refusal.sentence)
            await context.abort(*refusal)
        assert first is not None  # noqa: S101 - _judge refuses it
        return first.hello


def _judge(first: pb.RolloutRequest | None, holder: tuple[Role, str] | None, connected: int) -> tuple[str, Refusal | None]:
    if first is None or first.WhichOneof("kind") != "hello":
        return "hello", Refusal(grpc.StatusCode.INVALID_ARGUMENT, "A rollout stream begins with Hello and the sampler's name.")
    hello = first.hello
    for what, name in (("sampler", hello.sampler), ("engine", hello.engine)):
        if not NAME.fullmatch(name):
            return "hello", Refusal(
                grpc.StatusCode.INVALID_ARGUMENT,
                f"Hello.{what} is {name[: limits.NAME_BYTES]!r}; a name has 1 to {limits.NAME_BYTES} letters, digits or _.-",
            )
    if holder is not None and holder[1] and holder[1] != hello.sampler:
        return "forged", Refusal(
            grpc.StatusCode.PERMISSION_DENIED,
            f"Sampler {hello.sampler!r} shows the certificate of sampler {holder[1]!r}; set sampler.id = {holder[1]}.",
        )
    if connected >= limits.PEERS:
        return "peers", Refusal(
            grpc.StatusCode.RESOURCE_EXHAUSTED, f"{connected} samplers are connected, the most one learner takes; stop some."
        )
    return "", None


def holder_of(context: Context) -> tuple[Role, str] | None:
    """Role and name in the certificate of who calls; None in plain text."""
    names = cast("dict[str, list[bytes]]", context.auth_context()).get("x509_subject_alternative_name", [])
    return roles_in([name.decode(errors="replace") for name in names])


def open_server(address: str, access: Access, watch: Watch) -> grpc.aio.Server:
    """A server bound to ``address``, not started. Raises ConfigError for an address that may not be used in plain text."""
    access.check_listen("learner.listen", address)
    if access.keys is None:
        server = grpc.aio.server(options=OPTIONS)
        server.add_insecure_port(address)
        return server
    server = grpc.aio.server(options=OPTIONS, interceptors=[Gate(watch)])
    server.add_secure_port(address, _credentials(access.keys, watch))
    return server


def _credentials(keys: Keys, watch: Watch) -> grpc.ServerCredentials:
    """The certificate as it is on disk at each handshake: renewed files serve at once."""

    def configuration() -> Any:
        pem = keys.pem
        return grpc.ssl_server_certificate_configuration([(pem.key, pem.certificate)], root_certificates=pem.ca)

    def renewed() -> Any:
        watch.handshake()
        try:
            return configuration()
        except ConfigError as error:
            log.warning("the certificate of before goes on to serve: %s", error)
            return None

    return grpc.dynamic_ssl_server_credentials(configuration(), renewed, require_client_authentication=True)
