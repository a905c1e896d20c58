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

from services.broker.peers import UNWRITTEN_BYTES, Handler, Reader, peer_of
from treegrpo.config.schema import Config
from treegrpo.config.security import USERS, Role
from treegrpo.errors import ConfigError, describe
from treegrpo.net.address import check_free, check_port
from treegrpo.net.limits import HANDSHAKE_SECONDS, PEERS
from treegrpo.observability.rate_limited_log import RateLimitedLog, rate_limit_library_logs
from treegrpo.runtime.entrypoint import run_service
from treegrpo.security.credentials import OPEN, Credentials, read_secret_file

log = logging.getLogger(__name__)
SHUTDOWN_SECONDS = 2.0
ANYBODY = {"amqtt.plugins.authentication.AnonymousAuthPlugin": {"allow_anonymous": True}}
FILTERS = 16
"""Topic filters of one client. Ours have four at most."""
FILTER_BYTES = 1024
RETAINED = 2 * PEERS
"""Topics with a retained message: everybody's presence, and that of those who left a moment ago."""
RESERVED = 64
"""Further ones for what is no presence: whoever fills the others keeps no run from saying its state."""
RETAINED_BYTES = 4096
"""The largest message that is retained. The largest of ours has a few hundred bytes."""
RETAINED_AT_ONCE = UNWRITTEN_BYTES // (4 * RETAINED_BYTES)
"""Retained messages that are sent to a new-comer before it has acknowledged them: no more than may wait for one client."""
REFUSED = 0x80
"""MQTT's word for a subscription that is not made."""
BAD_CONNECT = (CodecError, ValueError, TypeError, AttributeError, IndexError, OverflowError, struct.error)
"""What amqtt raises at a CONNECT that is none, beside its own errors."""


class PatientBroker(Broker):
    """amqtt's broker, which asks who comes before it does anything for them, and has limits for what they may ask."""

    _ending = False

    def __init__(self, config: BrokerConfig, context: ssl.SSLContext | None = None) -> None:
        """``context``: TLS that asks for certificates; None: in plain text."""
        super().__init__(config)
        self._context = context
        self._refusals = RateLimitedLog(log)
        self._subscriptions = _Subscriptions()

    async def shutdown(self) -> None:
        self._ending = True
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
            ssl_handshake_timeout=HANDSHAKE_SECONDS if self._context else None,
            ssl_shutdown_timeout=HANDSHAKE_SECONDS if self._context else None,
        )

    async def stream_connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, listener_name: str) -> None:
        try:
            if self._servers[listener_name].conn_count < PEERS:  # amqtt would let the next ones wait
                await self._client_connected(listener_name, Reader(reader), StreamWriterAdapter(writer))
        finally:
            writer.close()

    async def _initialize_client_session(
        self,
        reader: ReaderAdapter,
        writer: WriterAdapter,
        remote_address: str,
        remote_port: int,  # noqa: ARG002
    ) -> tuple[BrokerProtocolHandler, Session]:
        """CONNECT, within HANDSHAKE_SECONDS. Nothing is done yet: amqtt ends or changes the session of that client id here."""
        try:
            async with asyncio.timeout(HANDSHAKE_SECONDS):
                return await Handler.init_from_connect(reader, writer, self.plugins_manager)
        except TimeoutError as error:
            raise AMQTTError(f"{remote_address} said nothing for {HANDSHAKE_SECONDS:.0f} s") from error
        except BAD_CONNECT as error:
            raise AMQTTError(f"{remote_address} sent a CONNECT that is none ({describe(error)})") from error

    async def _handle_client_session(
        self,
        reader: ReaderAdapter,
        writer: WriterAdapter,
        client_session: Session,
        handler: BrokerProtocolHandler,
        server: Server,
        listener_name: str,
    ) -> None:
        """Who is refused leaves nothing behind and changes nothing; nobody takes the client id of another user."""
        session = client_session
        session.client_id = session.client_id or gen_client_id()
        may = await self._authenticate(session, self.listeners_config[listener_name])
        there = self._sessions.get(session.client_id)
        if not may or (there is not None and there[0].username != session.username):
            handler.attach(session, reader, writer)
            await handler.mqtt_connack_authorize(authorize=False)
            return
        session.clean_session = True  # a client that left is not remembered, whatever it asks for
        if there is not None:
            await self._take_over(session.client_id)
        if isinstance(reader, Reader):
            reader.listen(session)
        await super()._handle_client_session(reader, writer, session, handler, server, listener_name)

    async def _take_over(self, client_id: str) -> None:
        """The connection that has this client id so far ends, and leaves its will."""
        reader = self._sessions[client_id][1].reader
        await self._delete_session(client_id)
        if isinstance(reader, Reader):
            reader.end()

    async def add_subscription(self, subscription: tuple[str, int], session: Session) -> int:
        """Refused beyond FILTERS; amqtt keeps those that nobody has any more, and so does not notice when it grows."""
        topic = subscription[0]
        for empty in [other for other, sessions in self._subscriptions.items() if not sessions and other != topic]:
            del self._subscriptions[empty]
        own = sum(one is session for sessions in self._subscriptions.values() for one, _ in sessions)
        if own >= FILTERS or len(topic.encode(errors="replace")) > FILTER_BYTES:
            return REFUSED
        return await super().add_subscription(subscription, session)

    async def retain_message(
        self,
        source_session: Session | None,
        topic_name: str | None,
        data: bytes | bytearray | None,
        qos: int | None = None,
    ) -> None:
        """Not beyond RETAINED topics, and nothing large."""
        most = RETAINED + (0 if "/members/" in (topic_name or "") else RESERVED)
        room = topic_name in self._retained_messages or len(self._retained_messages) < most
        if not data or (room and len(topic_name or "") + len(data) <= RETAINED_BYTES):
            await super().retain_message(None, topic_name, data, qos)  # it would keep the session of who left long ago
        else:
            self._refusals.log_refusal(
                peer_of(source_session), "retained", "its message is not retained: too large, or one topic too many"
            )

    async def _publish_retained_messages_for_subscription(self, subscription: tuple[str, int], session: Session) -> None:
        """What it may read, of what it subscribed to itself. amqtt would give a new-comer what anybody has subscribed to."""
        wanted, qos = subscription
        handler = self._get_handler(session)
        if handler is None or not any(one is session for one, _ in self._subscriptions.get(wanted, ())):
            return
        kept = [
            message
            for topic, message in list(self._retained_messages.items())
            if self._matches(topic, wanted) and await self._topic_filtering(session, topic, Action.RECEIVE)
        ]
        for start in range(0, len(kept), RETAINED_AT_ONCE):
            some = kept[start : start + RETAINED_AT_ONCE]
            sending = [handler.mqtt_publish(one.topic, one.data, min(qos, one.qos or qos), retain=True) for one in some]
            await asyncio.gather(*sending, return_exceptions=True)
            if isinstance(handler.reader, Reader) and handler.reader.ended:
                return

    async def _cleanup_session(self, client_id: str) -> None:
        """Forget a session that ended: the client may have come back under the same id since it was listed for it."""
        session = self._sessions[client_id][0] if client_id in self._sessions else None
        if self._ending or session is None or session.transitions.state != "connected":
            await super()._cleanup_session(client_id)

    async def _handle_message_delivery(
        self, client_session: Session, handler: BrokerProtocolHandler, wait_deliver: asyncio.Future[Any]
    ) -> bool:
        """All that has come, and has been acknowledged, before anything else: amqtt drops it when its sender says goodbye."""
        queue = client_session.delivered_message_queue
        good = await super()._handle_message_delivery(client_session, handler, wait_deliver)
        while good and not queue.empty():
            message = asyncio.get_running_loop().create_future()
            message.set_result(queue.get_nowait())
            good = await super()._handle_message_delivery(client_session, handler, message)
        return good


class _Subscriptions(dict[str, list[tuple[Session, int]]]):
    """By filter. amqtt goes through them while it awaits, and others come and go meanwhile: it gets a copy to go through.

    Without it a client that connects while another subscribes is dropped, and a message that is being passed on gets lost.
    """

    def __iter__(self) -> Iterator[str]:
        return iter(list(super().__iter__()))

    def items(self) -> Any:
        return {topic: list(sessions) for topic, sessions in super().items()}.items()


def embedded_broker(address: str, access: Credentials = OPEN, passwords: dict[str, str] | None = None) -> PatientBroker:
    """An amqtt broker for ``address``, not started: with TLS and users, or for everybody. Needs a running event loop."""
    listener = ListenerConfig(bind=address, max_connections=PEERS)
    rules = {"services.broker.acl.Passwords": {"passwords": passwords}, "services.broker.acl.Topics": {}}
    config = BrokerConfig(listeners={"default": listener}, plugins=rules if passwords else ANYBODY)
    return PatientBroker(config, access.server_context(ask=True))


def passwords_in(directory: Path | None) -> dict[str, str]:
    """The users' passwords as `treegrpo certs` made them. Raises ConfigError."""
    if directory is None:
        raise ConfigError("The embedded broker takes its users from security.dir; set it, or run Mosquitto (docs/security.md).")
    return {role.value: read_secret_file(directory / f"{role.value}.password", "a password").decode().strip() for role in USERS}


async def serve(config: Config) -> None:
    """Run the broker at ``broker.address`` until cancelled. Raises AddressInUseError, ConfigError."""
    access = Credentials.from_config(config.security, Role.BROKER)
    access.check_listen("broker.address", config.broker.address)
    passwords = passwords_in(config.security.dir) if config.security.tls else None
    check_port(config.broker.address, "broker.address")
    check_free(config.broker.address, "broker.address")
    for chatty in ("amqtt", "transitions"):
        logging.getLogger(chatty).setLevel(logging.WARNING)
    rate_limit_library_logs("amqtt", "asyncio")
    broker = embedded_broker(config.broker.address, access, passwords)
    await broker.start()
    try:
        await asyncio.get_running_loop().create_future()
    finally:
        with suppress(TimeoutError):  # its shutdown may wait for ever for a client that stays; there is nothing to save
            async with asyncio.timeout(SHUTDOWN_SECONDS):
                await broker.shutdown()


if __name__ == "__main__":
    run_service(serve)
