"""Before a run is started: is the retriever one that samplers can use?"""

import json
from collections.abc import AsyncGenerator
from pathlib import Path

import pytest

from services.cli.checks.check import run_checks
from services.cli.checks.run_checks import up_checks
from services.cli.processes.readiness import probe_retriever
from services.sampler.retriever_client import check_topk
from tests.cli.small_run import SmallRun
from tests.environments.raw_server import Pieces, answering, response
from treegrpo.config.loader import load_config
from treegrpo.config.schema import Config, EnvironmentConfig, RetrieverConfig
from treegrpo.errors import ConfigError, UnavailableError
from treegrpo.net.limits import TOPK

HIT = {"document": {"id": "1", "contents": "Quillmere\nA town."}, "score": None}
FOUND = response("200 OK", json.dumps({"result": [[HIT]]}).encode())


def asked_at(url: str, topk: int = 3, timeout: float = 5.0) -> Config:
    return Config(retriever=RetrieverConfig(url=url), environment=EnvironmentConfig(topk=topk, timeout=timeout))


@pytest.mark.parametrize("end", ["", "/", "/retrieve", "/retrieve/", "/api?key=1"])
async def test_the_probe_takes_every_url_that_samplers_take(end: str) -> None:
    async with answering(FOUND) as url:
        await probe_retriever(asked_at(url + end))


async def test_the_probe_asks_for_as_many_documents_as_samplers_do() -> None:
    bodies: list[bytes] = []

    async def pieces(head: bytes) -> AsyncGenerator[bytes]:
        bodies.append(head)
        yield response("400 Bad", b'{"error": "topk: 250 is more than 100"}')

    async with answering(pieces) as url:
        with pytest.raises(ConfigError, match=r"cannot be used: .*400.*topk: 250 is more.*environment\.topk"):
            await probe_retriever(asked_at(url, topk=250))
    assert bodies[0].endswith(b'{"queries": ["anything"], "topk": 250, "return_scores": true}')


async def test_the_probe_waits_as_long_as_a_search_may_take() -> None:
    async with answering(None) as url:
        with pytest.raises(UnavailableError, match=r"did not answer within 0\.05 s \(environment\.timeout\)"):
            await probe_retriever(asked_at(url, timeout=0.05))


@pytest.mark.parametrize(
    ("answer", "error", "said"),
    [
        (response("200 OK", b"<html>Welcome</html>", "Content-Type: text/html"), ConfigError, "text/html: <html>Welcome</html>"),
        (response("401 Who", b"Show the token"), ConfigError, "status 401: no type: Show the token"),
        (response("503 Later", b"loading"), UnavailableError, "status 503: no type: loading"),
        (response("307 Moved", b"", "Location: https://127.0.0.1/"), ConfigError, "redirects to https://127.0.0.1/"),
        (b"", UnavailableError, r"does not answer \(.+\)"),
    ],
)
async def test_a_retriever_that_is_of_no_use_is_refused_with_why(
    answer: bytes | Pieces, error: type[Exception], said: str
) -> None:
    async with answering(answer) as url:
        with pytest.raises(error, match=said) as caught:
            await probe_retriever(asked_at(url))
    assert url in str(caught.value)
    assert "()" not in str(caught.value)


def test_more_documents_than_our_retriever_gives_are_refused(tmp_path: Path) -> None:
    config = load_config(None, [*SmallRun(tmp_path).flags(), "--environment.topk", str(TOPK + 1)])
    with pytest.raises(ConfigError, match=rf"environment\.topk = {TOPK + 1} is more than the {TOPK} documents"):
        run_checks(up_checks(config).values())
    assert check_topk(Config(environment=EnvironmentConfig(topk=TOPK))) == f"{TOPK} documents for a query"
    assert check_topk(asked_at("http://127.0.0.1:1", topk=TOPK + 1)).startswith(str(TOPK + 1))
