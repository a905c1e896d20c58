"""Engine and environment as the configuration asks for them."""

from __future__ import annotations

import asyncio
import zlib
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from pathlib import Path

from services.environments.retrieval import HttpRetriever
from services.environments.search_qa import SearchQA
from services.sampler.engines.embedded import EmbeddedEngine
from services.sampler.tokenizer import Tokenizer
from treegrpo.access import Access, bearer
from treegrpo.config import Config
from treegrpo.step import PolicyVersion
from treegrpo.telemetry import SamplerMetrics

OBSERVE_SECONDS = 1.0


async def open_engine(config: Config, path: Path, version: PolicyVersion, name: str) -> EmbeddedEngine:
    """The engine, serving ``version`` from the model directory ``path``. Close it after use. Raises ModelError.

    What is sampled without a seed of its own differs between engines of different ``name``, in the same run.
    """
    return await EmbeddedEngine.open(
        path,
        max_running=config.engine.max_running,
        max_context=config.rollout.max_context,
        cache_tokens=config.engine.cache_tokens,
        seed=zlib.crc32(f"{config.run.seed}/{name}".encode()),
        threads=config.engine.threads,
        version=version,
    )


@asynccontextmanager
async def open_environment(config: Config, tokenizer: Tokenizer, access: Access) -> AsyncGenerator[SearchQA]:
    """The environment, with a client of the retriever it searches with."""
    environment = config.environment
    access.check_url("retriever.url", config.search_url)
    verify, headers = access.web_context(), bearer(access.retriever_token)
    async with HttpRetriever(config.search_url, environment.timeout, verify=verify, headers=headers) as retriever:
        yield SearchQA(
            retriever,
            topk=environment.topk,
            max_observation_tokens=environment.max_observation_tokens,
            count_tokens=lambda text: len(tokenizer.encode(text)),
            reward=environment.reward,
            format_penalty=environment.format_penalty,
        )


async def observe(engine: EmbeddedEngine, metrics: SamplerMetrics) -> None:
    """Show the engine's counters in ``metrics``, for ever."""
    evicted = 0
    while True:
        now = engine.counters
        metrics.running.set(now.running)
        metrics.queued.set(now.waiting)
        metrics.cache_used.set(now.cache_tokens)
        metrics.cache_size.set(now.cache_capacity)
        metrics.cache_evicted.inc(now.evicted - evicted)
        evicted = now.evicted
        await asyncio.sleep(OBSERVE_SECONDS)
