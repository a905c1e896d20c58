"""One request costs the others no more than its turn."""

import asyncio
import re
import threading
import time
import unicodedata
from collections.abc import AsyncGenerator, Sequence
from contextlib import asynccontextmanager
from typing import Any

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from starlette.applications import Starlette

from services.retriever.http_limits import RetrieverLimits
from services.retriever.index import QUERY_WORDS, Document, Hit, Index, split_terms
from services.retriever.search_endpoint import RefusalRecorder, send_response
from services.retriever.service import create_app
from treegrpo.net.limits import LOOP_BYTES, TOPK
from treegrpo.observability.metrics import RetrieverMetrics
from treegrpo.security.credentials import OPEN

DOCUMENTS = [Document(id=str(number), contents=f"Town {number}\nA town by the river.") for number in range(5)]


class BlockingIndex(Index):
    """An index whose searches wait until they are let go."""

    def __init__(self) -> None:
        super().__init__(DOCUMENTS)
        self.asked: list[str] = []
        self.free = threading.Event()
        self.begun = threading.Event()
        self.begun_small = threading.Event()

    def search(self, query: str, topk: int) -> list[Hit]:
        self.asked.append(query)
        self.begun.set()
        if query == "small":
            self.begun_small.set()
        assert self.free.wait(20)
        return super().search(query, topk)


def serving(index: Index, limits: RetrieverLimits | None = None) -> Starlette:
    metrics = RetrieverMetrics()
    return create_app(index, metrics, OPEN, RefusalRecorder(metrics), limits)


@asynccontextmanager
async def client(index: Index, limits: RetrieverLimits | None = None) -> AsyncGenerator[httpx.AsyncClient]:
    transport = httpx.ASGITransport(serving(index, limits))
    async with httpx.AsyncClient(transport=transport, base_url="http://here") as made:
        yield made


async def retrieve(web: httpx.AsyncClient, queries: Sequence[str], **more: Any) -> httpx.Response:
    return await web.post("/retrieve", json={"queries": queries, **more})


@pytest.mark.parametrize(
    "more", [{}, {"topk": None}, {"topk": 0}, {"topk": None, "return_scores": None}, {"return_scores": False, "user": 1}]
)
async def test_what_is_null_counts_as_left_out(more: dict[str, Any]) -> None:
    async with client(Index(DOCUMENTS)) as web:
        answer = await retrieve(web, ["town"], **more)
    assert [document["id"] for document in answer.json()["result"][0]] == ["0", "1", "2"]


async def test_more_documents_than_there_are_is_all_of_them() -> None:
    async with client(Index(DOCUMENTS)) as web:
        answer = await retrieve(web, ["town", "river", "nothing"], topk=TOPK, return_scores=True)
    assert [len(hits) for hits in answer.json()["result"]] == [5, 5, 0]
    assert answer.headers["content-length"] == str(len(answer.content))


async def test_searches_leave_the_event_loop_to_others() -> None:
    index = BlockingIndex()
    async with client(index) as web:
        searching = asyncio.create_task(retrieve(web, ["town"]))
        await asyncio.to_thread(index.begun.wait, 20)
        assert (await web.get("/health")).status_code == 200
        index.free.set()
        assert (await searching).status_code == 200


async def test_requests_take_turns_query_by_query() -> None:
    index = BlockingIndex()
    async with client(index, RetrieverLimits(searches=1)) as web:
        many = asyncio.create_task(retrieve(web, [f"many {number}" for number in range(9)]))
        await asyncio.to_thread(index.begun.wait, 20)
        one = asyncio.create_task(retrieve(web, ["one"]))
        for _ in range(9):  # the second request comes to wait for its turn
            await asyncio.sleep(0)
        index.free.set()
        assert {(await one).status_code, (await many).status_code} == {200}
    assert index.asked.index("one") < 9


async def test_more_requests_than_may_wait_are_sent_away() -> None:
    index = BlockingIndex()
    async with client(index, RetrieverLimits(waiting=1)) as web:
        first = asyncio.create_task(retrieve(web, ["town"]))
        await asyncio.to_thread(index.begun.wait, 20)
        second = await retrieve(web, ["town"])
        index.free.set()
        assert (second.status_code, (await first).status_code) == (503, 200)
        assert second.json()["error"] == "1 requests wait already; ask again in a moment."
        assert 'refused_total{reason="busy"} 1.0' in (await web.get("/metrics")).text


async def test_a_search_that_takes_too_long_is_given_up() -> None:
    index = BlockingIndex()
    async with client(index, RetrieverLimits(search_seconds=0.05)) as web:
        answer = await retrieve(web, ["town"])
        index.free.set()
        assert (answer.status_code, "takes longer than" in answer.json()["error"]) == (503, True)


async def test_an_answer_is_no_larger_than_a_client_takes() -> None:
    async with client(Index(DOCUMENTS), RetrieverLimits(response_bytes=1000)) as web:
        answer = await retrieve(web, ["town"] * 20)
        assert (answer.status_code, "more than 1000 bytes" in answer.json()["error"]) == (413, True)
        assert (await retrieve(web, ["town"])).status_code == 200


async def test_large_requests_wait_for_a_slot_and_small_ones_do_not() -> None:
    index, large = BlockingIndex(), ["town " + "x" * 60_000] * (1 + LOOP_BYTES // 60_000)
    async with client(index, RetrieverLimits(large_requests=1)) as web:
        first = asyncio.create_task(retrieve(web, large))
        await asyncio.to_thread(index.begun.wait, 20)
        second = asyncio.create_task(retrieve(web, ["second", *large]))
        small = asyncio.create_task(retrieve(web, ["small"]))
        await asyncio.to_thread(index.begun_small.wait, 20)
        assert "second" not in index.asked
        index.free.set()
        answers = await asyncio.gather(first, second, small)
    assert [answer.status_code for answer in answers] == [200, 200, 200]


@pytest.mark.parametrize(
    "text",
    [
        "\u0301\u0323" * 500_000,
        "\u0f73" * 300_000,
        "\u0344" * 500_000,
        "\ufdfa" * 50_000,
        "a b " * 250_000,
        "\u1e9e" * 300_000,
    ],
    ids=range(6),
)
def test_a_query_is_taken_apart_in_linear_time(text: str) -> None:
    began = time.process_time()
    split_terms(text)
    assert time.process_time() - began < 1.5


@given(st.text(st.characters(codec="utf-8"), max_size=30) | st.text("\u0301\u0323\u0f73\u0344é한ſ１ﬁ a", max_size=30))
def test_letter_by_letter_gives_the_terms_of_the_whole_text(text: str) -> None:
    plain = unicodedata.normalize("NFKD", text.casefold())
    whole = "".join(letter if not unicodedata.combining(letter) else "" for letter in plain)
    assert split_terms(text) == re.findall(r"\w+", whole)


def test_the_first_terms_of_a_long_query_count() -> None:
    index = Index([*DOCUMENTS, Document(id="late", contents="late")])
    found = [{hit.document.id for hit in index.search("unknown " * 9999 + "town " * many + "late", 9)} for many in
             (QUERY_WORDS - 1, QUERY_WORDS)]  # fmt: skip
    assert found == [{"0", "1", "2", "3", "4", "late"}, {"0", "1", "2", "3", "4"}]


async def test_an_answer_is_sent_in_slices() -> None:
    sent: list[dict[str, Any]] = []

    async def send(message: Any) -> None:
        sent.append(message)

    await send_response([b"x" * 200_000, b"y"], send)
    assert [len(message["body"]) for message in sent[1:]] == [65536, 65536, 65536, 200_001 - 3 * 65536, 0]
    assert dict(sent[0]["headers"])[b"content-length"] == b"200001"
