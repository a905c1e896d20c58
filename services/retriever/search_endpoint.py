"""POST /retrieve: searches for many clients; one request delays the others by one query at a time.

    head ─► token ─► body ─► queries ─► one query after the other, in turn with other requests ─► response, slice by slice
                      └ large: one of LARGE_REQUESTS slots  ┘└ in a thread, SEARCHES at once ┘          └ large: a slot too

| bound | of one request | of all together |
|---|---|---|
| time | REQUEST_SECONDS to its last byte, ANSWER_SECONDS from there | |
| work | QUERIES queries of QUERY_WORDS words | SEARCHES threads; MAX_WAITING requests wait for one |
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

from services.retriever.http_limits import BodyTooLargeError, RetrieverLimits, read_body
from services.retriever.index import Hit, Index
from treegrpo.net.limits import LOOP_BYTES, REQUEST_BYTES, TOPK
from treegrpo.observability.metrics import RetrieverMetrics
from treegrpo.observability.rate_limited_log import RateLimitedLog
from treegrpo.security.credentials import Credentials, has_token
from treegrpo.wire.size_limits import TEXT_LENGTH

log = logging.getLogger(__name__)
DEFAULT_TOPK = 3
QUERIES = 1024
"""Of one request."""
SLICE = 64 << 10


class RetrieveRequest(BaseModel):
    """The body of a request. Null, or a ``topk`` of 0, counts as missing, as in Search-R1's server."""

    model_config = ConfigDict(strict=True)

    queries: Annotated[list[Annotated[str, Field(max_length=TEXT_LENGTH)]], FailFast()] = Field(min_length=1, max_length=QUERIES)
    topk: Annotated[int, Field(ge=0, le=TOPK)] | None = None
    return_scores: bool | None = None


class RequestRefusedError(Exception):
    """A request that is refused: status, a reason out of few, and a sentence."""

    def __init__(self, status: int, reason: str, sentence: str) -> None:
        super().__init__(status, reason, sentence)
        self.status, self.reason, self.sentence = status, reason, sentence


class RefusalRecorder:
    """Counts refused requests, and logs them once for each client and reason."""

    def __init__(self, metrics: RetrieverMetrics) -> None:
        self._metrics = metrics
        self._refusals = RateLimitedLog(log)

    def record_refusal(self, client: str, reason: str, sentence: str) -> None:
        """Count and log a refusal."""
        self._metrics.refused.labels(reason).inc()
        self._refusals.log_refusal(client, reason, sentence)

    def refusal_response(self, request: Request, status: int, reason: str, sentence: str) -> Response:
        """Record a refusal and return its response."""
        self.record_refusal(request.client.host if request.client else "unknown", reason, sentence)
        return JSONResponse({"error": sentence}, status_code=status)


class RetrieveEndpoint:
    """The search endpoint as an ASGI application."""

    def __init__(
        self,
        index: Index,
        metrics: RetrieverMetrics,
        access: Credentials,
        refusals: RefusalRecorder,
        limits: RetrieverLimits | None = None,
    ) -> None:
        self._index = index
        self._metrics = metrics
        self._access = access
        self._refusals = refusals
        self._limits = limits or RetrieverLimits()
        self._large_slots = asyncio.Semaphore(self._limits.large_requests)
        self._search_slots = asyncio.Semaphore(self._limits.searches)
        self._waiting = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        request = Request(scope, receive)
        async with AsyncExitStack() as stack:
            try:
                with self._metrics.seconds.time():
                    pieces = await self._respond(request, _LargeRequestSlot(self._large_slots, stack))
            except ClientDisconnect:  # the client has disconnected
                return
            except RequestRefusedError as refused:
                response = self._refusals.refusal_response(request, refused.status, refused.reason, refused.sentence)
                await response(scope, receive, send)
            else:
                await send_response(pieces, send)

    async def _respond(self, request: Request, slot: _LargeRequestSlot) -> list[bytes]:
        """Search all queries of a request; the response in JSON. Raises RequestRefusedError and ClientDisconnect."""
        query_request = await self._parse_request(request, slot)
        if self._waiting >= self._limits.waiting:
            raise RequestRefusedError(503, "busy", f"{self._limits.waiting} requests wait already; ask again in a moment.")
        self._waiting += 1
        try:
            async with asyncio.timeout(self._limits.search_seconds):
                return await self._run_queries(query_request, slot)
        except TimeoutError as error:
            sentence = f"The search takes longer than {self._limits.search_seconds:.0f} s; send fewer queries at once."
            raise RequestRefusedError(503, "busy", sentence) from error
        finally:
            self._waiting -= 1

    async def _parse_request(self, request: Request, slot: _LargeRequestSlot) -> RetrieveRequest:
        """Read and validate the body. Raises RequestRefusedError and ClientDisconnect."""
        if not has_token(request.headers.get("authorization", ""), self._access.retriever_token):
            sentence = "Show the token: Authorization: Bearer TOKEN; samplers take it from security.retriever_token."
            raise RequestRefusedError(401, "token", sentence)
        try:
            body = await read_body(request, slot.acquire_slot)
        except BodyTooLargeError as error:
            sentence = f"The body has more than {REQUEST_BYTES} bytes; send fewer queries at once."
            raise RequestRefusedError(413, "large", sentence) from error
        try:
            if len(body) > LOOP_BYTES:
                return await asyncio.to_thread(RetrieveRequest.model_validate_json, body)
            return RetrieveRequest.model_validate_json(body)
        except ValidationError as error:
            raise RequestRefusedError(400, "request", _validation_sentence(error)) from error

    async def _run_queries(self, request: RetrieveRequest, slot: _LargeRequestSlot) -> list[bytes]:
        """The response in JSON, a piece for each query. Raises RequestRefusedError when it grows too large."""
        pieces, size = [b'{"result":['], 0
        for number, query in enumerate(request.queries):
            async with self._search_slots:
                piece = await asyncio.to_thread(self._search, query, request.topk or DEFAULT_TOPK, bool(request.return_scores))
            pieces += [b"," * bool(number), piece]
            size += len(piece)
            if size > self._limits.response_bytes:
                raise RequestRefusedError(
                    413, "large", f"The answer would have more than {self._limits.response_bytes} bytes; ask for fewer documents."
                )
            if size > LOOP_BYTES:
                await slot.acquire_slot()
        self._metrics.queries.inc(len(request.queries))
        return [*pieces, b"]}"]

    def _search(self, query: str, topk: int, with_scores: bool) -> bytes:
        return json.dumps(
            [_hit_fields(hit, with_scores) for hit in self._index.search(query, topk)], separators=(",", ":")
        ).encode()


class _LargeRequestSlot:
    """A slot for a large request, acquired at most once and released when the request is over."""

    def __init__(self, slots: asyncio.Semaphore, stack: AsyncExitStack) -> None:
        self._slots = slots
        self._stack = stack
        self._acquired = False

    async def acquire_slot(self) -> None:
        if not self._acquired:
            self._acquired = True
            await self._stack.enter_async_context(self._slots)


async def send_response(pieces: list[bytes], send: Send) -> None:
    """Send a response slice by slice: the transport buffers one at most for a client that reads slowly."""
    length = str(sum(map(len, pieces))).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", length)]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    whole = memoryview(b"".join(pieces))
    for start in range(0, len(whole), SLICE):
        await send({"type": "http.response.body", "body": bytes(whole[start : start + SLICE]), "more_body": True})
    await send({"type": "http.response.body", "body": b""})


def _hit_fields(hit: Hit, with_score: bool) -> dict[str, Any]:
    document = hit.document.model_dump()
    return {"document": document, "score": hit.score} if with_score else document


def _validation_sentence(error: ValidationError) -> str:
    first = error.errors(include_url=False, include_context=False, include_input=False)[0]
    key = ".".join(str(part) for part in first["loc"]) or "the body"
    return (
        f'{key}: {first["msg"]}; send {{"queries": [str], "topk": int up to {TOPK}, "return_scores": bool}} '
        f"with 1 to {QUERIES} queries of {TEXT_LENGTH} letters at most."
    )
