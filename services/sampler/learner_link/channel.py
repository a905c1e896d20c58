"""Opens the gRPC channel to the learner: mutual TLS with certificate reload, and a reason when connecting fails."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from functools import partial
from typing import Any, cast

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from treegrpo.config.security import Role, host_of
from treegrpo.errors import UnavailableError
from treegrpo.net import limits
from treegrpo.security.credentials import CertificateFiles, Credentials
from treegrpo.security.tls_reload import CertificateReload

CONNECT_SECONDS = 10.0
HEALTH_SECONDS = 2.0
"""The longest a learner that is not ready may take to say why."""
OPTIONS = (
    ("grpc.compression_enabled_algorithms_bitset", limits.PLAIN),
    ("grpc.max_receive_message_length", limits.MESSAGE_BYTES),
    ("grpc.max_send_message_length", limits.MESSAGE_BYTES),
    ("grpc.keepalive_time_ms", 30_000),
    ("grpc.keepalive_timeout_ms", 10_000),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.max_reconnect_backoff_ms", 5_000),
    ("grpc.enable_http_proxy", 0),  # parts connect directly, even if the environment names a proxy
)
REASONS = {
    "CERTIFICATE_VERIFY_FAILED": "its certificate is not from an authority in our ca.pem, or out of date",
    "Hostname Verification": "its certificate is not a learner's",
    "WRONG_VERSION_NUMBER": "it speaks plain text and we TLS: give it [security] too",
}
"""Messages of gRPC, and what they mean."""
CLOSED = ("Socket closed", "Connection reset", "recvmsg", "Broken pipe")
"""Messages of gRPC when the learner closes the connection in the handshake, without a reason."""


def open_channel(address: str, access: Credentials) -> grpc.aio.Channel:
    """Open a channel to the learner, which need not run yet. Its certificate is checked for its role, wherever it runs."""
    if access.keys is None:
        return grpc.aio.insecure_channel(address, options=OPTIONS)
    pem = access.keys.pem
    credentials = grpc.ssl_channel_credentials(pem.ca, pem.key, pem.certificate)
    name = ("grpc.ssl_target_name_override", host_of(Role.LEARNER))
    return grpc.aio.secure_channel(address, credentials, options=(*OPTIONS, name))


class ReloadingChannel:
    """A channel that reloads the client certificate: each call uses the files as they are on disk. Has the methods stubs use.

    gRPC keeps the credentials that a channel was opened with, so renewed files open another channel. Calls that began on the
    one before end on it.
    """

    def __init__(self, address: str, access: Credentials, keys: CertificateFiles) -> None:
        self._address = address
        self._access = access
        self._channels: list[grpc.aio.Channel] = []
        self._reload = CertificateReload(keys, self._open_channel, partial(keys.check, access.role))

    def unary_unary(self, path: str, **options: Any) -> Callable[..., Any]:
        return partial(self._call, "unary_unary", path, options)

    def unary_stream(self, path: str, **options: Any) -> Callable[..., Any]:
        return partial(self._call, "unary_stream", path, options)

    def stream_stream(self, path: str, **options: Any) -> Callable[..., Any]:
        return partial(self._call, "stream_stream", path, options)

    def _call(self, kind: str, path: str, options: dict[str, Any], *request: object, **more: Any) -> Any:
        return getattr(self._newest_channel(), kind)(path, **options)(*request, **more)

    async def channel_ready(self) -> None:
        await self._newest_channel().channel_ready()

    async def close(self) -> None:
        for channel in self._channels:
            await channel.close()

    def _open_channel(self) -> Any:
        self._channels.append(open_channel(self._address, self._access))
        return self._channels[-1]

    def _newest_channel(self) -> Any:
        self._reload.reload_if_changed()
        return self._reload.newest


async def connect_learner(address: str, access: Credentials, seconds: float = CONNECT_SECONDS) -> grpc.aio.Channel:
    """Connect to the learner; the channel reloads renewed certificates by itself.

    Raises:
        ConfigError: ``address`` is on another machine, and there is no TLS.
        UnavailableError: nothing answers within ``seconds``, or one side does not trust the other.
    """
    access.check_reach("sampler.learner", address)
    if access.keys is None:
        channel = open_channel(address, access)
    else:
        channel = cast("grpc.aio.Channel", ReloadingChannel(address, access, access.keys))
    try:
        async with asyncio.timeout(seconds):
            await channel.channel_ready()
    except TimeoutError as error:
        why = explain_failure(await _failure_details(channel), access)
        await channel.close()
        raise UnavailableError(
            f"No learner answers at {address} (sampler.learner or learner.listen) within {seconds:.0f} s{why}; "
            "start one with `treegrpo learner`, or set sampler.learner to where it runs."
        ) from error
    return channel


def explain_failure(details: str, access: Credentials) -> str:
    """The likely reason for a failed connection, from the details of gRPC's error, after a colon; empty if none is known."""
    if reason := next((reason for mark, reason in REASONS.items() if mark in details), ""):
        return f": {reason}"
    if not any(mark in details for mark in CLOSED):
        return ""
    if access.keys is None:
        return ": it closes the connection, likely because it speaks TLS and we plain text: set security.dir"
    return f": it closes the connection, likely because it does not trust {access.keys.certificate}; its log says why"


async def _failure_details(channel: grpc.aio.Channel) -> str:
    """The details of gRPC's error about a channel that is not ready."""
    try:
        await health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(), timeout=HEALTH_SECONDS)  # pyright: ignore[reportAttributeAccessIssue] - untyped stub
    except grpc.aio.AioRpcError as error:
        return error.details() or ""
    return ""
