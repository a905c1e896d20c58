"""A TCP proxy in front of a server that can answer with garbage or refuse connections."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager, suppress

GARBAGE = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: 29\r\n\r\n" + b'{"meta_info": {"oops": "no"}}'


class FaultyProxy:
    """Passes bytes on to ``target``; while `garbage` is set, every request is answered with it."""

    def __init__(self, target: str) -> None:
        host, _, port = target.rpartition(":")
        self._target = (host, int(port))
        self._tasks: set[asyncio.Task[None]] = set()
        self._listener: asyncio.Server | None = None
        self.garbage = False
        self.address = ""

    @asynccontextmanager
    async def serving(self) -> AsyncGenerator[FaultyProxy]:
        self._listener = await asyncio.start_server(self._connected, "127.0.0.1", 0)
        self.address = "{}:{}".format(*self._listener.sockets[0].getsockname()[:2])
        try:
            yield self
        finally:
            await self._close()

    async def shut(self, seconds: float) -> None:
        """Cut all connections, and have new ones refused for so long."""
        await self._close()
        await asyncio.sleep(seconds)  # how long the fault lasts
        host, _, port = self.address.rpartition(":")
        self._listener = await asyncio.start_server(self._connected, host, int(port))

    async def _close(self) -> None:
        if self._listener is not None:
            self._listener.close()
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.create_task(self._carry(reader, writer))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        task.add_done_callback(lambda _: writer.transport.abort())  # also of one that was cancelled before it began

    async def _carry(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        far = None
        try:
            far_reader, far = await asyncio.open_connection(*self._target)
            await asyncio.gather(self._there(reader, far, writer), self._back(far_reader, writer))
        except OSError:
            pass  # a connection that the other side has reset
        finally:
            for one in filter(None, (writer, far)):
                one.transport.abort()

    async def _there(self, reader: asyncio.StreamReader, far: asyncio.StreamWriter, near: asyncio.StreamWriter) -> None:
        while data := await reader.read(1 << 16):
            if self.garbage:
                near.write(GARBAGE)
            else:
                far.write(data)
                await far.drain()
        far.close()

    @staticmethod
    async def _back(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while data := await reader.read(1 << 16):
            writer.write(data)
            await writer.drain()
        with suppress(OSError):
            writer.close()
