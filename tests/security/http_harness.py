"""The retriever and /metrics on loopback, with HTTP clients and raw sockets to them."""

from __future__ import annotations

import asyncio
import json
import ssl
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager, suppress
from pathlib import Path

import httpx

from services.retriever.http_limits import RetrieverLimits
from services.retriever.service import serve_retriever
from treegrpo.config.schema import RetrieverConfig
from treegrpo.config.security import Role
from treegrpo.observability import metrics as served
from treegrpo.observability.metrics import RetrieverMetrics
from treegrpo.observability.metrics_server import LIMITS, ScrapeLimits
from treegrpo.security.credentials import Credentials

SECONDS = 10.0


@asynccontextmanager
async def retriever(
    tmp_path: Path,
    who: Credentials,
    contents: str = "Kabul\nKabul is large.",
    limits: RetrieverLimits | None = None,
) -> AsyncGenerator[str]:
    """The service; yields HOST:PORT."""
    path = tmp_path / "corpus.jsonl"
    path.write_text(json.dumps({"id": "0", "contents": contents}) + "\n")
    port: asyncio.Future[int] = asyncio.get_running_loop().create_future()
    config = RetrieverConfig(corpus=path, listen="127.0.0.1:0")
    service = asyncio.create_task(serve_retriever(config, who, port.set_result, limits))
    await asyncio.wait([port, service], return_when=asyncio.FIRST_COMPLETED, timeout=SECONDS)
    try:
        yield f"127.0.0.1:{port.result()}"
    finally:
        service.cancel()
        with suppress(asyncio.CancelledError):
            await service


def metrics(who: Credentials, limits: ScrapeLimits = LIMITS) -> str:
    """Served until the tests end; HOST:PORT."""
    return f"127.0.0.1:{served.serve_metrics(RetrieverMetrics(), '127.0.0.1:0', 'retriever.listen', who, limits)}"


def client(who: Credentials, token: dict[str, str] | None = None, server: Role = Role.RETRIEVER) -> httpx.AsyncClient:
    return httpx.AsyncClient(timeout=SECONDS, verify=who.web_context(server), headers=token)


async def said_to(address: str, request: bytes, context: ssl.SSLContext | None = None) -> bytes:
    """All that a server answers to ``request`` until it hangs up, which it has to do by itself."""
    host, _, port = address.rpartition(":")
    reader, writer = await asyncio.open_connection(host, int(port), ssl=context)
    writer.write(request)
    try:
        async with asyncio.timeout(SECONDS):
            return await reader.read()
    except ConnectionError:
        return b""
    finally:
        writer.close()
