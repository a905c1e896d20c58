"""A retrieval server that comes and goes, or says that it is not well: a real client, a real server on one port."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, Callable
from contextlib import asynccontextmanager

import pytest

from services.environments.retrieval import HttpRetriever
from services.environments.search_qa import SearchQA
from services.sampler.expansion import availability, retries
from tests.sampler.fakes import FakeEngine, lease, plan
from tests.sampler.growing import Growing
from treegrpo.core.lease import LeaseEnd, LeaseEndReason
from treegrpo.core.step import StepStatus


@pytest.fixture(autouse=True)
def _at_once(monkeypatch: pytest.MonkeyPatch) -> None:  # pyright: ignore[reportUnusedFunction]
    monkeypatch.setattr(availability, "PROBE_SECONDS", (0.001,))
    monkeypatch.setattr(retries, "FIRST_WAIT_SECONDS", 0.0)


class Server:
    """A retrieval server on one port that comes and goes, and answers with what ``status`` says of a query."""

    def __init__(self) -> None:
        self.port = 0
        self.queries: list[str] = []
        self.status: Callable[[str], int] = lambda _query: 200

    async def _answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = await reader.readuntil(b"\r\n\r\n")
        length = next(int(line.split(b":")[1]) for line in head.split(b"\r\n") if line.lower().startswith(b"content-length"))
        (query,) = json.loads(await reader.readexactly(length))["queries"]
        self.queries.append(query)
        body = b'{"result": [[{"document": {"contents": "T\\nok"}, "score": 1}]]}'
        writer.write(b"HTTP/1.1 %d X\r\nConnection: close\r\nContent-Length: %d\r\n\r\n" % (self.status(query), len(body)) + body)
        writer.close()

    @asynccontextmanager
    async def up(self) -> AsyncGenerator[None]:
        server = await asyncio.start_server(self._answer, "127.0.0.1", self.port)
        self.port = server.sockets[0].getsockname()[1]
        try:
            yield
        finally:
            server.close()


@asynccontextmanager
async def searching(server: Server) -> AsyncGenerator[Growing]:
    """A policy that searches once and then answers, with a real client of ``server``."""
    if not server.port:
        async with server.up():
            pass  # it has a port now, where nobody listens

    def script(prefix: str) -> str:
        return "<answer>a</answer>" if "</information>" in prefix else f"<search>{len(prefix)}</search>"

    async with HttpRetriever(f"http://127.0.0.1:{server.port}", 5.0) as retriever:
        environment = SearchQA(retriever, topk=1, max_observation_tokens=99, count_tokens=len)
        yield Growing(FakeEngine(script), environment)


SEARCHES = lease(plan(2, 1, 3, max_action_tokens=60, max_context=900))


async def test_a_retriever_that_comes_back_is_waited_for_as_if_nothing_had_happened() -> None:
    server = Server()
    async with server.up(), searching(server) as undisturbed:
        assert (await undisturbed.grow(SEARCHES)).reason is LeaseEndReason.COMPLETE
    server.queries.clear()
    async with searching(server) as growing:
        end = asyncio.create_task(growing.grow(SEARCHES))
        await growing.until_away()
        want = growing.tools.want
        assert want is not None
        assert (
            f"the retriever at http://127.0.0.1:{server.port}/retrieve, which does not answer (All connection attempts failed)"
            in want.what
        )
        async with server.up():
            assert await end == LeaseEnd(SEARCHES.id, LeaseEndReason.COMPLETE)
    assert growing.failed == []
    assert sum(s.cost.tool_calls for s in growing.subtrees) == sum(s.cost.tool_calls for s in undisturbed.subtrees)
    assert sum(s.cost.tokens for s in growing.subtrees) == sum(s.cost.tokens for s in undisturbed.subtrees)
    waited = growing.metrics.registry.get_sample_value("treegrpo_sampler_away_seconds_total", {"part": "retriever"})
    assert waited
    assert waited > 0
    assert growing.errors("ToolAwayError")
    assert growing.tools.want is None


async def test_a_retriever_that_says_not_now_is_waited_for_though_it_answers_probes() -> None:
    server = Server()
    refusals = iter([429, 503, 429])
    server.status = lambda query: 200 if query == "anything" else next(refusals, 200)
    async with server.up(), searching(server) as growing:
        assert (await growing.grow(SEARCHES)).reason is LeaseEndReason.COMPLETE
    assert growing.failed == []
    assert growing.errors("ToolAwayError") == 3


@pytest.mark.parametrize("status", [400, 500])
async def test_a_query_that_no_retriever_answers_is_its_branchs_own_fault(status: int) -> None:
    server = Server()
    first: list[str] = []

    def answer(query: str) -> int:
        if query != "anything" and not first:
            first.append(query)
            return status
        return 200

    server.status = answer
    async with server.up(), searching(server) as growing:
        assert (await growing.grow(SEARCHES)).reason is LeaseEndReason.COMPLETE
    assert growing.failed == [StepStatus.TOOL_ERROR]
