"""Time and size limits of the retriever's HTTP connections, which uvicorn lacks: slow heads, large bodies, slow readers."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any

import h11
import uvicorn
from starlette.requests import Request
from uvicorn.protocols.http.h11_impl import H11Protocol

from treegrpo.net.limits import ANSWER_BYTES, ANSWER_SECONDS, HEADER_BYTES, LOOP_BYTES, PEERS, REQUEST_BYTES, REQUEST_SECONDS

SEARCHES = 2
LARGE_REQUESTS = 8
MAX_WAITING = 1024
RefusalCallback = Callable[[str, str, str], None]
"""Called with a client's address, a reason out of few, and a sentence."""

MAX_PIECES = 4096
"""Chunks of a body, or packets of one that has no chunks: each is handled by itself on the event loop."""


@dataclass(frozen=True, slots=True)
class RetrieverLimits:
    """Limits of the retriever for one client, and for all of them together."""

    request_seconds: float = REQUEST_SECONDS
    """From the first byte of a request to its last, and without reading anything of the response."""
    search_seconds: float = ANSWER_SECONDS
    """The longest the search for one request may take."""
    response_seconds: float = ANSWER_SECONDS + REQUEST_SECONDS
    """From the last byte of a request until the client has read its response."""
    response_bytes: int = ANSWER_BYTES
    """The body of a response."""
    connections: int = PEERS
    """Open at once."""
    searches: int = SEARCHES
    """Queries that are searched at once: more threads would only wait for each other."""
    waiting: int = MAX_WAITING
    """Requests that wait for a search; more are rejected."""
    large_requests: int = LARGE_REQUESTS
    """Requests at once with a body or a response beyond LOOP_BYTES."""


class _PieceLimitedConnection(h11.Connection):
    """An h11 connection that rejects a body of too many pieces, such as chunks of one byte."""

    _pieces = 0

    def next_event(self) -> h11.Event | type[h11.NEED_DATA | h11.PAUSED]:
        event = super().next_event()
        self._pieces = self._pieces + 1 if isinstance(event, h11.Data) else 0 if isinstance(event, h11.Request) else self._pieces
        if self._pieces > MAX_PIECES:
            raise h11.RemoteProtocolError("the body comes in too many pieces")
        return event


class LimitedHttpProtocol(H11Protocol):
    """Closes connections that exceed a limit.

    - A request is incomplete `RetrieverLimits.request_seconds` after the connection, or after its first byte.
    - The client reads nothing of a response for as long, or has not read all of it after ``response_seconds``.
    - More than ``connections`` connections are open.

    The server sets ``refused`` and ``limits`` on a subclass.
    """

    refused: RefusalCallback
    limits: RetrieverLimits
    _request_timer: asyncio.TimerHandle | None = None
    _read_timer: asyncio.TimerHandle | None = None
    _response_timer: asyncio.TimerHandle | None = None
    _unread = 0

    def __init__(self, config: uvicorn.Config, *more: Any) -> None:
        super().__init__(config, *more)
        self.conn = _PieceLimitedConnection(h11.SERVER, HEADER_BYTES)

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        if len(self.connections) > self.limits.connections:
            self._abort("peers", "too many connections")
        else:
            self._start_request_timer()

    def data_received(self, data: bytes) -> None:
        self._start_request_timer()
        super().data_received(data)
        if self.conn.their_state not in {h11.IDLE, h11.SEND_BODY}:
            self._cancel_request_timer()
            self._start_response_timer()

    def send_400_response(self, msg: str) -> None:
        self.refused(self._client_address, "http", msg)
        super().send_400_response(msg)

    def on_response_complete(self) -> None:
        super().on_response_complete()
        self._cancel_response_timer()
        if self.conn.trailing_data[0] and self.conn.their_state is h11.IDLE:  # a part of the next request is here already
            self._start_request_timer()

    def pause_writing(self) -> None:
        super().pause_writing()
        self._unread = self.transport.get_write_buffer_size()
        self._read_timer = self.loop.call_later(self.limits.request_seconds, self._check_reading)

    def resume_writing(self) -> None:
        super().resume_writing()
        if self._read_timer is not None:
            self._read_timer.cancel()

    def connection_lost(self, exc: Exception | None) -> None:
        self._cancel_request_timer()
        self._cancel_response_timer()
        if self._read_timer is not None:
            self._read_timer.cancel()
        super().connection_lost(exc)

    @property
    def _client_address(self) -> str:
        return self.client[0] if self.client else "unknown"

    def _start_request_timer(self) -> None:
        if self._request_timer is None:
            self._request_timer = self.loop.call_later(
                self.limits.request_seconds, self._abort, "slow", "the request is incomplete"
            )

    def _cancel_request_timer(self) -> None:
        if self._request_timer is not None:
            self._request_timer.cancel()
            self._request_timer = None

    def _start_response_timer(self) -> None:
        """Limit the time until the client has read the response; the application limits the search itself."""
        if self._response_timer is None:
            seconds = self.limits.response_seconds
            sentence = "the client takes too long to read the response"
            self._response_timer = self.loop.call_later(seconds, self._abort, "slow", sentence)

    def _cancel_response_timer(self) -> None:
        if self._response_timer is not None:
            self._response_timer.cancel()
            self._response_timer = None

    def _check_reading(self) -> None:
        """Abort unless the client has read something since the last check."""
        if (unread := self.transport.get_write_buffer_size()) >= self._unread:
            self._abort("slow", "the client does not read the response")
        else:
            self._unread = unread
            self._read_timer = self.loop.call_later(self.limits.request_seconds, self._check_reading)

    def _abort(self, reason: str, sentence: str) -> None:
        self._request_timer = None
        self.refused(self._client_address, reason, sentence)
        self.transport.abort()


class BodyTooLargeError(Exception):
    """A body of more than REQUEST_BYTES."""


async def read_body(request: Request, before_large: Callable[[], Awaitable[None]]) -> bytes:
    """Read the body of ``request``; ``before_large`` is awaited before more than LOOP_BYTES of it are kept.

    Raises:
        BodyTooLargeError: before it has been read to the end.
    """
    body = bytearray()
    async for part in request.stream():
        body += part
        if len(body) > REQUEST_BYTES:
            raise BodyTooLargeError
        if len(body) > LOOP_BYTES:
            await before_large()
    return bytes(body)
