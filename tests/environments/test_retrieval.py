import asyncio
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager

import pytest

from services.environments.retrieval import HttpRetriever
from treegrpo.errors import AwayError, ToolAwayError, ToolError


@asynccontextmanager
async def answering(raw: bytes | None) -> AsyncGenerator[str]:
    """A server that answers every connection with ``raw``, or never with ``None``; yields its address."""
    closing = asyncio.Event()

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        if raw is None:
            await closing.wait()
        else:
            writer.write(raw)
        writer.close()

    server = await asyncio.start_server(answer, "127.0.0.1", 0)
    try:
        yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    finally:
        closing.set()
        server.close()


def response(status: str, body: bytes) -> bytes:
    return b"HTTP/1.1 %s\r\nContent-Length: %d\r\n\r\n%s" % (status.encode(), len(body), body)


async def failure(raw: bytes | None, deadline: float = 5.0) -> ToolError:
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
    assert f"status {status[:3]}: index is loading" in str(error)


@pytest.mark.parametrize("status", ["400 Bad", "401 Who", "404 Not", "413 Large", "302 Elsewhere"])
async def test_a_server_that_refuses_a_query_is_there(status: str) -> None:
    error = await failure(response(status, b"no"))
    assert not isinstance(error, AwayError)
    assert f"status {status[:3]}" in str(error)


@pytest.mark.parametrize("body", [b"hello", b"{}", b'{"result": []}', b'{"result": [[{"id": "1"}]]}'])
async def test_an_answer_in_another_format_is_a_tool_error(body: bytes) -> None:
    error = await failure(response("200 OK", body))
    assert not isinstance(error, AwayError)
    assert "format" in str(error)


@pytest.mark.parametrize("raw", [b"", b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\n{", b"HTTP/1.1 2"])
async def test_a_connection_that_breaks_is_a_server_that_is_away(raw: bytes) -> None:
    error = await failure(raw)
    assert isinstance(error, ToolAwayError)
    assert error.certain
    assert "does not answer" in str(error)


async def test_a_server_that_never_answers_runs_into_the_deadline_which_may_be_the_querys_fault() -> None:
    error = await failure(None, deadline=0.05)
    assert isinstance(error, ToolAwayError)
    assert not error.certain
    assert "ReadTimeout" in str(error)


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
