"""A TCP proxy between two parts that injects network faults into their connections.

    client ──► proxy ──► target        every byte passes, until `fail` is called

A fault lasts some seconds. What it has done to a connection stays: one that was halved is halved until one side gives up.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import socket
import struct
from collections.abc import AsyncGenerator
from enum import Enum

CHUNK_BYTES = 1 << 18
DELAY_SECONDS = 0.3
CONNECT_SECONDS = 5.0


class LinkFault(Enum):
    OPEN = "open"
    DELAY = "delay"
    """Every chunk takes DELAY_SECONDS longer."""
    DROP = "drop"
    """Nothing passes and nothing closes; what was sent arrives when it is over. A new connection is not answered."""
    HALVE = "halve"
    """One direction closes, the other goes on."""
    CUT = "cut"
    """The connection closes in the middle of the next message, in either direction."""
    RESET = "reset"
    """Connections are reset, new ones too."""


class _ProxiedConnection:
    """One connection through the proxy: two streams."""

    def __init__(self, near: asyncio.StreamWriter, far: asyncio.StreamWriter) -> None:
        self.near = near
        self.far = far
        self.halved: asyncio.StreamWriter | None = None
        """The side that hears nothing more."""

    def halve(self, writer: asyncio.StreamWriter) -> None:
        self.halved = writer
        with contextlib.suppress(OSError, RuntimeError):  # closing already
            writer.write_eof()

    def close(self) -> None:
        self.near.close()
        self.far.close()

    def reset(self) -> None:
        for writer in (self.near, self.far):
            sock: socket.socket = writer.get_extra_info("socket")
            with contextlib.suppress(OSError):  # closed already
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            writer.transport.abort()


class FaultProxy:
    """Listens on a free port of this machine while the block of `serving` lasts."""

    def __init__(self, target: str, seed: int) -> None:
        host, _, port = target.rpartition(":")
        self._target = (host, int(port))
        self._random = random.Random(seed)
        self._links: set[_ProxiedConnection] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        self._passing = asyncio.Event()
        self._passing.set()
        self.mode = LinkFault.OPEN
        self.address = ""

    @contextlib.asynccontextmanager
    async def serving(self) -> AsyncGenerator[FaultProxy]:
        def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            task = asyncio.create_task(self._carry(reader, writer))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)
            task.add_done_callback(lambda _: writer.transport.abort())  # also of one that was cancelled while it waited

        server = await asyncio.start_server(connected, "127.0.0.1", 0, limit=CHUNK_BYTES)
        host, port = server.sockets[0].getsockname()[:2]
        self.address = f"{host}:{port}"
        try:
            yield self
        finally:
            server.close()
            for link in list(self._links):
                link.reset()
            for task in list(self._tasks):
                task.cancel()
            await asyncio.gather(*self._tasks, return_exceptions=True)

    async def fail(self, mode: LinkFault, seconds: float) -> None:
        """Be in ``mode`` for so long."""
        self.mode = mode
        if mode is LinkFault.DROP:
            self._passing.clear()
        for link in list(self._links):
            if mode is LinkFault.RESET:
                link.reset()
            elif mode is LinkFault.HALVE and link.halved is None:
                link.halve(self._random.choice((link.near, link.far)))
        try:
            await asyncio.sleep(seconds)  # how long the fault lasts
        finally:
            self.mode = LinkFault.OPEN
            self._passing.set()

    async def _carry(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """A connection from beginning to end."""
        try:
            await self._passing.wait()
            async with asyncio.timeout(CONNECT_SECONDS):
                far_reader, far = await asyncio.open_connection(*self._target, limit=CHUNK_BYTES)
        except (OSError, TimeoutError):
            await _closed(writer)
            return
        link = _ProxiedConnection(writer, far)
        self._links.add(link)
        try:
            if self.mode is LinkFault.RESET:
                link.reset()
            await asyncio.gather(self._pump(link, reader, far), self._pump(link, far_reader, writer))
        except OSError:
            link.reset()
        finally:
            self._links.discard(link)
            link.close()  # here, for what follows may be cancelled before it begins
            await asyncio.gather(_closed(writer), _closed(far))

    async def _pump(self, link: _ProxiedConnection, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while data := await reader.read(CHUNK_BYTES):
            await self._passing.wait()
            if self.mode is LinkFault.DELAY:
                await asyncio.sleep(DELAY_SECONDS)
            if self.mode is LinkFault.CUT:
                writer.write(data[: self._random.randrange(len(data))])
                link.close()
                return
            if link.halved is not writer:
                writer.write(data)
                await writer.drain()
        await self._passing.wait()  # the end of a stream is a message too
        if link.halved is not writer and writer.can_write_eof():
            with contextlib.suppress(OSError, RuntimeError):
                writer.write_eof()


async def _closed(writer: asyncio.StreamWriter) -> None:
    writer.close()
    with contextlib.suppress(OSError):  # of a connection that was reset
        await writer.wait_closed()
