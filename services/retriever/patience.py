"""How long and how much the retriever listens to one request: uvicorn has no limit for a slow head or a large body."""

from __future__ import annotations

import asyncio
from typing import Any

import h11
from starlette.requests import Request
from uvicorn.protocols.http.h11_impl import H11Protocol

from treegrpo.limits import REQUEST_BYTES, REQUEST_SECONDS


class PatientProtocol(H11Protocol):
    """Hangs up on a request that is not complete after REQUEST_SECONDS, from the connection or its first byte on."""

    _patience: asyncio.TimerHandle | None = None

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self._wait()

    def data_received(self, data: bytes) -> None:
        self._wait()
        super().data_received(data)
        if self.conn.their_state not in {h11.IDLE, h11.SEND_BODY}:
            self._stop()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        if self.conn.trailing_data[0] and self.conn.their_state is h11.IDLE:  # a part of the next request is here already
            self._wait()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop()
        super().connection_lost(exc)

    def _wait(self) -> None:
        if self._patience is None:
            self._patience = self.loop.call_later(REQUEST_SECONDS, self._give_up)

    def _stop(self) -> None:
        if self._patience is not None:
            self._patience.cancel()
            self._patience = None

    def _give_up(self) -> None:
        self._patience = None
        self.transport.abort()


class TooLargeError(Exception):
    """A body of more than REQUEST_BYTES."""


async def body_of(request: Request) -> bytes:
    """The body of ``request``. Raises TooLargeError before it has been read to the end."""
    body = bytearray()
    async for part in request.stream():
        body += part
        if len(body) > REQUEST_BYTES:
            raise TooLargeError
    return bytes(body)
