"""How long and how large an answer of a server may be, all of it together."""

import gzip
import json
import tracemalloc
from collections.abc import AsyncGenerator, Callable, Coroutine
from typing import Any

import pytest

from services.sampler.engines.sglang.server import http_client as module
from services.sampler.engines.sglang.server.http_client import SGLangClient
from services.sampler.engines.sglang.server.timings import SGLangTimings
from tests.environments.raw_server import answering, endless, response
from treegrpo.errors import ContractError, DeadlineError

HEAD = b"HTTP/1.1 200 OK\r\n\r\n"
BODY: dict[str, Any] = {"input_ids": [1], "sampling_params": {"max_new_tokens": 4}}
Call = Callable[[SGLangClient], Coroutine[Any, Any, Any]]
CALLS: list[Call] = [
    SGLangClient.get_load,
    SGLangClient.get_metrics,
    lambda api: api.generate(BODY),
    lambda api: api.generate(BODY, lambda: None),
]


@pytest.mark.parametrize("call", CALLS, ids=["load", "metrics", "generate", "stream"])
async def test_a_response_that_drips_meets_its_deadline(call: Call) -> None:
    async with answering(lambda _: endless(HEAD, b" ", 0.005)) as url:
        api = SGLangClient(url, timings=SGLangTimings(control=0.2, generate=0.2))
        with pytest.raises(DeadlineError, match=f"The SGLang server at {url} did not answer /"):
            await call(api)
        await api.close_connections()


@pytest.mark.parametrize("call", CALLS, ids=["load", "metrics", "generate", "stream"])
async def test_an_answer_without_end_is_given_up(call: Call) -> None:
    tracemalloc.start()
    try:
        async with answering(lambda _: endless(HEAD, b"data: " + b" " * 65536)) as url:
            api = SGLangClient(url)
            with pytest.raises(ContractError, match=r"answers with more than [0-9]+ bytes"):
                await call(api)
            await api.close_connections()
        assert tracemalloc.get_traced_memory()[1] < 3 * module.METRICS_BYTES
    finally:
        tracemalloc.stop()


async def test_a_compressed_answer_is_bounded_by_what_it_becomes() -> None:
    async with answering(response("200 OK", gzip.compress(b" " * (64 << 20)), "Content-Encoding: gzip")) as url:
        api = SGLangClient(url)
        with pytest.raises(ContractError, match="more than"):
            await api.get_load()
        await api.close_connections()


async def test_an_event_in_many_pieces_is_put_together_in_linear_time() -> None:
    event = json.dumps({"error": {"message": "x" * 500_000}}).encode()

    async def pieces(_: bytes) -> AsyncGenerator[bytes]:
        yield HEAD + b"data: "
        for start in range(0, len(event), 500):
            yield event[start : start + 500]
        yield b"\n\ndata: [DONE]\n\n"

    begun: list[None] = []
    async with answering(pieces) as url:
        api = SGLangClient(url)
        with pytest.raises(module.EngineError, match=r"answers /generate with an error: x{300} …"):
            await api.generate(BODY, lambda: begun.append(None))
        await api.close_connections()
    assert len(begun) == 1
