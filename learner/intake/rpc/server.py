"""The intake's gRPC server: options, TLS with reloaded certificates, and the interceptor that checks each call.

TLS asks every client for a certificate of this run's authority, and ends the connection of one that has none, an expired one
or speaks plain text. `AuthInterceptor` checks each call, `StreamAdmission` the first message of a rollout stream.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from functools import partial
from typing import Any

import grpc

from learner.intake.rpc.auth_interceptor import AuthInterceptor
from learner.intake.rpc.refused_calls import RefusedCalls
from learner.intake.rpc.slow_client_timeouts import CallLimits
from treegrpo.config.security import Role
from treegrpo.net import limits
from treegrpo.observability.rate_limited_log import rate_limit_library_logs
from treegrpo.security.credentials import CertificateFiles, Credentials
from treegrpo.security.tls_reload import CertificateReload

log = logging.getLogger(__name__)
OPTIONS = (
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
)


def create_server(
    address: str,
    access: Credentials,
    refused_calls: RefusedCalls,
    message_bytes: int,
    *,
    call_limits: CallLimits | None = None,
    options: Sequence[tuple[str, int]] = OPTIONS,
) -> grpc.aio.Server:
    """A server bound to ``address``, not started, that takes messages of ``message_bytes`` at most.

    Raises ConfigError for an address that may not be used in plain text.
    """
    access.check_listen("learner.listen", address)
    rate_limit_library_logs("grpc", "asyncio")
    server = grpc.aio.server(
        options=[*options, ("grpc.max_receive_message_length", message_bytes)],
        interceptors=[AuthInterceptor(refused_calls, check_roles=access.keys is not None, call_limits=call_limits)],
        maximum_concurrent_rpcs=limits.calls(message_bytes),
    )
    if access.keys is None:
        server.add_insecure_port(address)
    else:
        server.add_secure_port(address, _server_credentials(access.keys, access.role, refused_calls))
    return server


def _server_credentials(keys: CertificateFiles, role: Role, refused_calls: RefusedCalls) -> grpc.ServerCredentials:
    """Credentials that follow renewed certificate files at each handshake."""

    def load() -> Any:
        pem = keys.pem
        return grpc.ssl_server_certificate_configuration([(pem.key, pem.certificate)], root_certificates=pem.ca)

    reload = CertificateReload(keys, load, partial(keys.check, role))

    def reload_if_changed() -> Any:
        refused_calls.record_handshake()
        return reload.newest if reload.reload_if_changed() else None

    return grpc.dynamic_ssl_server_credentials(reload.newest, reload_if_changed, require_client_authentication=True)
