"""POST /retrieve: the search of many clients, of which no one request costs the others more than its turn.

    head ─► token ─► body ─► queries ─► one query after the other, in turn with other requests ─► answer, slice by slice
                      └ large: one of LARGE_REQUESTS places ┘└ in a thread, SEARCHES at once ┘        └ large: a place too

| bound | of one request | of all together |
|---|---|---|
| time | REQUEST_SECONDS to its last byte, ANSWER_SECONDS from there | |
| work | QUERIES queries of QUERY_WORDS words | SEARCHES threads; WAITING requests wait for a turn |
| memory | REQUEST_BYTES in, ANSWER_BYTES out | LARGE_REQUESTS of these; PEERS of LOOP_BYTES each |
"""

from __future__ import annotations

import asyncio
import json
import logging
from contextlib import AsyncExitStack
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, FailFast, Field, ValidationError
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.types import Receive, Scope, Send

from services.retriever.http_limits import TooLargeError, body_of
from services.retriever.index import Hit, Index
from treegrpo.net.limits import ANSWER_BYTES, ANSWER_SECONDS, LOOP_BYTES, REQUEST_BYTES, TOPK
from treegrpo.observability.metrics import RetrieverMetrics
from treegrpo.observability.rate_limited_log import RateLimitedLog
from treegrpo.security.credentials import Credentials, has_token
from treegrpo.wire.size_limits import TEXT_LENGTH

log = logging.getLogger(__name__)
DEFAULT_TOPK = 3
QUERIES = 1024
"""Of one request."""
SEARCHES = 2
"""Queries that are searched for at once: more threads would only take turns."""
LARGE_REQUESTS = 8
"""Requests at once with a body or an answer beyond LOOP_BYTES."""
WAITING = 1024
"""Requests that wait for their turn; more are sent away."""
SLICE = 64 << 10


class Ask(BaseModel):
    """The body of a request. What is null, or a ``topk`` of 0, counts as left out, as for Search-R1's server."""

    model_config = ConfigDict(strict=True)

    queries: Annotated[list[Annotated[str, Field(max_length=TEXT_LENGTH)]], FailFast()] = Field(min_length=1, max_length=QUERIES)
    topk: Annotated[int, Field(ge=0, le=TOPK)] | None = None
    return_scores: bool | None = None


class RefusedError(Exception):
    """A request that gets no documents: status, a reason of few, and a sentence."""

    def __init__(self, status: int, reason: str, sentence: str) -> None:
        super().__init__(status, reason, sentence)
        self.status, self.reason, self.sentence = status, reason, sentence


class Book:
    """Counts what is refused, and logs it once for each client and reason."""

    def __init__(self, metrics: RetrieverMetrics) -> None:
        self._metrics = metrics
        self._refusals = RateLimitedLog(log)

    def refused(self, client: str, reason: str, sentence: str) -> None:
        self._metrics.refused.labels(reason).inc()
        self._refusals.log_refusal(client, reason, sentence)

    def answer(self, request: Request, status: int, reason: str, sentence: str) -> Response:
        self.refused(request.client.host if request.client else "nobody", reason, sentence)
        return JSONResponse({"error": sentence}, status_code=status)


class Retrieve:
    """The endpoint, as an ASGI application."""

    def __init__(self, index: Index, metrics: RetrieverMetrics, access: Credentials, book: Book) -> None:
        self._index = index
        self._metrics = metrics
        self._access = access
        self._book = book
        self._large = asyncio.Semaphore(LARGE_REQUESTS)
        self._turns = asyncio.Semaphore(SEARCHES)
        self._waiting = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        request = Request(scope, receive)
        async with AsyncExitStack() as stack:
            try:
                with self._metrics.seconds.time():
                    pieces = await self._pieces(request, _Place(self._large, stack))
            except ClientDisconnect:  # nobody hears the answer
                return
            except RefusedError as refused:
                response = self._book.answer(request, refused.status, refused.reason, refused.sentence)
                await response(scope, receive, send)
            else:
                await send_answer(pieces, send)

    async def _pieces(self, request: Request, place: _Place) -> list[bytes]:
        """The answer in JSON. Raises RefusedError and ClientDisconnect."""
        ask = await self._asked(request, place)
        if self._waiting >= WAITING:
            raise RefusedError(503, "busy", f"{WAITING} requests wait already; ask again in a moment.")
        self._waiting += 1
        try:
            async with asyncio.timeout(ANSWER_SECONDS):
                return await self._found(ask, place)
        except TimeoutError as error:
            sentence = f"The search takes longer than {ANSWER_SECONDS:.0f} s; send fewer queries at once."
            raise RefusedError(503, "busy", sentence) from error
        finally:
            self._waiting -= 1

    async def _asked(self, request: Request, place: _Place) -> Ask:
        """The body, read to its end. Raises RefusedError and ClientDisconnect."""
        if not has_token(request.headers.get("authorization", ""), self._access.retriever_token):
            sentence = "Show the token: Authorization: Bearer TOKEN; samplers take it from security.retriever_token."
            raise RefusedError(401, "token", sentence)
        try:
            body = await body_of(request, place.take)
        except TooLargeError as error:
            sentence = f"The body has more than {REQUEST_BYTES} bytes; send fewer queries at once."
            raise RefusedError(413, "large", sentence) from error
        try:
            if len(body) > LOOP_BYTES:
                return await asyncio.to_thread(Ask.model_validate_json, body)
            return Ask.model_validate_json(body)
        except ValidationError as error:
            raise RefusedError(400, "request", _sentence(error)) from error

    async def _found(self, ask: Ask, place: _Place) -> list[bytes]:
        """The answer in JSON, a piece for each query. Raises RefusedError when it grows too large."""
        pieces, size = [b'{"result":['], 0
        for number, query in enumerate(ask.queries):
            async with self._turns:
                piece = await asyncio.to_thread(self._search, query, ask.topk or DEFAULT_TOPK, bool(ask.return_scores))
            pieces += [b"," * bool(number), piece]
            size += len(piece)
            if size > ANSWER_BYTES:
                raise RefusedError(
                    413, "large", f"The answer would have more than {ANSWER_BYTES} bytes; ask for fewer documents."
                )
            if size > LOOP_BYTES:
                await place.take()
        self._metrics.queries.inc(len(ask.queries))
        return [*pieces, b"]}"]

    def _search(self, query: str, topk: int, with_scores: bool) -> bytes:
        return json.dumps([_shown(hit, with_scores) for hit in self._index.search(query, topk)], separators=(",", ":")).encode()


class _Place:
    """One of the places for large requests, taken at most once and left when the request is over."""

    def __init__(self, places: asyncio.Semaphore, stack: AsyncExitStack) -> None:
        self._places = places
        self._stack = stack
        self._taken = False

    async def take(self) -> None:
        if not self._taken:
            self._taken = True
            await self._stack.enter_async_context(self._places)


async def send_answer(pieces: list[bytes], send: Send) -> None:
    """Send an answer slice by slice: the transport holds one at most for a client that reads slowly."""
    length = str(sum(map(len, pieces))).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", length)]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    whole = memoryview(b"".join(pieces))
    for start in range(0, len(whole), SLICE):
        await send({"type": "http.response.body", "body": bytes(whole[start : start + SLICE]), "more_body": True})
    await send({"type": "http.response.body", "body": b""})


def _shown(hit: Hit, with_score: bool) -> dict[str, Any]:
    document = hit.document.model_dump()
    return {"document": document, "score": hit.score} if with_score else document


def _sentence(error: ValidationError) -> str:
    first = error.errors(include_url=False, include_context=False, include_input=False)[0]
    key = ".".join(str(part) for part in first["loc"]) or "the body"
    return (
        f'{key}: {first["msg"]}; send {{"queries": [str], "topk": int up to {TOPK}, "return_scores": bool}} '
        f"with 1 to {QUERIES} queries of {TEXT_LENGTH} letters at most."
    )
