import asyncio
import json
import subprocess
import sys
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import httpx
import pytest

from services.environments.retrieval import HttpRetriever
from services.retriever.service import serve_retriever
from treegrpo.config.schema import RetrieverConfig
from treegrpo.errors import AddressInUseError, DataError, ToolError
from treegrpo.security.credentials import OPEN

ROWS = ["Kabul\nKabul is large.", "Ghazni\nGhazni is near Kabul.", "Herat\nHerat is old."]


def config(tmp_path: Path, port: int = 0) -> RetrieverConfig:
    path = tmp_path / "corpus.jsonl"
    path.write_text("".join(json.dumps({"id": str(n), "contents": text}) + "\n" for n, text in enumerate(ROWS)))
    return RetrieverConfig(corpus=path, listen=f"127.0.0.1:{port}")


@asynccontextmanager
async def running(settings: RetrieverConfig) -> AsyncGenerator[str]:
    """The service in this loop, over real HTTP; yields its address."""
    port: asyncio.Future[int] = asyncio.get_running_loop().create_future()
    service = asyncio.create_task(serve_retriever(settings, OPEN, port.set_result))
    await asyncio.wait([port, service], return_when=asyncio.FIRST_COMPLETED, timeout=20)
    try:
        yield f"http://127.0.0.1:{port.result()}"
    finally:
        service.cancel()
        with suppress(asyncio.CancelledError):
            await service


async def post(address: str, body: Any) -> httpx.Response:
    async with httpx.AsyncClient() as client:
        return await client.post(f"{address}/retrieve", json=body)


async def test_a_batch_is_answered_in_search_r1s_format(tmp_path: Path) -> None:
    async with running(config(tmp_path)) as address:
        answer = await post(address, {"queries": ["Kabul", "herat", "nothing"], "topk": 2, "return_scores": True})
    result = answer.json()["result"]
    assert [[hit["document"]["id"] for hit in hits] for hits in result] == [["0", "1"], ["2"], []]
    assert result[1][0]["document"] == {"id": "2", "contents": ROWS[2]}
    assert result[0][0]["score"] > result[0][1]["score"] > 0


async def test_documents_come_bare_without_scores(tmp_path: Path) -> None:
    async with running(config(tmp_path)) as address:
        answer = await post(address, {"queries": ["herat"]})
    assert answer.json() == {"result": [[{"id": "2", "contents": ROWS[2]}]]}


async def test_the_environments_client_gets_the_contents(tmp_path: Path) -> None:
    async with running(config(tmp_path)) as address, HttpRetriever(address, 5.0) as retriever:
        assert await retriever.search("Kabul", topk=1) == [ROWS[0]]
        with pytest.raises(ToolError, match="status 400"):
            await retriever.search("Kabul", topk=-1)


@pytest.mark.parametrize(
    ("body", "named"),
    [
        ({"topk": 1}, "queries"),
        ({"queries": "Kabul"}, "queries"),
        ({"queries": []}, "queries"),
        ({"queries": [1]}, "queries.0"),
        ({"queries": ["a"], "topk": -1}, "topk"),
        ({"queries": ["a"], "topk": "x"}, "topk"),
        ([], "the body"),
    ],
)
async def test_a_bad_request_is_refused_with_a_sentence(tmp_path: Path, body: Any, named: str) -> None:
    async with running(config(tmp_path)) as address:
        answer = await post(address, body)
    assert answer.status_code == 400
    assert answer.json()["error"].startswith(f"{named}: ")


async def test_health_and_metrics_tell_what_it_did(tmp_path: Path) -> None:
    async with running(config(tmp_path)) as address, httpx.AsyncClient() as client:
        assert (await client.get(f"{address}/health")).json() == {"status": "ok", "documents": 3}
        await post(address, {"queries": ["Kabul", "herat"], "topk": 2})
        await post(address, {})
        text = (await client.get(f"{address}/metrics")).text
    assert "treegrpo_retriever_queries_total 2.0" in text
    assert 'treegrpo_retriever_refused_total{reason="request"} 1.0' in text
    assert "treegrpo_retriever_documents 3.0" in text


async def test_cancelling_frees_the_address(tmp_path: Path) -> None:
    async with running(config(tmp_path)) as address:
        port = int(address.rpartition(":")[2])
    async with running(config(tmp_path, port)) as again:
        assert again == address


async def test_a_busy_port_is_named(tmp_path: Path) -> None:
    async with running(config(tmp_path)) as address:
        port = int(address.rpartition(":")[2])
        with pytest.raises(AddressInUseError, match=rf"retriever\.listen = 127\.0\.0\.1:{port}"):
            await serve_retriever(config(tmp_path, port), OPEN)


async def test_a_broken_corpus_is_refused_before_anything_starts(tmp_path: Path) -> None:
    settings = config(tmp_path)
    settings.corpus.write_text('{"id": "1"}\n')
    with pytest.raises(DataError, match=r"corpus\.jsonl, line 1"):
        await serve_retriever(settings, OPEN, lambda _: pytest.fail("it listens"))


def test_it_imports_nothing_heavy() -> None:
    code = "import sys, services.retriever.service; print([n for n in ('torch', 'numba', 'transformers') if n in sys.modules])"
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=Path.cwd())
    assert shown.stdout.strip() == "[]"


async def test_a_client_that_leaves_in_the_middle_of_its_query_is_no_error(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    async with running(config(tmp_path)) as address:
        _, writer = await asyncio.open_connection("127.0.0.1", int(address.rpartition(":")[2]))
        writer.write(b'POST /retrieve HTTP/1.1\r\nHost: here\r\nContent-Length: 100\r\n\r\n{"queries"')
        await writer.drain()
        writer.close()
        await writer.wait_closed()
        await post(address, {"queries": ["Kabul"]})
    assert "Traceback" not in capfd.readouterr().err
