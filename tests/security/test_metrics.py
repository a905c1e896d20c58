"""/metrics: TLS, a token, and no patience."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from pathlib import Path

import pytest

from tests.security.credential_builders import access
from tests.security.http_harness import client, metrics, said_to
from treegrpo.config.security import Role
from treegrpo.errors import ConfigError
from treegrpo.net.limits import HEADER_BYTES
from treegrpo.observability import metrics as served
from treegrpo.observability import metrics_server
from treegrpo.observability.metrics import RetrieverMetrics
from treegrpo.observability.metrics_server import ScrapeLimits
from treegrpo.security.credentials import OPEN, bearer_header


async def test_prometheus_scrapes_with_certificate_authority_and_token(made: Path) -> None:
    who = access(made, Role.LEARNER)
    address = metrics(who)
    async with client(access(made, Role.OPERATOR), bearer_header(who.metrics_token), Role.LEARNER) as web:
        page = await web.get(f"https://{address}/metrics")
        assert (page.status_code, page.headers["content-type"]) == (200, metrics_server.CONTENT)
        assert "treegrpo_retriever_queries_total 0.0" in page.text
        assert (await web.get(f"https://{address}/other")).status_code == 404
        assert (await web.post(f"https://{address}/metrics")).status_code == 404
    async with client(who, server=Role.LEARNER) as web:
        assert (await web.get(f"https://{address}/metrics")).status_code == 401


async def test_whether_it_serves_is_everybodys_to_know_and_no_more(made: Path) -> None:
    who = access(made, Role.LEARNER)
    async with client(who, server=Role.LEARNER) as web:
        health = await web.get(f"https://{metrics(who)}/health")
    assert (health.status_code, health.text) == (503, "not yet\n")


async def test_a_samplers_metrics_are_asked_for_by_its_role(made: Path) -> None:
    who = access(made, Role.SAMPLER)
    address = metrics(who)
    async with client(who, bearer_header(who.metrics_token), Role.SAMPLER) as web:
        page = await web.get(f"https://{address}/metrics", extensions={"sni_hostname": "sampler.treegrpo.internal"})
    assert page.status_code == 200


async def test_on_this_machine_metrics_need_neither() -> None:
    async with client(OPEN) as web:
        assert (await web.get(f"http://{metrics(OPEN)}/metrics")).status_code == 200


@pytest.mark.parametrize("said", [b"", b"GET /metr", b"GET /metrics HTTP/1.1\r\nHost: a\r\n"])
async def test_a_slow_scrape_is_hung_up_on_and_counted(said: bytes) -> None:
    address = metrics(OPEN, ScrapeLimits(seconds=0.2))
    assert await said_to(address, said) == b""
    async with client(OPEN) as web:
        assert 'treegrpo_scrapes_refused_total{reason="slow"} 1.0' in (await web.get(f"http://{address}/metrics")).text


async def test_a_slow_handshake_is_hung_up_on(made: Path) -> None:
    assert await said_to(metrics(access(made, Role.LEARNER), ScrapeLimits(seconds=0.2)), b"\x16\x03\x01") == b""


async def test_a_large_scrape_is_hung_up_on() -> None:
    assert await said_to(metrics(OPEN), b"GET /metrics HTTP/1.1\r\nX: " + b"x" * (2 * HEADER_BYTES)) == b""


async def test_one_scraper_too_many_is_hung_up_on() -> None:
    address = metrics(OPEN, ScrapeLimits(connections=1))
    host, _, port = address.rpartition(":")
    _, waiting = await asyncio.open_connection(host, int(port))
    waiting.write(b"GET")
    await waiting.drain()
    assert await said_to(address, b"GET /metrics HTTP/1.1\r\n\r\n") == b""
    waiting.close()


def test_beyond_this_machine_metrics_want_a_token(made: Path) -> None:
    who = replace(access(made, Role.LEARNER), metrics_token=OPEN.metrics_token)
    with pytest.raises(ConfigError, match=r"learner\.metrics = 0\.0\.0\.0:0 would show the metrics to everybody"):
        served.serve_metrics(RetrieverMetrics(), "0.0.0.0:0", "learner.metrics", who)
