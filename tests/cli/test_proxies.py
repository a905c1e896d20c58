"""Proxy variables of a company's machine: parts ask each other directly. Nothing listens where the variables point to."""

from __future__ import annotations

import threading
from collections.abc import Generator
from http.server import BaseHTTPRequestHandler, HTTPServer

import grpc
import pytest

from services.cli.processes.readiness import probe_retriever
from services.cli.reports.metrics_client import open_metrics_client
from services.environments.retrieval import HttpRetriever
from tests.security.grpc_server_harness import describe_weights, serving
from treegrpo.config.schema import Config, RetrieverConfig
from treegrpo.config.security import Role
from treegrpo.runtime.healthcheck import probe_failure
from treegrpo.security.credentials import OPEN, Credentials

ANSWER = b'{"result": [[{"document": {"id": "1", "contents": "A"}, "score": 1.0}]]}'
NAMES = ("http_proxy", "https_proxy", "all_proxy", "grpc_proxy")


class Page(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.say(b"treegrpo_step 3\n")

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        self.say(ANSWER)

    def say(self, body: bytes) -> None:
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - its name there
        pass


@pytest.fixture
def address() -> Generator[str]:
    with HTTPServer(("127.0.0.1", 0), Page) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


@pytest.fixture(params=["http://127.0.0.1:9", "socks5://127.0.0.1:9", "socks://127.0.0.1:9", "nonsense"], autouse=True)
def proxy(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
    for name in NAMES:
        monkeypatch.setenv(name, request.param)
        monkeypatch.setenv(name.upper(), request.param)


async def test_http_goes_directly(address: str) -> None:
    await probe_retriever(Config(retriever=RetrieverConfig(url=f"http://{address}")))
    async with HttpRetriever(f"http://{address}", 5.0) as retriever:
        assert await retriever.search("anything", topk=1) == ["A"]
    async with open_metrics_client(OPEN) as read:
        assert await read(address) == {"treegrpo_step": 3.0}
    assert probe_failure(f"http://{address}/health") == ""


async def test_grpc_goes_directly() -> None:
    async with serving(Credentials(Role.LEARNER)) as fixture:
        assert await describe_weights(fixture, Credentials(Role.SAMPLER)) is grpc.StatusCode.OK
