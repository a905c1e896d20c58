"""How long and how much the retriever listens to one client: uvicorn has no limit for slow heads, large bodies, deaf readers."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import h11
import uvicorn
from starlette.requests import Request
from uvicorn.protocols.http.h11_impl import H11Protocol

from treegrpo.net.limits import ANSWER_SECONDS, HEADER_BYTES, LOOP_BYTES, PEERS, REQUEST_BYTES, REQUEST_SECONDS

Refused = Callable[[str, str, str], None]
"""Told a client's address, a reason of few, and a sentence."""


PIECES = 4096
"""Chunks of a body, or packets of one that has no chunks: each is handled by itself, on the event loop."""


class _Connection(h11.Connection):
    """h11's, which takes a body of chunks of a byte for a request that is wrong."""

    _pieces = 0

    def next_event(self) -> h11.Event | type[h11.NEED_DATA | h11.PAUSED]:
        event = super().next_event()
        self._pieces = self._pieces + 1 if isinstance(event, h11.Data) else 0 if isinstance(event, h11.Request) else self._pieces
        if self._pieces > PIECES:
            raise h11.RemoteProtocolError("the body comes in too many pieces")
        return event


class PatientProtocol(H11Protocol):
    """Hangs up on a request that is not complete after REQUEST_SECONDS, from the connection or its first byte on, on who reads
    nothing of an answer for as long or takes ANSWER_SECONDS more for all of it, and on one connection too many.
    """

    refused: Refused
    _patience: asyncio.TimerHandle | None = None
    _reading: asyncio.TimerHandle | None = None
    _answering: asyncio.TimerHandle | None = None
    _unread = 0

    def __init__(self, config: uvicorn.Config, *more: Any) -> None:
        super().__init__(config, *more)
        self.conn = _Connection(h11.SERVER, HEADER_BYTES)

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        if len(self.connections) > PEERS:
            self._give_up("peers", "one connection too many")
        else:
            self._wait()

    def data_received(self, data: bytes) -> None:
        self._wait()
        super().data_received(data)
        if self.conn.their_state not in {h11.IDLE, h11.SEND_BODY}:
            self._stop()
            self._expect()

    def send_400_response(self, msg: str) -> None:
        self.refused(self._who, "http", msg)
        super().send_400_response(msg)

    def on_response_complete(self) -> None:
        super().on_response_complete()
        self._expect_no_more()
        if self.conn.trailing_data[0] and self.conn.their_state is h11.IDLE:  # a part of the next request is here already
            self._wait()

    def pause_writing(self) -> None:
        super().pause_writing()
        self._unread = self.transport.get_write_buffer_size()
        self._reading = self.loop.call_later(REQUEST_SECONDS, self._look)

    def resume_writing(self) -> None:
        super().resume_writing()
        if self._reading is not None:
            self._reading.cancel()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop()
        self._expect_no_more()
        if self._reading is not None:
            self._reading.cancel()
        super().connection_lost(exc)

    @property
    def _who(self) -> str:
        return self.client[0] if self.client else "nobody"

    def _wait(self) -> None:
        if self._patience is None:
            self._patience = self.loop.call_later(REQUEST_SECONDS, self._give_up, "slow", "half a request and no more")

    def _stop(self) -> None:
        if self._patience is not None:
            self._patience.cancel()
            self._patience = None

    def _expect(self) -> None:
        """The application has its own limit for the search; this is for who takes too long to read what it found."""
        if self._answering is None:
            seconds = ANSWER_SECONDS + REQUEST_SECONDS
            self._answering = self.loop.call_later(seconds, self._give_up, "slow", "it takes too long to read its answer")

    def _expect_no_more(self) -> None:
        if self._answering is not None:
            self._answering.cancel()
            self._answering = None

    def _look(self) -> None:
        """Whether anything was read since it was looked at last."""
        if (unread := self.transport.get_write_buffer_size()) >= self._unread:
            self._give_up("slow", "it does not read its answer")
        else:
            self._unread = unread
            self._reading = self.loop.call_later(REQUEST_SECONDS, self._look)

    def _give_up(self, reason: str, sentence: str) -> None:
        self._patience = None
        self.refused(self._who, reason, sentence)
        self.transport.abort()


class TooLargeError(Exception):
    """A body of more than REQUEST_BYTES."""


async def body_of(request: Request, large: Callable[[], Awaitable[None]]) -> bytes:
    """The body of ``request``; ``large`` is awaited before more than LOOP_BYTES of it are kept.

    Raises:
        TooLargeError: before it has been read to the end.
    """
    body = bytearray()
    async for part in request.stream():
        body += part
        if len(body) > REQUEST_BYTES:
            raise TooLargeError
        if len(body) > LOOP_BYTES:
            await large()
    return bytes(body)
