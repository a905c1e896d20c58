"""A web server that says what a test tells it to, byte for byte."""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncGenerator, AsyncIterable, Callable
from contextlib import asynccontextmanager, suppress

Pieces = Callable[[bytes], AsyncIterable[bytes]]
"""What is sent in answer to a request, piece by piece."""


@asynccontextmanager
async def answering(raw: bytes | Pieces | None) -> AsyncGenerator[str]:
    """A server that answers every connection with ``raw``, or never with ``None``; yields its URL."""
    closing = asyncio.Event()
    open_now: dict[asyncio.Task[None], asyncio.StreamWriter] = {}

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if (task := asyncio.current_task()) is not None:
            open_now[task] = writer
        with suppress(ConnectionError, asyncio.IncompleteReadError):
            request = await reader.readuntil(b"\r\n\r\n")
            if length := re.search(rb"content-length: (\d+)", request, re.IGNORECASE):
                request += await reader.readexactly(int(length[1]))
            if raw is None:
                await closing.wait()
            elif isinstance(raw, bytes):
                writer.write(raw)
            else:
                async for piece in raw(request):
                    writer.write(piece)
                    await writer.drain()
        writer.close()

    server = await asyncio.start_server(answer, "127.0.0.1", 0)
    try:
        yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    finally:
        closing.set()
        server.close()
        for writer in open_now.values():
            if not writer.transport.is_closing():
                writer.transport.abort()
        await asyncio.gather(*open_now)


def response(status: str, body: bytes, *headers: str) -> bytes:
    """A whole answer."""
    more = "".join(f"{header}\r\n" for header in headers)
    return f"HTTP/1.1 {status}\r\nContent-Length: {len(body)}\r\n{more}\r\n".encode() + body


async def endless(head: bytes, piece: bytes, pause: float = 0.0) -> AsyncGenerator[bytes]:
    """``head``, then ``piece`` for ever."""
    yield head
    while True:
        yield piece
        await asyncio.sleep(pause)
