"""The retriever service: Search-R1's HTTP API over an `Index`.

POST /retrieve  {"queries": [str], "topk": int, "return_scores": bool}; the last two may be null or left out
                → {"result": [[{"document": {"id", "contents"}, "score"}]]}, bare documents without return_scores
GET  /health    → {"status": "ok", "documents": n}
GET  /metrics   → Prometheus text
"""

from __future__ import annotations

import asyncio
import logging
import socket
import ssl
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import uvicorn
from prometheus_client import generate_latest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from services.retriever.http_limits import LimitedHttpProtocol, RetrieverLimits
from services.retriever.index import Index, load_corpus
from services.retriever.search_endpoint import RefusalRecorder, RetrieveEndpoint
from treegrpo.config.schema import RetrieverConfig
from treegrpo.net.address import address_family, check_free, split_address
from treegrpo.net.limits import HEADER_BYTES, PEERS
from treegrpo.observability.metrics import RetrieverMetrics
from treegrpo.observability.rate_limited_log import rate_limit_library_logs
from treegrpo.security.credentials import Credentials, has_token

log = logging.getLogger(__name__)
_BACKLOG = 1024
_IDLE_SECONDS = 30
"""Longer than clients keep an idle connection (httpx: 5): closing one as the next query arrives would fail that query."""
_GRACE_SECONDS = 2


def create_app(
    index: Index,
    metrics: RetrieverMetrics,
    access: Credentials,
    refusals: RefusalRecorder,
    limits: RetrieverLimits | None = None,
) -> Starlette:
    """Create the web application. /health needs no token, each other route its own."""
    metrics.documents.set(len(index.documents))
    metrics.serving.set(1)

    async def health(_: Request) -> Response:
        return JSONResponse({"status": "ok", "documents": len(index.documents)})

    async def scrape(request: Request) -> Response:
        if not has_token(request.headers.get("authorization", ""), access.metrics_token):
            sentence = "Show the token: Authorization: Bearer TOKEN, of security.metrics_token."
            return refusals.refusal_response(request, 401, "token", sentence)
        return Response(generate_latest(metrics.registry), media_type="text/plain; version=0.0.4; charset=utf-8")

    retrieve = RetrieveEndpoint(index, metrics, access, refusals, limits)
    return Starlette(routes=[Route("/retrieve", retrieve, methods=["POST"]), Route("/health", health), Route("/metrics", scrape)])


async def serve_retriever(
    config: RetrieverConfig,
    access: Credentials,
    ready: Callable[[int], None] = lambda _: None,
    limits: RetrieverLimits | None = None,
) -> None:
    """Load the corpus, listen, and answer queries until cancelled.

    Args:
        config: the corpus and the address; port 0 takes a free one.
        access: certificate and tokens.
        ready: called once with the port when queries are answered.
        limits: of requests and connections; None: the defaults.

    Raises:
        ConfigError: other machines could reach it in plain text.
        DataError: the corpus cannot be used.
        AddressInUseError: another process listens there.
    """
    limits = limits or RetrieverLimits()
    access.check_metrics("retriever.listen", config.listen)
    host, port = split_address(config.listen, "retriever.listen")
    check_free(config.listen, "retriever.listen")
    index = Index(load_corpus(config.corpus))
    listener = socket.create_server((host, port), family=address_family(host), backlog=_BACKLOG)
    rate_limit_library_logs("uvicorn", "asyncio")
    metrics = RetrieverMetrics()
    refusals = RefusalRecorder(metrics)
    protocol = type("Protocol", (LimitedHttpProtocol,), {"refused": staticmethod(refusals.record_refusal), "limits": limits})
    web = create_app(index, metrics, access, refusals, limits)
    server = _RetrieverServer(web, protocol, access.server_context(), lambda: ready(listener.getsockname()[1]))
    serving = asyncio.create_task(server.serve(sockets=[listener]), name="retriever")
    try:
        await asyncio.shield(serving)
    finally:
        server.should_exit = True
        await serving


class _RetrieverServer(uvicorn.Server):
    """A uvicorn server that leaves signals to the process, limits the TLS handshake, and reports when it listens."""

    def __init__(
        self,
        application: Starlette,
        protocol: type[LimitedHttpProtocol],
        context: ssl.SSLContext | None,
        ready: Callable[[], None],
    ) -> None:
        super().__init__(
            uvicorn.Config(
                application,
                http=protocol,
                ws="none",
                log_config=None,
                log_level="warning",
                access_log=False,
                lifespan="off",
                limit_concurrency=PEERS,
                h11_max_incomplete_event_size=HEADER_BYTES,
                timeout_keep_alive=_IDLE_SECONDS,
                timeout_graceful_shutdown=_GRACE_SECONDS,
            )
        )
        self._protocol = protocol
        self._context = context
        self._ready = ready

    def capture_signals(self) -> AbstractContextManager[None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        return nullcontext()

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """As uvicorn's for one socket, with a limit for the TLS handshake: uvicorn's waits a minute."""
        assert sockets is not None  # noqa: S101 - `serve` gives one
        handshake_seconds = self._protocol.limits.request_seconds if self._context is not None else None
        self.servers = [
            await asyncio.get_running_loop().create_server(
                lambda: self._protocol(self.config, self.server_state, {}),
                sock=sockets[0],
                backlog=_BACKLOG,
                ssl=self._context,
                ssl_handshake_timeout=handshake_seconds,
                ssl_shutdown_timeout=handshake_seconds,
            )
        ]
        self.started = True
        self._ready()
