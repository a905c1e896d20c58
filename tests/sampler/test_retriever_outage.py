"""A retrieval server that comes and goes, or says that it is not well: a real client, a real server on one port."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, Callable
from contextlib import asynccontextmanager

import pytest

from services.environments.retrieval import HttpRetriever
from services.environments.search_qa import SearchQA
from tests.sampler.expansion_harness import ExpansionHarness
from tests.sampler.fakes import FakeEngine, lease, plan
from treegrpo.core.lease import LeaseEnd, LeaseEndReason
from treegrpo.core.step import StepStatus


class RetrievalServer:
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
async def searching(server: RetrievalServer) -> AsyncGenerator[ExpansionHarness]:
    """A policy that searches once and then answers, with a real client of ``server``."""
    if not server.port:
        async with server.up():
            pass  # it has a port now, where nobody listens

    def script(prefix: str) -> str:
        return "<answer>a</answer>" if "</information>" in prefix else f"<search>{len(prefix)}</search>"

    async with HttpRetriever(f"http://127.0.0.1:{server.port}", 5.0) as retriever:
        environment = SearchQA(retriever, topk=1, max_observation_tokens=99, count_tokens=len)
        yield ExpansionHarness(FakeEngine(script), environment)


SEARCHES = lease(plan(2, 1, 3, max_action_tokens=60, max_context=900))


async def test_a_retriever_that_comes_back_is_waited_for_at_no_cost() -> None:
    server = RetrievalServer()
    async with server.up(), searching(server) as undisturbed:
        assert (await undisturbed.expand(SEARCHES)).reason is LeaseEndReason.COMPLETE
    server.queries.clear()
    async with searching(server) as harness:
        end = asyncio.create_task(harness.expand(SEARCHES))
        await harness.until_changed()
        wait_reason = harness.tools.wait_reason
        assert wait_reason is not None
        assert (
            f"the retriever at http://127.0.0.1:{server.port}/retrieve, which does not answer (All connection attempts failed)"
            in wait_reason.what
        )
        async with server.up():
            assert await end == LeaseEnd(SEARCHES.id, LeaseEndReason.COMPLETE)
    assert harness.failed == []
    assert sum(s.cost.tool_calls for s in harness.subtrees) == sum(s.cost.tool_calls for s in undisturbed.subtrees)
    assert sum(s.cost.tokens for s in harness.subtrees) == sum(s.cost.tokens for s in undisturbed.subtrees)
    waited = harness.metrics.registry.get_sample_value("treegrpo_sampler_away_seconds_total", {"part": "retriever"})
    assert waited
    assert waited > 0
    assert harness.errors("ToolAwayError")
    assert harness.tools.wait_reason is None


async def test_a_busy_retriever_is_waited_for_though_it_answers_probes() -> None:
    server = RetrievalServer()
    refusals = iter([429, 503, 429])
    server.status = lambda query: 200 if query == "anything" else next(refusals, 200)
    async with server.up(), searching(server) as harness:
        assert (await harness.expand(SEARCHES)).reason is LeaseEndReason.COMPLETE
    assert harness.failed == []
    assert harness.errors("ToolAwayError") == 3


@pytest.mark.parametrize("status", [400, 500])
async def test_a_query_that_no_retriever_answers_is_its_branchs_own_fault(status: int) -> None:
    server = RetrievalServer()
    first: list[str] = []

    def answer(query: str) -> int:
        if query != "anything" and not first:
            first.append(query)
            return status
        return 200

    server.status = answer
    async with server.up(), searching(server) as harness:
        assert (await harness.expand(SEARCHES)).reason is LeaseEndReason.COMPLETE
    assert harness.failed == [StepStatus.TOOL_ERROR]
