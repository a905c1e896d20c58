"""The retriever and /metrics: TLS, tokens, and no patience with slow or large requests. Raw sockets on loopback."""

from __future__ import annotations

import asyncio
import json
import ssl
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager, suppress
from dataclasses import replace
from pathlib import Path

import httpx
import pytest

from services.cli.ready import retriever_ready
from services.environments.retrieval import HttpRetriever
from services.retriever import patience
from services.retriever.service import serve
from tests.security.people import access, impostor
from treegrpo import scrape, telemetry
from treegrpo.access import OPEN, Access, bearer
from treegrpo.config import RetrieverConfig
from treegrpo.errors import ConfigError, ToolError, UnavailableError
from treegrpo.limits import HEADER_BYTES, REQUEST_BYTES
from treegrpo.security import Role
from treegrpo.telemetry import RetrieverMetrics

SECONDS = 10.0


@asynccontextmanager
async def retriever(tmp_path: Path, who: Access) -> AsyncGenerator[str]:
    """The service; yields HOST:PORT."""
    path = tmp_path / "corpus.jsonl"
    path.write_text(json.dumps({"id": "0", "contents": "Kabul\nKabul is large."}) + "\n")
    port: asyncio.Future[int] = asyncio.get_running_loop().create_future()
    service = asyncio.create_task(serve(RetrieverConfig(corpus=path, listen="127.0.0.1:0"), who, port.set_result))
    await asyncio.wait([port, service], return_when=asyncio.FIRST_COMPLETED, timeout=SECONDS)
    try:
        yield f"127.0.0.1:{port.result()}"
    finally:
        service.cancel()
        with suppress(asyncio.CancelledError):
            await service


def metrics(who: Access) -> str:
    """Served until the tests end; HOST:PORT."""
    return f"127.0.0.1:{telemetry.serve(RetrieverMetrics(), '127.0.0.1:0', 'retriever.listen', who)}"


def client(who: Access, token: dict[str, str] | None = None) -> httpx.AsyncClient:
    return httpx.AsyncClient(timeout=SECONDS, verify=who.web_context(), headers=token)


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


# ---- the retriever


async def test_the_retriever_answers_samplers_over_tls_that_show_its_token(tmp_path: Path, made: Path) -> None:
    sampler = access(made, Role.SAMPLER)
    async with retriever(tmp_path, access(made, Role.RETRIEVER)) as address:
        url, shown = f"https://{address}", bearer(sampler.retriever_token)
        async with HttpRetriever(url, SECONDS, verify=sampler.web_context(), headers=shown) as search:
            assert await search.search("Kabul", topk=1) == ["Kabul\nKabul is large."]
        async with HttpRetriever(url, SECONDS, verify=sampler.web_context()) as search:
            with pytest.raises(ToolError, match=r"status 401.*Show the token"):
                await search.search("Kabul", topk=1)
        await retriever_ready(url, access(made, Role.OPERATOR))


async def test_who_does_not_know_the_authority_does_not_talk_to_it(tmp_path: Path, made: Path) -> None:
    async with retriever(tmp_path, access(made, Role.RETRIEVER)) as address:
        with pytest.raises(UnavailableError, match="CERTIFICATE_VERIFY_FAILED"):
            await retriever_ready(f"https://{address}", OPEN)
        with pytest.raises(UnavailableError, match="No retriever answers"):
            await retriever_ready(f"http://{address}", OPEN)


async def test_a_retriever_of_another_authority_is_not_searched(tmp_path: Path, made: Path) -> None:
    other = impostor(tmp_path, made, "stranger", Role.RETRIEVER)
    async with retriever(tmp_path, other) as address:
        with pytest.raises(UnavailableError, match="CERTIFICATE_VERIFY_FAILED"):
            await retriever_ready(f"https://{address}", access(made, Role.SAMPLER))


async def test_health_is_for_everybody_and_metrics_are_not(tmp_path: Path, made: Path) -> None:
    who = access(made, Role.RETRIEVER)
    async with retriever(tmp_path, who) as address, client(who) as web:
        assert (await web.get(f"https://{address}/health")).json() == {"status": "ok", "documents": 1}
        assert (await web.get(f"https://{address}/metrics")).status_code == 401
        page = await web.get(f"https://{address}/metrics", headers=bearer(who.metrics_token))
        assert "treegrpo_retriever_refused_total 1.0" in page.text


async def test_a_large_body_is_refused_with_a_sentence_and_counted(tmp_path: Path) -> None:
    async with retriever(tmp_path, OPEN) as address, client(OPEN) as web:
        answer = await web.post(f"http://{address}/retrieve", content=b"x" * (REQUEST_BYTES + 1))
        assert answer.status_code == 413
        assert answer.json()["error"] == f"The body has more than {REQUEST_BYTES} bytes; send fewer queries at once."
        assert "treegrpo_retriever_refused_total 1.0" in (await web.get(f"http://{address}/metrics")).text


async def test_a_long_head_is_refused(tmp_path: Path) -> None:
    async with retriever(tmp_path, OPEN) as address:
        answer = await said_to(address, b"GET /health HTTP/1.1\r\nX: " + b"x" * (2 * HEADER_BYTES))
        assert answer.startswith(b"HTTP/1.1 400")


@pytest.mark.parametrize(
    "said",
    [
        b"",
        b"POST /retr",
        b"POST /retrieve HTTP/1.1\r\nHost: a\r\n",
        b"POST /retrieve HTTP/1.1\r\nHost: a\r\nContent-Length: 9\r\n\r\n{",
    ],
)
async def test_a_slow_request_is_hung_up_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, said: bytes) -> None:
    monkeypatch.setattr(patience, "REQUEST_SECONDS", 0.2)
    async with retriever(tmp_path, OPEN) as address:
        assert b"200" not in await said_to(address, said)


async def test_a_trickle_is_no_way_to_stay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(patience, "REQUEST_SECONDS", 0.3)
    async with retriever(tmp_path, OPEN) as address:
        host, _, port = address.rpartition(":")
        reader, writer = await asyncio.open_connection(host, int(port))
        async with asyncio.timeout(SECONDS):
            with suppress(ConnectionError):
                while not reader.at_eof():
                    writer.write(b"x")
                    await writer.drain()
                    with suppress(TimeoutError):
                        await asyncio.wait_for(reader.read(1), 0.05)
        writer.close()


async def test_a_second_request_on_a_connection_has_its_own_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(patience, "REQUEST_SECONDS", 0.2)
    request = b"GET /health HTTP/1.1\r\nHost: a\r\n\r\n"
    async with retriever(tmp_path, OPEN) as address:
        answer = await said_to(address, request + request + b"GET /hea")
        assert answer.count(b"HTTP/1.1 200") == 2


async def test_beyond_this_machine_the_retriever_wants_tls_and_a_token(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"retriever\.listen = 0\.0\.0\.0:0 .*in plain text"):
        await serve(RetrieverConfig(corpus=tmp_path / "none", listen="0.0.0.0:0"), OPEN)


# ---- /metrics


async def test_prometheus_scrapes_with_certificate_authority_and_token(made: Path) -> None:
    who = access(made, Role.LEARNER)
    address = metrics(who)
    async with client(access(made, Role.OPERATOR), bearer(who.metrics_token)) as web:
        page = await web.get(f"https://{address}/metrics")
        assert (page.status_code, page.headers["content-type"]) == (200, scrape.CONTENT)
        assert "treegrpo_retriever_queries_total 0.0" in page.text
        assert (await web.get(f"https://{address}/other")).status_code == 404
        assert (await web.post(f"https://{address}/metrics")).status_code == 404
    async with client(who) as web:
        assert (await web.get(f"https://{address}/metrics")).status_code == 401


async def test_a_samplers_metrics_are_asked_for_by_its_role(made: Path) -> None:
    who = access(made, Role.SAMPLER)
    address = metrics(who)
    async with client(who, bearer(who.metrics_token)) as web:
        page = await web.get(f"https://{address}/metrics", extensions={"sni_hostname": "sampler.treegrpo.internal"})
    assert page.status_code == 200


async def test_on_this_machine_metrics_need_neither() -> None:
    async with client(OPEN) as web:
        assert (await web.get(f"http://{metrics(OPEN)}/metrics")).status_code == 200


@pytest.mark.parametrize("said", [b"", b"GET /metr", b"GET /metrics HTTP/1.1\r\nHost: a\r\n"])
async def test_a_slow_scrape_is_hung_up_on(monkeypatch: pytest.MonkeyPatch, said: bytes) -> None:
    monkeypatch.setattr(scrape, "REQUEST_SECONDS", 0.2)
    assert await said_to(metrics(OPEN), said) == b""


async def test_a_slow_handshake_is_hung_up_on(made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scrape, "REQUEST_SECONDS", 0.2)
    assert await said_to(metrics(access(made, Role.LEARNER)), b"\x16\x03\x01") == b""


async def test_a_large_scrape_is_hung_up_on() -> None:
    assert await said_to(metrics(OPEN), b"GET /metrics HTTP/1.1\r\nX: " + b"x" * (2 * HEADER_BYTES)) == b""


async def test_one_scraper_too_many_is_hung_up_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scrape, "SCRAPERS", 1)
    address = metrics(OPEN)
    host, _, port = address.rpartition(":")
    _, waiting = await asyncio.open_connection(host, int(port))
    waiting.write(b"GET")
    await waiting.drain()
    assert await said_to(address, b"GET /metrics HTTP/1.1\r\n\r\n") == b""
    waiting.close()


def test_beyond_this_machine_metrics_want_a_token(made: Path) -> None:
    who = replace(access(made, Role.LEARNER), metrics_token=OPEN.metrics_token)
    with pytest.raises(ConfigError, match=r"learner\.metrics = 0\.0\.0\.0:0 would tell everybody"):
        telemetry.serve(RetrieverMetrics(), "0.0.0.0:0", "learner.metrics", who)
