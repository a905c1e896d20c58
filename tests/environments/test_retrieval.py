import json
from collections.abc import AsyncGenerator
from typing import Any

import pytest

from services.environments.retrieval import HttpRetriever, retrieve_url
from tests.environments.raw_server import Pieces, answering, endless, response
from treegrpo.errors import AwayError, ToolAwayError, ToolError


async def failure(raw: bytes | Pieces | None, deadline: float = 5.0) -> ToolError:
    """The error, after its address was found in it."""
    async with answering(raw) as address, HttpRetriever(address, deadline) as retriever:
        with pytest.raises(ToolError) as caught:
            await retriever.search("Ghazni", topk=2)
        assert f"{address}/retrieve" in str(caught.value)
    return caught.value


async def test_documents_come_back_in_order() -> None:
    body = b'{"result": [[{"document": {"id": "1", "contents": "A\\na"}, "score": 2.0},'
    body += b'{"document": {"id": "2", "contents": "B\\nb", "title": "B"}, "score": 1}]]}'
    async with answering(response("200 OK", body)) as address, HttpRetriever(address, 5.0) as retriever:
        assert await retriever.search("Ghazni", topk=2) == ["A\na", "B\nb"]


@pytest.mark.parametrize(
    ("status", "certain"),
    [("429 Slow Down", True), ("502 Bad", True), ("503 Unavailable", True), ("504 Late", True), ("500 Oops", False),
     ("408 Late", False)],
)  # fmt: skip
async def test_a_server_that_is_not_well_is_away(status: str, certain: bool) -> None:
    error = await failure(response(status, b"index is loading"))
    assert isinstance(error, ToolAwayError)
    assert error.certain is certain
    assert f"status {status[:3]}: no type: index is loading" in str(error)


@pytest.mark.parametrize("status", ["400 Bad", "401 Who", "404 Not", "413 Large", "302 Elsewhere"])
async def test_a_server_that_refuses_a_query_is_there(status: str) -> None:
    error = await failure(response(status, b"no"))
    assert not isinstance(error, AwayError)
    assert f"status {status[:3]}" in str(error)


HIT = {"document": {"id": "1", "contents": "A\na"}, "score": 1.5}


async def found(answer: Any, topk: int = 3) -> list[str]:
    body = answer if isinstance(answer, bytes) else json.dumps(answer).encode()
    async with answering(response("200 OK", body)) as address, HttpRetriever(address, 5.0) as retriever:
        return await retriever.search("Ghazni", topk)


@pytest.mark.parametrize(
    "hit",
    [
        HIT,
        {**HIT, "score": None},
        {**HIT, "score": float("nan")},
        {**HIT, "score": "high"},
        {"document": HIT["document"]},
        HIT["document"],
        {"document": "A\na", "score": 1},
        "A\na",
        {"document": {"title": "A", "text": "a"}, "score": 1.0},
        {"title": "A", "content": "a"},
        {"document": {"title": "A", "contents": "a"}},
        {"document": {"title": "Other", "contents": "A\na", "text": "b"}, "rank": 1},
        {"document": {"title": None, "contents": "A\na", "url": {}}},
    ],
)
async def test_every_dialect_of_a_hit_is_read_alike(hit: Any) -> None:
    assert await found({"result": [[hit, hit]], "took": 3}) == ["A\na", "A\na"]


@pytest.mark.parametrize(
    ("hits", "contents"),
    [([], []), ([HIT] * 9, ["A\na"] * 3), (["Quillmere is a town"], ["Quillmere is a town"]), (["half \ud800"], ["half \ud800"]),
     ([""], [""]), ([{"document": {"text": "only text"}}], ["only text"])],
)  # fmt: skip
async def test_odd_hits_are_documents_and_more_than_asked_are_cut(hits: list[Any], contents: list[str]) -> None:
    assert await found({"result": [hits]}) == contents


async def test_a_byte_order_mark_is_no_part_of_the_answer() -> None:
    assert await found(b"\xef\xbb\xbf" + json.dumps({"result": [[HIT]]}).encode()) == ["A\na"]


@pytest.mark.parametrize(
    ("body", "said"),
    [
        (b"<html>\nWelcome</html>", "it begins as text/html: <html> Welcome</html>"),
        (b"", "an empty body"),
        (b"{}", "an object of nothing"),
        (b'{"results": [], "a": 1}', "an object of 'results', 'a'"),
        (b"[[]]", "a list"),
        (b'{"result": null}', "a list under"),
        (b'{"result": []}', "0 entries for one query"),
        (b'{"result": [[], []]}', "2 entries for one query"),
        (b'{"result": [{"document": {"contents": "A"}}]}', "1 entries for one query"),
        (b'{"result": [[{"id": "1"}]]}', "a document has 'id', and neither contents nor text"),
        (b'{"result": [[{"document": {"contents": null}}]]}', "a document has 'contents'"),
        (b'{"result": [[null]]}', "a document is a NoneType"),
        (b'{"result": [[7]]}', "a document is a int"),
        (b"[" * 100_000, "nested too deep"),
    ],
)
async def test_an_answer_in_another_format_says_what_it_is(body: bytes, said: str) -> None:
    error = await failure(response("200 OK", body, "Content-Type: text/html"))
    assert not isinstance(error, AwayError)
    assert "is not Search-R1's format" in str(error)
    assert said in str(error)
    assert len(str(error)) < 700


@pytest.mark.parametrize(
    ("address", "url"),
    [("http://h:1", "http://h:1/retrieve"), ("http://h:1/", "http://h:1/retrieve"), ("http://h:1/retrieve/", "http://h:1/retrieve"),
     ("http://h:1/api//?key=a#x", "http://h:1/api/retrieve?key=a"), ("https://[::1]/retrieve?k=1", "https://[::1]/retrieve?k=1")],
)  # fmt: skip
def test_a_url_may_end_as_people_write_it(address: str, url: str) -> None:
    assert retrieve_url(address) == url


async def test_a_password_in_the_url_is_sent_and_not_shown() -> None:
    heads: list[bytes] = []

    async def pieces(head: bytes) -> AsyncGenerator[bytes]:
        heads.append(head)
        yield response("403 No", b"no")

    async with answering(pieces) as address, HttpRetriever(address.replace("://", "://me:secret@"), 5.0) as retriever:
        with pytest.raises(ToolError, match=f"the retriever at {address}/retrieve refused"):
            await retriever.search("Ghazni", topk=2)
    assert b"Authorization: Basic bWU6c2VjcmV0" in heads[0]


@pytest.mark.parametrize("raw", [b"", b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\n{", b"HTTP/1.1 2"])
async def test_a_connection_that_breaks_is_a_server_that_is_away(raw: bytes) -> None:
    error = await failure(raw)
    assert isinstance(error, ToolAwayError)
    assert error.certain
    assert "does not answer" in str(error)


async def test_a_server_that_never_answers_may_have_a_query_at_fault() -> None:
    def dripping(_: bytes) -> AsyncGenerator[bytes]:
        return endless(b"HTTP/1.1 200 OK\r\n\r\n", b" ", 0.01)

    for raw in (None, dripping):
        error = await failure(raw, deadline=0.05)
        assert isinstance(error, ToolAwayError)
        assert not error.certain
        assert "did not answer within 0.05 s (environment.timeout)" in str(error)


async def test_a_server_that_is_not_there_is_away() -> None:
    async with answering(b"") as address:
        pass
    async with HttpRetriever(address, 5.0) as retriever:
        with pytest.raises(ToolAwayError, match=f"the retriever at {address}/retrieve does not answer") as caught:
            await retriever.search("Ghazni", topk=2)
    assert caught.value.certain


async def test_a_url_that_nobody_could_reach_is_not_waited_for() -> None:
    async with HttpRetriever("ftp://127.0.0.1:1", 5.0) as retriever:
        with pytest.raises(ToolError, match=r"retriever\.url") as caught:
            await retriever.search("Ghazni", topk=2)
    assert not isinstance(caught.value, AwayError)
