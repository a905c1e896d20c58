"""One MQTT connection of the embedded broker: how long it is listened to, how much it may send, how much may wait for it.

amqtt has none of these limits: it asks for a whole payload at once, does nothing when a keep-alive is missed, and lets any
number of messages wait to be passed on or to be written.
"""

from __future__ import annotations

import asyncio
import time

from amqtt.adapters import StreamReaderAdapter
from amqtt.mqtt.constants import QOS_2
from amqtt.mqtt.protocol.broker_handler import BrokerProtocolHandler
from amqtt.mqtt.publish import PublishPacket
from amqtt.session import OutgoingApplicationMessage, Session

from treegrpo.net.limits import CONTROL_BYTES, NAME_BYTES

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
    _patience = 0.0
    _ended = False
    _heard = 0.0

    def listen(self, session: Session) -> None:
        """From now on the client has to keep itself alive. amqtt's own timers for that do nothing, but outlive the session."""
        self._patience = MISSED * min(session.keep_alive or KEEPALIVE_SECONDS, KEEPALIVE_SECONDS)
        session.keep_alive = 0
        self.session = session

    async def read(self, n: int = -1) -> bytes:
        if n > CONTROL_BYTES:
            self.end()
        if self.session is not None:
            while not self._ended and self.session.delivered_message_queue.qsize() > UNHANDLED:  # noqa: ASYNC110 - amqtt's
                await asyncio.sleep(PAUSE_SECONDS)
        if self._ended:
            raise ConnectionResetError
        data = await (super().read(n) if self.session is None else self._patiently(n))
        self._heard = time.monotonic()
        return data

    async def _patiently(self, n: int) -> bytes:
        for seconds in (max(0.0, self._heard + self._patience - time.monotonic()), GRACE_SECONDS):
            try:
                async with asyncio.timeout(seconds):
                    return await super().read(n)
            except TimeoutError:
                continue
        self.end()
        raise ConnectionResetError

    @property
    def ended(self) -> bool:
        """Whether it was hung up on."""
        return self._ended

    def end(self) -> None:
        """Hang up."""
        self._ended = True
        self.feed_eof()


class Handler(BrokerProtocolHandler):
    """Cuts off a client that does not read or acknowledge what is sent to it, or wants messages kept until it says so (QoS 2).

    When it comes back it is told the present state, whereas amqtt would let it miss a message in silence.
    """

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
        self._unwritten += size
        try:
            if self._unwritten <= UNWRITTEN_BYTES:
                return await super().mqtt_publish(topic, data, qos, retain, ack_timeout)
        except TimeoutError:
            pass
        finally:
            self._unwritten -= size
        self._hang_up()
        return OutgoingApplicationMessage(None, topic, qos, data, retain)

    async def _retry_deliveries(self) -> None:
        """Nothing is left from another connection; amqtt would send again what has just been sent, and wait for it."""

    def _hang_up(self) -> None:
        if isinstance(self.reader, Reader):
            self.reader.end()


def peer_of(session: Session | None) -> str:
    """Who it is, for the log: names are the client's own words."""
    return f"{session.remote_address} (MQTT user {(session.username or '')[:NAME_BYTES]!r})" if session else "nobody"
