"""One MQTT connection of the embedded broker: its keep-alive, and limits on what it may send and what may be queued for it.

amqtt has none of these limits: it reads a whole payload at once, does nothing when a keep-alive is missed, and lets any
number of messages wait to be handled or to be written.
"""

from __future__ import annotations

import asyncio
import time

from amqtt.adapters import StreamReaderAdapter
from amqtt.mqtt.constants import QOS_2
from amqtt.mqtt.protocol.broker_handler import BrokerProtocolHandler
from amqtt.mqtt.publish import PublishPacket
from amqtt.session import OutgoingApplicationMessage, Session

from services.broker.limits import DEFAULT_LIMITS, BrokerLimits
from treegrpo.net.limits import CONTROL_BYTES, NAME_BYTES

PAUSE_SECONDS = 0.01
OVERHEAD_BYTES = 256
"""Of a queued message, beside topic and payload."""


class ClientReader(StreamReaderAdapter):
    """Reads at most one control message at a time, and disconnects a silent client. A disconnected one is at end of file."""

    session: Session | None = None
    """Set after CONNECT, which has a time limit of its own."""
    _keepalive_seconds = 0.0
    _disconnected = False
    _last_read = 0.0

    def __init__(self, reader: asyncio.StreamReader, limits: BrokerLimits = DEFAULT_LIMITS) -> None:
        super().__init__(reader)
        self.limits = limits

    def start_keepalive(self, session: Session) -> None:
        """Require the client to keep its connection alive. amqtt's own timers for that do nothing, but outlive the session."""
        longest = self.limits.keepalive_seconds
        self._keepalive_seconds = self.limits.keepalive_factor * min(session.keep_alive or longest, longest)
        session.keep_alive = 0
        self.session = session

    async def read(self, n: int = -1) -> bytes:
        if n > CONTROL_BYTES:
            self.disconnect()
        if self.session is not None:
            while not self._disconnected and self._pending_messages(self.session) > self.limits.pending_messages:  # noqa: ASYNC110 - amqtt has no event for it
                await asyncio.sleep(PAUSE_SECONDS)
        if self._disconnected:
            raise ConnectionResetError
        data = await (super().read(n) if self.session is None else self._read_with_keepalive(n))
        self._last_read = time.monotonic()
        return data

    @staticmethod
    def _pending_messages(session: Session) -> int:
        """Messages that amqtt has received but not handled yet."""
        return session.delivered_message_queue.qsize()

    async def _read_with_keepalive(self, n: int) -> bytes:
        for seconds in (max(0.0, self._last_read + self._keepalive_seconds - time.monotonic()), self.limits.grace_seconds):
            try:
                async with asyncio.timeout(seconds):
                    return await super().read(n)
            except TimeoutError:
                continue
        self.disconnect()
        raise ConnectionResetError

    @property
    def disconnected(self) -> bool:
        """Whether this side has ended the connection."""
        return self._disconnected

    def disconnect(self) -> None:
        """End the connection from this side."""
        self._disconnected = True
        self.feed_eof()


class ClientHandler(BrokerProtocolHandler):
    """Disconnects a client that does not read or acknowledge messages, or that publishes with QoS 2.

    When it comes back it gets the present state, whereas amqtt would silently let it miss a message.
    """

    _unwritten = 0

    async def handle_publish(self, publish_packet: PublishPacket) -> None:
        if publish_packet.qos == QOS_2:
            self._disconnect()
        else:
            await super().handle_publish(publish_packet)

    async def mqtt_publish(
        self, topic: str, data: bytes | bytearray, qos: int | None, retain: bool, ack_timeout: int | None = None
    ) -> OutgoingApplicationMessage:
        size = len(topic) + len(data) + OVERHEAD_BYTES
        self._unwritten += size
        try:
            if self._unwritten <= self._limits.unwritten_bytes:
                return await super().mqtt_publish(topic, data, qos, retain, ack_timeout)
        except TimeoutError:
            pass
        finally:
            self._unwritten -= size
        self._disconnect()
        return OutgoingApplicationMessage(None, topic, qos, data, retain)

    async def _retry_deliveries(self) -> None:
        """Do nothing: amqtt would send recent messages again, and wait for their acknowledgement."""

    @property
    def _limits(self) -> BrokerLimits:
        return self.reader.limits if isinstance(self.reader, ClientReader) else DEFAULT_LIMITS

    def _disconnect(self) -> None:
        if isinstance(self.reader, ClientReader):
            self.reader.disconnect()


def describe_peer(session: Session | None) -> str:
    """Address and user name of a client, for the log; the name is the client's own and is cut to NAME_BYTES."""
    return f"{session.remote_address} (MQTT user {(session.username or '')[:NAME_BYTES]!r})" if session else "nobody"
