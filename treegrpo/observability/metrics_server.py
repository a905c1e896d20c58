"""HTTP server for /metrics and /health, in a thread of its own; one response a connection.

A request must be complete REQUEST_SECONDS after the connection, TLS included, within HEADER_BYTES, and have the token if
one is configured; /health needs none. Connections beyond SCRAPERS are closed.
"""

from __future__ import annotations

import asyncio
import logging
import socket
import ssl
import threading
from collections.abc import Callable
from dataclasses import dataclass
from http import HTTPStatus
from typing import Any

from pydantic import SecretStr

from treegrpo.net.limits import HEADER_BYTES, REQUEST_SECONDS, SCRAPERS
from treegrpo.security.credentials import has_token

log = logging.getLogger(__name__)
CONTENT = "text/plain; version=0.0.4; charset=utf-8"
END = b"\r\n\r\n"


@dataclass(frozen=True, slots=True)
class ScrapeLimits:
    """Limits of the clients of /metrics."""

    seconds: float = REQUEST_SECONDS
    """From the connection to the last byte of the request, and again to read the response."""
    connections: int = SCRAPERS
    """At once."""


LIMITS = ScrapeLimits()


def start_metrics_server(
    listener: socket.socket,
    page: Callable[[], bytes],
    serving: Callable[[], bool],
    context: ssl.SSLContext | None,
    token: SecretStr,
    refused: Callable[[str], None],
    limits: ScrapeLimits = LIMITS,
) -> threading.Thread:
    """Serve ``page()`` as /metrics, and ``serving()`` as /health, at ``listener`` until the process ends.

    ``refused`` is called with the reason of each refused request; there are few reasons.
    """
    server = _MetricsServer(page, serving, token, refused, limits)
    thread = threading.Thread(target=asyncio.run, args=(server.serve_forever(listener, context),), name="metrics", daemon=True)
    thread.start()
    return thread


class _MetricsServer:
    def __init__(
        self,
        page: Callable[[], bytes],
        serving: Callable[[], bool],
        token: SecretStr,
        refused: Callable[[str], None],
        limits: ScrapeLimits,
    ) -> None:
        self._page = page
        self._serving = serving
        self._token = token
        self._refused = refused
        self._limits = limits
        self._open = 0

    async def serve_forever(self, listener: socket.socket, context: ssl.SSLContext | None) -> None:
        handshake_seconds = None if context is None else self._limits.seconds
        server = await asyncio.start_server(
            self._connected,
            sock=listener,
            ssl=context,
            limit=HEADER_BYTES,
            ssl_handshake_timeout=handshake_seconds,
            ssl_shutdown_timeout=handshake_seconds,
        )
        asyncio.get_running_loop().set_exception_handler(_ignore_failed_handshake)
        await server.serve_forever()

    async def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._open += 1
        try:
            if self._open <= self._limits.connections:
                async with asyncio.timeout(self._limits.seconds):
                    writer.write(self._answer(await reader.readuntil(END)))
                    await writer.drain()
            else:
                self._refused("peers")
        except TimeoutError:
            self._refused("slow")
            writer.transport.abort()  # what it does not read would wait for ever
        except (asyncio.LimitOverrunError, ValueError):
            self._refused("large")
        except (asyncio.IncompleteReadError, OSError):
            pass  # gone
        finally:
            self._open -= 1
            writer.close()

    def _answer(self, request: bytes) -> bytes:
        first, *rest = request.decode(errors="replace").split("\r\n")
        headers = {name.strip().lower(): value.strip() for name, _, value in (line.partition(":") for line in rest)}
        method, target, *_ = (*first.split(" "), "", "")
        path = target.partition("?")[0]
        if (method, path) == ("GET", "/health"):
            return (
                _response(HTTPStatus.OK, b"ok\n") if self._serving() else _response(HTTPStatus.SERVICE_UNAVAILABLE, b"not yet\n")
            )
        if not has_token(headers.get("authorization", ""), self._token):
            self._refused("token")
            return _response(
                HTTPStatus.UNAUTHORIZED, b"Show the token: Authorization: Bearer TOKEN\n", "WWW-Authenticate: Bearer\r\n"
            )
        if (method, path) != ("GET", "/metrics"):
            return _response(HTTPStatus.NOT_FOUND, b"There are GET /metrics and GET /health.\n")
        try:
            return _response(HTTPStatus.OK, self._page())
        except Exception:  # the edge: a metric that cannot be rendered does not end the process
            log.exception("the response to GET %s cannot be rendered", "/metrics")
            return _response(HTTPStatus.INTERNAL_SERVER_ERROR, b"A metric cannot be rendered; see the log of this process.\n")


def _ignore_failed_handshake(loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
    """Asyncio's exception handler: ignores failed handshakes, logs everything else."""
    if not isinstance(context.get("exception"), OSError):
        loop.default_exception_handler(context)


def _response(status: HTTPStatus, body: bytes, more: str = "") -> bytes:
    head = f"HTTP/1.1 {status.value} {status.phrase}\r\nContent-Type: {CONTENT}\r\nContent-Length: {len(body)}\r\n"
    return f"{head}{more}Connection: close\r\n\r\n".encode() + body
