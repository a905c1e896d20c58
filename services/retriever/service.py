"""The retriever as a service: Search-R1's HTTP API over an `Index`.

POST /retrieve  {"queries": [str], "topk": int, "return_scores": bool}
                → {"result": [[{"document": {"id", "contents"}, "score"}]]}, bare documents without return_scores
GET  /health    → {"status": "ok", "documents": n}
GET  /metrics   → Prometheus text
"""

from __future__ import annotations

import asyncio
import socket
import ssl
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import uvicorn
from prometheus_client import generate_latest
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from starlette.applications import Starlette
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from services.retriever.index import Hit, Index, load_corpus
from services.retriever.patience import PatientProtocol, TooLargeError, body_of
from treegrpo.access import Access, shows
from treegrpo.config import RetrieverConfig
from treegrpo.limits import HEADER_BYTES, PEERS, REQUEST_BYTES
from treegrpo.telemetry import RetrieverMetrics, check_free, split_address

_DEFAULT_TOPK = 3
_BACKLOG = 1024
_IDLE_SECONDS = 30
"""Longer than clients keep an idle connection (httpx: 5): one that closes as the next query comes would fail it."""
_GRACE_SECONDS = 2


class Ask(BaseModel):
    """The body of a request."""

    model_config = ConfigDict(strict=True)

    queries: list[str] = Field(min_length=1, max_length=1024)
    topk: int = Field(default=_DEFAULT_TOPK, ge=1, le=100)
    return_scores: bool = False


def app(index: Index, metrics: RetrieverMetrics, access: Access) -> Starlette:
    """The web application; starts nothing. /health is for everybody, the rest for who shows its token."""
    metrics.documents.set(len(index.documents))
    metrics.serving.set(1)

    def refused(status: int, sentence: str) -> Response:
        metrics.refused.inc()
        return JSONResponse({"error": sentence}, status_code=status)

    async def retrieve(request: Request) -> Response:
        if not shows(request.headers.get("authorization", ""), access.retriever_token):
            return refused(401, "Show the token: Authorization: Bearer TOKEN; samplers take it from security.retriever_token.")
        with metrics.seconds.time():
            try:
                ask = Ask.model_validate_json(await body_of(request))
            except ValidationError as error:
                return refused(400, _sentence(error))
            except ClientDisconnect:  # nobody hears the answer
                return Response(status_code=400)
            except TooLargeError:
                return refused(413, f"The body has more than {REQUEST_BYTES} bytes; send fewer queries at once.")
            found = [index.search(query, ask.topk) for query in ask.queries]
            metrics.queries.inc(len(found))
            return JSONResponse({"result": [[_shown(hit, ask.return_scores) for hit in hits] for hits in found]})

    async def health(_: Request) -> Response:
        return JSONResponse({"status": "ok", "documents": len(index.documents)})

    async def scrape(request: Request) -> Response:
        if not shows(request.headers.get("authorization", ""), access.metrics_token):
            return refused(401, "Show the token: Authorization: Bearer TOKEN, of security.metrics_token.")
        return Response(generate_latest(metrics.registry), media_type="text/plain; version=0.0.4; charset=utf-8")

    return Starlette(routes=[Route("/retrieve", retrieve, methods=["POST"]), Route("/health", health), Route("/metrics", scrape)])


def _shown(hit: Hit, with_score: bool) -> dict[str, Any]:
    document = hit.document.model_dump()
    return {"document": document, "score": hit.score} if with_score else document


def _sentence(error: ValidationError) -> str:
    first = error.errors()[0]
    key = ".".join(str(part) for part in first["loc"]) or "the body"
    return (
        f'{key}: {first["msg"]}; send {{"queries": [str], "topk": int from 1 to 100, "return_scores": bool}} '
        "with 1 to 1024 queries."
    )


async def serve(config: RetrieverConfig, access: Access, ready: Callable[[int], None] = lambda _: None) -> None:
    """Load the corpus, listen, and answer until cancelled.

    Args:
        config: the corpus and the address; port 0 takes a free one.
        access: certificate and tokens.
        ready: called once with the port when queries are answered.

    Raises:
        ConfigError: others could reach it in plain text.
        DataError: the corpus cannot be used.
        AddressInUseError: somebody else listens there.
    """
    access.check_metrics("retriever.listen", config.listen)
    host, port = split_address(config.listen, "retriever.listen")
    check_free(config.listen, "retriever.listen")
    index = Index(load_corpus(config.corpus))
    listener = socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET, backlog=_BACKLOG)
    server = _Server(app(index, RetrieverMetrics(), access), access.server_context(), lambda: ready(listener.getsockname()[1]))
    serving = asyncio.create_task(server.serve(sockets=[listener]), name="retriever")
    try:
        await asyncio.shield(serving)
    finally:
        server.should_exit = True
        await serving


class _Server(uvicorn.Server):
    """Uvicorn that leaves the signals to the process, and tells when it listens."""

    def __init__(self, application: Starlette, context: ssl.SSLContext | None, ready: Callable[[], None]) -> None:
        super().__init__(
            uvicorn.Config(
                application,
                http=PatientProtocol,
                log_level="warning",
                access_log=False,
                lifespan="off",
                limit_concurrency=PEERS,
                h11_max_incomplete_event_size=HEADER_BYTES,
                ssl_context_factory=None if context is None else lambda _config, _default: context,
                timeout_keep_alive=_IDLE_SECONDS,
                timeout_graceful_shutdown=_GRACE_SECONDS,
            )
        )
        self._ready = ready

    def capture_signals(self) -> AbstractContextManager[None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        return nullcontext()

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self._ready()
