"""The embedded MQTT broker, for runs on one machine: `python -m services.broker.server CONFIG.toml`."""

from __future__ import annotations

import asyncio
import logging
import ssl
import struct
from collections.abc import Iterator
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

from amqtt.adapters import ReaderAdapter, StreamWriterAdapter, WriterAdapter
from amqtt.broker import Broker, Server
from amqtt.contexts import Action, BrokerConfig, ListenerConfig, ListenerType
from amqtt.errors import AMQTTError, CodecError
from amqtt.mqtt.protocol.broker_handler import BrokerProtocolHandler
from amqtt.session import Session
from amqtt.utils import gen_client_id

from services.broker.connection import ClientHandler, ClientReader, describe_peer
from services.broker.limits import DEFAULT_LIMITS, RETAINED_BYTES, BrokerLimits
from treegrpo.config.schema import Config
from treegrpo.config.security import USERS, Role
from treegrpo.errors import ConfigError, describe
from treegrpo.net.address import check_free, check_port
from treegrpo.observability.rate_limited_log import RateLimitedLog, rate_limit_library_logs
from treegrpo.runtime.entrypoint import run_service
from treegrpo.security.credentials import OPEN, Credentials, read_secret_file

log = logging.getLogger(__name__)
SHUTDOWN_SECONDS = 2.0
ANONYMOUS = {"amqtt.plugins.authentication.AnonymousAuthPlugin": {"allow_anonymous": True}}
SUBSCRIPTION_FAILURE = 0x80
"""MQTT's return code for a subscription that is not made."""
BAD_CONNECT = (CodecError, ValueError, TypeError, AttributeError, IndexError, OverflowError, struct.error)
"""What amqtt raises at a malformed CONNECT, beside its own errors."""


class LimitedBroker(Broker):
    """amqtt's broker with authentication before any change of state, and with limits on what a client may ask for."""

    _shutting_down = False

    def __init__(
        self, config: BrokerConfig, context: ssl.SSLContext | None = None, limits: BrokerLimits = DEFAULT_LIMITS
    ) -> None:
        """``context``: TLS with client certificates; None: plain text."""
        super().__init__(config)
        self._context = context
        self._limits = limits
        self._refusals = RateLimitedLog(log)
        self._subscriptions = _SubscriptionTable()

    async def shutdown(self) -> None:
        self._shutting_down = True
        await super().shutdown()

    async def _create_server_instance(
        self,
        listener_name: str,
        listener_type: ListenerType,  # noqa: ARG002 - TCP
        address: str | None,
        port: int,
        ssl_context: ssl.SSLContext | None,  # noqa: ARG002 - ours
    ) -> asyncio.Server:
        return await asyncio.start_server(
            partial(self.stream_connected, listener_name=listener_name),
            (address or "").removeprefix("[").removesuffix("]"),
            port,
            reuse_address=True,
            ssl=self._context,
            ssl_handshake_timeout=self._limits.handshake_seconds if self._context else None,
            ssl_shutdown_timeout=self._limits.handshake_seconds if self._context else None,
        )

    async def stream_connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, listener_name: str) -> None:
        try:
            if self._servers[listener_name].conn_count < self._limits.peers:  # amqtt would let the next ones wait
                await self._client_connected(listener_name, ClientReader(reader, self._limits), StreamWriterAdapter(writer))
        finally:
            writer.close()

    async def _initialize_client_session(
        self,
        reader: ReaderAdapter,
        writer: WriterAdapter,
        remote_address: str,
        remote_port: int,  # noqa: ARG002
    ) -> tuple[BrokerProtocolHandler, Session]:
        """Read CONNECT within the time limit, and change nothing: amqtt ends or changes the session of that client id here."""
        try:
            async with asyncio.timeout(self._limits.handshake_seconds):
                return await ClientHandler.init_from_connect(reader, writer, self.plugins_manager)
        except TimeoutError as error:
            raise AMQTTError(f"{remote_address} sent no CONNECT within {self._limits.handshake_seconds:.0f} s") from error
        except BAD_CONNECT as error:
            raise AMQTTError(f"{remote_address} sent a malformed CONNECT ({describe(error)})") from error

    async def _handle_client_session(
        self,
        reader: ReaderAdapter,
        writer: WriterAdapter,
        client_session: Session,
        handler: BrokerProtocolHandler,
        server: Server,
        listener_name: str,
    ) -> None:
        """Authenticate first: a refused client changes nothing, and no client takes over the client id of another user."""
        session = client_session
        session.client_id = session.client_id or gen_client_id()
        allowed = await self._authenticate(session, self.listeners_config[listener_name])
        existing = self._sessions.get(session.client_id)
        if not allowed or (existing is not None and existing[0].username != session.username):
            handler.attach(session, reader, writer)
            await handler.mqtt_connack_authorize(authorize=False)
            return
        session.clean_session = True  # no session is kept after a disconnect, even if the client asks for it
        if existing is not None:
            await self._end_session(session.client_id)
        if isinstance(reader, ClientReader):
            reader.start_keepalive(session)
        await super()._handle_client_session(reader, writer, session, handler, server, listener_name)

    async def _end_session(self, client_id: str) -> None:
        """End the current connection of this client id; its last will is published."""
        reader = self._sessions[client_id][1].reader
        await self._delete_session(client_id)
        if isinstance(reader, ClientReader):
            reader.disconnect()

    async def add_subscription(self, subscription: tuple[str, int], session: Session) -> int:
        """Refuse filters above the limit, and drop those without subscribers, which amqtt would keep."""
        topic = subscription[0]
        for empty in [other for other, sessions in self._subscriptions.items() if not sessions and other != topic]:
            del self._subscriptions[empty]
        own = sum(one is session for sessions in self._subscriptions.values() for one, _ in sessions)
        if own >= self._limits.filters or len(topic.encode(errors="replace")) > self._limits.filter_bytes:
            return SUBSCRIPTION_FAILURE
        return await super().add_subscription(subscription, session)

    async def retain_message(
        self,
        source_session: Session | None,
        topic_name: str | None,
        data: bytes | bytearray | None,
        qos: int | None = None,
    ) -> None:
        """Retain a bounded number of topics, and no large message."""
        presence = "/members/" in (topic_name or "")
        most = self._limits.retained + (0 if presence else self._limits.retained_besides)
        has_capacity = topic_name in self._retained_messages or len(self._retained_messages) < most
        if not data or (has_capacity and len(topic_name or "") + len(data) <= RETAINED_BYTES):
            await super().retain_message(None, topic_name, data, qos)  # it would keep the session of who left long ago
        else:
            self._refusals.log_refusal(
                describe_peer(source_session), "retained", "its message is not retained: too large, or one topic too many"
            )

    async def _publish_retained_messages_for_subscription(self, subscription: tuple[str, int], session: Session) -> None:
        """Send what the client may read of its own subscriptions. amqtt would send those of all clients' subscriptions."""
        topic_filter, qos = subscription
        handler = self._get_handler(session)
        if handler is None or not any(one is session for one, _ in self._subscriptions.get(topic_filter, ())):
            return
        kept = [
            message
            for topic, message in list(self._retained_messages.items())
            if self._matches(topic, topic_filter) and await self._topic_filtering(session, topic, Action.RECEIVE)
        ]
        for start in range(0, len(kept), self._limits.retained_at_once):
            some = kept[start : start + self._limits.retained_at_once]
            sending = [handler.mqtt_publish(one.topic, one.data, min(qos, one.qos or qos), retain=True) for one in some]
            await asyncio.gather(*sending, return_exceptions=True)
            if isinstance(handler.reader, ClientReader) and handler.reader.disconnected:
                return

    async def _cleanup_session(self, client_id: str) -> None:
        """Remove a session that ended, unless the client has come back under the same id since."""
        session = self._sessions[client_id][0] if client_id in self._sessions else None
        if self._shutting_down or session is None or session.transitions.state != "connected":
            await super()._cleanup_session(client_id)

    async def _handle_message_delivery(
        self, client_session: Session, handler: BrokerProtocolHandler, wait_deliver: asyncio.Future[Any]
    ) -> bool:
        """Deliver all messages that were received and acknowledged: amqtt drops them when their sender disconnects."""
        queue = client_session.delivered_message_queue
        good = await super()._handle_message_delivery(client_session, handler, wait_deliver)
        while good and not queue.empty():
            message = asyncio.get_running_loop().create_future()
            message.set_result(queue.get_nowait())
            good = await super()._handle_message_delivery(client_session, handler, message)
        return good


class _SubscriptionTable(dict[str, list[tuple[Session, int]]]):
    """Subscriptions by filter; iterates over a copy, since amqtt awaits while it iterates and clients come and go meanwhile.

    Without it a client that connects while another subscribes is dropped, and a message that is being delivered gets lost.
    """

    def __iter__(self) -> Iterator[str]:
        return iter(list(super().__iter__()))

    def items(self) -> Any:
        return {topic: list(sessions) for topic, sessions in super().items()}.items()


def embedded_broker(
    address: str,
    access: Credentials = OPEN,
    passwords: dict[str, str] | None = None,
    limits: BrokerLimits = DEFAULT_LIMITS,
) -> LimitedBroker:
    """Create an amqtt broker for ``address``, not started, with or without TLS and users. Needs a running event loop."""
    listener = ListenerConfig(bind=address, max_connections=limits.peers)
    rules = {"services.broker.acl.PasswordAuthPlugin": {"passwords": passwords}, "services.broker.acl.TopicAclPlugin": {}}
    config = BrokerConfig(listeners={"default": listener}, plugins=rules if passwords else ANONYMOUS)
    return LimitedBroker(config, access.server_context(ask=True), limits)


def read_passwords(directory: Path | None) -> dict[str, str]:
    """Read the users' passwords from the files of `treegrpo certs`. Raises ConfigError."""
    if directory is None:
        raise ConfigError("The embedded broker takes its users from security.dir; set it, or run Mosquitto (docs/security.md).")
    return {role.value: read_secret_file(directory / f"{role.value}.password", "a password").decode().strip() for role in USERS}


async def serve_broker(config: Config) -> None:
    """Run the broker at ``broker.address`` until cancelled. Raises AddressInUseError, ConfigError."""
    access = Credentials.from_config(config.security, Role.BROKER)
    access.check_listen("broker.address", config.broker.address)
    passwords = read_passwords(config.security.dir) if config.security.tls else None
    check_port(config.broker.address, "broker.address")
    check_free(config.broker.address, "broker.address")
    for library in ("amqtt", "transitions"):
        logging.getLogger(library).setLevel(logging.WARNING)
    rate_limit_library_logs("amqtt", "asyncio")
    broker = embedded_broker(config.broker.address, access, passwords)
    await broker.start()
    try:
        await asyncio.get_running_loop().create_future()
    finally:
        with suppress(TimeoutError):  # its shutdown may wait for ever for a client that stays connected; there is nothing to save
            async with asyncio.timeout(SHUTDOWN_SECONDS):
                await broker.shutdown()


if __name__ == "__main__":
    run_service(serve_broker)
