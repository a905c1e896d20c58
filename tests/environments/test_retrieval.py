import asyncio
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager

import pytest

from services.environments.retrieval import HttpRetriever
from treegrpo.errors import ToolError


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


async def fails(raw: bytes | None, deadline: float = 5.0) -> str:
    """The message of the ToolError, after its address was found in it."""
    async with answering(raw) as address, HttpRetriever(address, deadline) as retriever:
        with pytest.raises(ToolError) as caught:
            await retriever.search("Ghazni", topk=2)
        assert f"{address}/retrieve" in str(caught.value)
    return str(caught.value)


async def test_documents_come_back_in_order() -> None:
    body = b'{"result": [[{"document": {"id": "1", "contents": "A\\na"}, "score": 2.0},'
    body += b'{"document": {"id": "2", "contents": "B\\nb", "title": "B"}, "score": 1}]]}'
    async with answering(response("200 OK", body)) as address, HttpRetriever(address, 5.0) as retriever:
        assert await retriever.search("Ghazni", topk=2) == ["A\na", "B\nb"]


async def test_a_status_of_failure_is_a_tool_error() -> None:
    assert "503" in await fails(response("503 Unavailable", b"index is loading"))


@pytest.mark.parametrize("body", [b"hello", b"{}", b'{"result": []}', b'{"result": [[{"id": "1"}]]}'])
async def test_an_answer_in_another_format_is_a_tool_error(body: bytes) -> None:
    assert "format" in await fails(response("200 OK", body))


async def test_a_broken_connection_is_a_tool_error() -> None:
    assert "does not answer" in await fails(b"")


async def test_a_server_that_never_answers_runs_into_the_deadline() -> None:
    assert "Timeout" in await fails(None, deadline=0.05)


async def test_a_server_that_is_not_there_is_a_tool_error() -> None:
    async with answering(b"") as address:
        pass
    async with HttpRetriever(address, 5.0) as retriever:
        with pytest.raises(ToolError, match="is it running"):
            await retriever.search("Ghazni", topk=2)
