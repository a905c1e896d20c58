"""One MQTT connection of the embedded broker: how long it is listened to, how much it may send, how much may wait for it.

amqtt has none of these limits: it asks for a whole payload at once, does nothing when a keep-alive is missed, and lets any
number of messages wait to be passed on or to be written.
"""

from __future__ import annotations

import asyncio
import time

from amqtt.adapters import StreamReaderAdapter
from amqtt.errors import AMQTTError
from amqtt.mqtt.constants import QOS_2
from amqtt.mqtt.protocol.broker_handler import BrokerProtocolHandler
from amqtt.mqtt.publish import PublishPacket
from amqtt.session import OutgoingApplicationMessage, Session

from treegrpo.limits import CONTROL_BYTES, NAME_BYTES

KEEPALIVE_SECONDS = 60
"""The longest that a client may say it will be silent; also for one that says nothing."""
MISSED = 1.5
"""Times its keep-alive a client may be silent, as MQTT says."""
GRACE_SECONDS = 1.0
"""More, when time is up: it may have been this process that stood still."""
UNHANDLED = 256
"""Messages of one client that wait to be passed on; until they are fewer nothing is read from it."""
PAUSE_SECONDS = 0.01
UNWRITTEN_BYTES = 4 << 20
"""What may wait to be written to one client. The presence of everybody has 1 MiB."""
OVERHEAD_BYTES = 256
"""Of a message that waits, beside topic and payload."""


class Reader(StreamReaderAdapter):
    """Reads no more than a control message at once, and gives up a client that is silent. Then it is at its end."""

    session: Session | None = None
    """Known after CONNECT, which has a time limit of its own."""
    _ended = False
    _heard = 0.0

    async def read(self, n: int = -1) -> bytes:
        if n > CONTROL_BYTES:
            self.end()
        if self.session is not None:
            while not self._ended and self.session.delivered_message_queue.qsize() > UNHANDLED:  # noqa: ASYNC110 - amqtt's
                await asyncio.sleep(PAUSE_SECONDS)
        if self._ended:
            raise ConnectionResetError
        data = await (super().read(n) if self.session is None else self._patiently(n, self.session))
        self._heard = time.monotonic()
        return data

    async def _patiently(self, n: int, session: Session) -> bytes:
        patience = MISSED * min(session.keep_alive or KEEPALIVE_SECONDS, KEEPALIVE_SECONDS)
        for seconds in (max(0.0, self._heard + patience - time.monotonic()), GRACE_SECONDS):
            try:
                async with asyncio.timeout(seconds):
                    return await super().read(n)
            except TimeoutError:
                continue
        self.end()
        raise ConnectionResetError

    def end(self) -> None:
        """Hang up."""
        self._ended = True
        self.feed_eof()


class Handler(BrokerProtocolHandler):
    """Cuts off a client that does not read what is sent to it, or wants every message kept until it says so (QoS 2)."""

    _unwritten = 0

    async def handle_publish(self, publish_packet: PublishPacket) -> None:
        if publish_packet.qos == QOS_2:
            self._hang_up()
        else:
            await super().handle_publish(publish_packet)

    async def mqtt_publish(
        self, topic: str, data: bytes | bytearray, qos: int | None, retain: bool, ack_timeout: int | None = None
    ) -> OutgoingApplicationMessage:
        size = len(topic) + len(data) + OVERHEAD_BYTES
        if self._unwritten + size > UNWRITTEN_BYTES:
            self._hang_up()
            raise AMQTTError(f"more than {UNWRITTEN_BYTES} bytes wait for a client that does not read them")
        self._unwritten += size
        try:
            return await super().mqtt_publish(topic, data, qos, retain, ack_timeout)
        finally:
            self._unwritten -= size

    def _hang_up(self) -> None:
        if isinstance(self.reader, Reader):
            self.reader.end()


def peer_of(session: Session | None) -> str:
    """Who it is, for the log: names are the client's own words."""
    return f"{session.remote_address} (MQTT user {(session.username or '')[:NAME_BYTES]!r})" if session else "nobody"
