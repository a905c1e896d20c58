"""Who comes in to the intake's gRPC server, and how much they may do there.

TLS asks everybody for a certificate of our authority; a stranger, an expired certificate and plain text end there.
`AuthInterceptor` checks each call, `StreamAdmission` the first message of a rollout stream. What is refused is counted, and
logged once for each peer and reason.
"""

from __future__ import annotations

import logging
import re
from typing import Any, NamedTuple, NoReturn

import grpc

from learner.intake.rpc.auth_interceptor import AuthInterceptor, peer_identity
from treegrpo.config.security import Role
from treegrpo.errors import ConfigError
from treegrpo.net import limits
from treegrpo.observability.metrics import IntakeMetrics
from treegrpo.observability.rate_limited_log import RateLimitedLog, rate_limit_library_logs
from treegrpo.security.credentials import CertificateFiles, Credentials
from treegrpo.v1 import rollout_pb2 as pb

log = logging.getLogger(__name__)
NAME = re.compile(rf"[A-Za-z0-9_.-]{{1,{limits.NAME_BYTES}}}")
FEW = 8
"""Handshakes that lead to no call before somebody is told; then twice as many, and so on."""
OPTIONS = [
    ("grpc.compression_enabled_algorithms_bitset", limits.PLAIN),
    ("grpc.http2.bdp_probe", 0),
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


class CallRefusal(NamedTuple):
    """A call's end: gRPC's code and a sentence that says what to do."""

    code: grpc.StatusCode
    sentence: str


class ConnectionMonitor:
    """Counts refusals, and logs each once; counts handshakes, of which gRPC does not say how they end."""

    def __init__(self, metrics: IntakeMetrics) -> None:
        self._metrics = metrics
        self._refusals = RateLimitedLog(log)
        self._callers: dict[str, None] = {}
        """Connections that a call came on, the newest of them."""
        self._astray = 0
        """Handshakes that no call has followed."""
        self._suspicious = FEW

    async def refuse(self, context: Context, reason: str, code: grpc.StatusCode, sentence: str) -> NoReturn:
        """End a call; ``reason``: few values, the metric's label."""
        self._metrics.peers_refused.labels(reason).inc()
        self._refusals.count(context.peer().rpartition(":")[0], reason, sentence)  # a peer comes back from another port
        await context.abort(code, sentence)
        raise AssertionError  # it never returns

    def handshake(self) -> None:
        """One begins."""
        self._metrics.handshakes.inc()
        self._astray += 1
        if self._astray >= self._suspicious:
            log.warning(
                "%d TLS handshakes led to no call: somebody comes without a certificate of ours, or in plain text; "
                "who it is gRPC says with GRPC_VERBOSITY=INFO",
                self._astray,
            )
            self._suspicious *= 2

    def called(self, peer: str) -> None:
        """A call came; its connection's handshake was a good one."""
        if peer in self._callers:
            return
        self._metrics.connections.inc()
        self._astray = max(0, self._astray - 1)
        self._callers[peer] = None
        while len(self._callers) > 2 * limits.PEERS:
            del self._callers[next(iter(self._callers))]


class StreamAdmission:
    """Looks at the Hello of a rollout stream."""

    def __init__(self, visitors: ConnectionMonitor, message_bytes: int) -> None:
        """``message_bytes``: the largest message of a sampler."""
        self._visitors = visitors
        self._most = limits.samplers(message_bytes)

    async def admit(self, first: pb.RolloutRequest | None, context: Context, connected: int) -> pb.Hello:
        """The Hello, or the end of the call; ``connected``: samplers that have a stream."""
        reason, refusal = _judge(first, peer_identity(context), connected, self._most)
        if refusal is not None:
            await self._visitors.refuse(context, reason, *refusal)
        assert first is not None  # noqa: S101 - _judge refuses it
        return first.hello

    async def refuse(self, context: Context, reason: str, code: grpc.StatusCode, sentence: str) -> NoReturn:
        """See `ConnectionMonitor.refuse`."""
        await self._visitors.refuse(context, reason, code, sentence)


def _judge(
    first: pb.RolloutRequest | None, holder: tuple[Role, str] | None, connected: int, most: int
) -> tuple[str, CallRefusal | None]:
    if first is None or first.WhichOneof("kind") != "hello":
        return "hello", CallRefusal(
            grpc.StatusCode.INVALID_ARGUMENT, "A rollout stream begins with Hello and the sampler's name."
        )
    hello = first.hello
    for what, name in (("sampler", hello.sampler), ("engine", hello.engine)):
        if not NAME.fullmatch(name):
            return "hello", CallRefusal(
                grpc.StatusCode.INVALID_ARGUMENT,
                f"Hello.{what} is {name[: limits.NAME_BYTES]!r}; a name has 1 to {limits.NAME_BYTES} letters, digits or _.-",
            )
    if holder is not None and holder[1] and holder[1] != hello.sampler:
        return "forged", CallRefusal(
            grpc.StatusCode.PERMISSION_DENIED,
            f"Sampler {hello.sampler!r} shows the certificate of sampler {holder[1]!r}; set sampler.id = {holder[1]}.",
        )
    if connected >= most:
        return "peers", CallRefusal(
            grpc.StatusCode.RESOURCE_EXHAUSTED, f"{connected} samplers are connected, the most one learner takes; stop some."
        )
    return "", None


def create_server(address: str, access: Credentials, visitors: ConnectionMonitor, message_bytes: int) -> grpc.aio.Server:
    """A server bound to ``address``, not started, that takes messages of ``message_bytes`` at most.

    Raises ConfigError for an address that may not be used in plain text.
    """
    access.check_listen("learner.listen", address)
    rate_limit_library_logs("grpc", "asyncio")
    server = grpc.aio.server(
        options=[*OPTIONS, ("grpc.max_receive_message_length", message_bytes)],
        interceptors=[AuthInterceptor(visitors, roles=access.keys is not None)],
        maximum_concurrent_rpcs=limits.calls(message_bytes),
    )
    if access.keys is None:
        server.add_insecure_port(address)
    else:
        server.add_secure_port(address, _credentials(access.keys, access.role, visitors))
    return server


def _credentials(keys: CertificateFiles, role: Role, visitors: ConnectionMonitor) -> grpc.ServerCredentials:
    """The certificate as it is on disk at each handshake: renewed files serve at once."""
    served = keys.stamp

    def configuration() -> Any:
        pem = keys.pem
        return grpc.ssl_server_certificate_configuration([(pem.key, pem.certificate)], root_certificates=pem.ca)

    def renewed() -> Any:
        nonlocal served
        visitors.handshake()
        try:
            if (now := keys.stamp) == served:
                return None
            keys.check(role)
            made = configuration()
        except ConfigError as error:  # half of a renewal; the next handshake finds the rest
            log.warning("the certificate of before goes on to serve: %s", error)
            return None
        served = now
        return made

    return grpc.dynamic_ssl_server_credentials(configuration(), renewed, require_client_authentication=True)
