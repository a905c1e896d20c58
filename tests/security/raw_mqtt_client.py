"""A raw MQTT 3.1.1 client, for packets that no client library would send."""

from __future__ import annotations

import asyncio
import ssl
import struct
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager

from services.broker.limits import DEFAULT_LIMITS, BrokerLimits
from services.broker.server import LimitedBroker, embedded_broker
from tests.ports import free_address
from treegrpo.security.credentials import OPEN, Credentials

SECONDS = 10.0


def text(data: bytes | str) -> bytes:
    raw = data.encode() if isinstance(data, str) else data
    return struct.pack(">H", len(raw)) + raw


def packet(kind: int, body: bytes) -> bytes:
    """``kind``: the first byte."""
    length, rest = b"", len(body)
    while True:
        rest, digit = divmod(rest, 128)[0], rest % 128
        length += bytes([digit | (128 if rest else 0)])
        if not rest:
            return bytes([kind]) + length + body


def connect(
    client: str,
    user: str = "",
    password: str = "",
    *,
    clean: bool = True,
    keepalive: int = 60,
    will: tuple[str, bytes] | None = None,
) -> bytes:
    flags = (0xC0 if user else 0) | (2 if clean else 0) | (0x0C if will else 0)
    parts = [text(client), *((text(will[0]), text(will[1])) if will else ()), *((text(user), text(password)) if user else ())]
    return packet(0x10, text("MQTT") + bytes([4, flags]) + struct.pack(">H", keepalive) + b"".join(parts))


def publish(topic: str, payload: bytes, *, qos: int = 0, retain: bool = False, number: int = 1) -> bytes:
    return packet(0x30 | qos << 1 | retain, text(topic) + (struct.pack(">H", number) if qos else b"") + payload)


def subscribe(*topics: str, qos: int = 0, number: int = 1) -> bytes:
    return packet(0x82, struct.pack(">H", number) + b"".join(text(topic) + bytes([qos]) for topic in topics))


def unsubscribe(*topics: str, number: int = 1) -> bytes:
    return packet(0xA2, struct.pack(">H", number) + b"".join(map(text, topics)))


DISCONNECT = packet(0xE0, b"")


class RawMqttClient:
    """A connection, packet by packet."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader = reader
        self.writer = writer

    async def send_packets(self, *packets: bytes) -> None:
        self.writer.writelines(packets)
        await self.writer.drain()

    async def receive_packet(self) -> tuple[int, bytes]:
        """The next packet: first byte and body. Raises IncompleteReadError or ConnectionError at the end."""
        async with asyncio.timeout(SECONDS):
            kind, length, shift = (await self.reader.readexactly(1))[0], 0, 0
            while True:
                digit = (await self.reader.readexactly(1))[0]
                length |= (digit & 127) << shift
                shift += 7
                if digit < 128:
                    return kind, await self.reader.readexactly(length)

    async def wait_closed(self) -> bool:
        """Wait until the broker hangs up."""
        try:
            async with asyncio.timeout(SECONDS):
                while await self.reader.read(1 << 16):
                    pass
        except (ConnectionError, ssl.SSLError):
            pass
        return True


@asynccontextmanager
async def open_connection(address: str, context: ssl.SSLContext | None = None) -> AsyncGenerator[RawMqttClient]:
    host, _, port = address.rpartition(":")
    reader, writer = await asyncio.open_connection(host, int(port), ssl=context, server_hostname=host if context else None)
    try:
        yield RawMqttClient(reader, writer)
    finally:
        writer.transport.abort()


@asynccontextmanager
async def connected_client(address: str, hello: bytes, context: ssl.SSLContext | None = None) -> AsyncGenerator[RawMqttClient]:
    """A client that the broker has taken in."""
    async with open_connection(address, context) as client:
        await client.send_packets(hello)
        assert await client.receive_packet() == (0x20, b"\0\0")
        yield client


@asynccontextmanager
async def broker(
    who: Credentials = OPEN, passwords: dict[str, str] | None = None, limits: BrokerLimits = DEFAULT_LIMITS
) -> AsyncGenerator[tuple[str, LimitedBroker]]:
    """The embedded broker in this process, and where."""
    address = free_address()
    made = embedded_broker(address, who, passwords, limits)
    await made.start()
    try:
        yield address, made
    finally:
        async with asyncio.timeout(SECONDS):
            while made._servers["default"].conn_count:  # pyright: ignore[reportPrivateUsage]  # noqa: ASYNC110
                await asyncio.sleep(0.01)  # amqtt's shutdown may wait for ever for a client that stays
            await made.shutdown()
