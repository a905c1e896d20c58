"""The embedded MQTT broker, for runs on one machine: `python -m services.cli.broker CONFIG.toml`."""

from __future__ import annotations

import asyncio
import logging
import ssl
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from amqtt.adapters import ReaderAdapter, StreamReaderAdapter, StreamWriterAdapter, WriterAdapter
from amqtt.broker import Broker, Server
from amqtt.contexts import BrokerConfig, ListenerConfig
from amqtt.errors import AMQTTError
from amqtt.mqtt.protocol.broker_handler import BrokerProtocolHandler
from amqtt.session import Session

from treegrpo.access import OPEN, Access, read_secret
from treegrpo.config import Config
from treegrpo.edge import run_service
from treegrpo.errors import ConfigError
from treegrpo.limits import CONTROL_BYTES, HANDSHAKE_SECONDS, PEERS
from treegrpo.security import USERS, Role
from treegrpo.telemetry import check_free

SHUTDOWN_SECONDS = 2.0
ANYBODY = {"amqtt.plugins.authentication.AnonymousAuthPlugin": {"allow_anonymous": True}}


class PatientBroker(Broker):
    """amqtt's broker, which hangs up on who sends too much at once or does not say who it is."""

    _ending = False

    def __init__(self, config: BrokerConfig) -> None:
        super().__init__(config)
        self._subscriptions = _Subscriptions()

    async def shutdown(self) -> None:
        self._ending = True
        await super().shutdown()

    async def _cleanup_session(self, client_id: str) -> None:
        """Forget a session that ended: the client may have come back under the same id since it was listed for it."""
        session = self._sessions[client_id][0] if client_id in self._sessions else None
        if self._ending or session is None or session.transitions.state != "connected":
            await super()._cleanup_session(client_id)

    async def _handle_client_session(
        self,
        reader: ReaderAdapter,
        writer: WriterAdapter,
        client_session: Session,
        handler: BrokerProtocolHandler,
        server: Server,
        listener_name: str,
    ) -> None:
        """Who is refused leaves nothing behind: amqtt would keep a session."""
        if await self._authenticate(client_session, self.listeners_config[listener_name]):
            await super()._handle_client_session(reader, writer, client_session, handler, server, listener_name)
            return
        handler.attach(client_session, reader, writer)
        await handler.mqtt_connack_authorize(authorize=False)

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

    @staticmethod
    def _create_ssl_context(listener: ListenerConfig) -> ssl.SSLContext:
        """Who has no certificate of ours gets no further: amqtt ends the session of a client id before it asks who comes."""
        context = Broker._create_ssl_context(listener)  # noqa: SLF001 - overridden
        context.verify_mode = ssl.CERT_REQUIRED
        return context

    async def stream_connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, listener_name: str) -> None:
        try:
            await self._client_connected(listener_name, _Bounded(reader), StreamWriterAdapter(writer))
        finally:
            writer.close()

    async def _initialize_client_session(
        self, reader: ReaderAdapter, writer: WriterAdapter, remote_address: str, remote_port: int
    ) -> tuple[BrokerProtocolHandler, Session]:
        try:
            async with asyncio.timeout(HANDSHAKE_SECONDS):
                return await super()._initialize_client_session(reader, writer, remote_address, remote_port)
        except TimeoutError as error:
            raise AMQTTError(f"{remote_address} said nothing for {HANDSHAKE_SECONDS:.0f} s") from error


class _Subscriptions(dict[str, list[tuple[Session, int]]]):
    """By filter. amqtt goes through them while it awaits, and others come and go meanwhile: it gets a copy to go through.

    Without it a client that connects while another subscribes is dropped, and a message that is being passed on gets lost.
    """

    def __iter__(self) -> Iterator[str]:
        return iter(list(super().__iter__()))

    def items(self) -> Any:
        return {topic: list(sessions) for topic, sessions in super().items()}.items()


class _Bounded(StreamReaderAdapter):
    """Reads no more than a control message at once, for amqtt asks for a whole payload; after a larger one it is at its end."""

    _over = False

    async def read(self, n: int = -1) -> bytes:
        self._over = self._over or n > CONTROL_BYTES
        if self._over:
            raise ConnectionResetError(f"a message of more than {CONTROL_BYTES} bytes")
        return await super().read(n)


def embedded_broker(address: str, access: Access = OPEN, passwords: dict[str, str] | None = None) -> Broker:
    """An amqtt broker for ``address``, not started: with TLS and users, or for everybody. Needs a running event loop."""
    files: dict[str, Any] = {}
    if (keys := access.keys) is not None:
        files = {"ssl": True, "cafile": keys.ca, "certfile": keys.certificate, "keyfile": keys.key}
    listener = ListenerConfig(bind=address, max_connections=PEERS, **files)
    rules = {"services.cli.broker_rules.Passwords": {"passwords": passwords}, "services.cli.broker_rules.Topics": {}}
    return PatientBroker(BrokerConfig(listeners={"default": listener}, plugins=rules if passwords else ANYBODY))


def passwords_in(directory: Path | None) -> dict[str, str]:
    """The users' passwords as `treegrpo certs` made them. Raises ConfigError."""
    if directory is None:
        raise ConfigError("The embedded broker takes its users from security.dir; set it, or run Mosquitto (docs/security.md).")
    return {role.value: read_secret(directory / f"{role.value}.password", "a password").decode().strip() for role in USERS}


async def serve(config: Config) -> None:
    """Run the broker at ``broker.address`` until cancelled. Raises AddressInUseError, ConfigError."""
    access = Access.of(config.security, Role.BROKER)
    access.check_listen("broker.address", config.broker.address)
    passwords = passwords_in(config.security.dir) if config.security.tls else None
    check_free(config.broker.address, "broker.address")
    for chatty in ("amqtt", "transitions"):
        logging.getLogger(chatty).setLevel(logging.WARNING)
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
