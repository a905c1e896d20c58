"""Opens the engine and the environment that the configuration names."""

from __future__ import annotations

import asyncio
import zlib
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from pathlib import Path

from services.environments.search_qa import SearchQA
from services.sampler.engines.base import EngineCounters, ManagedEngine
from services.sampler.engines.embedded import EmbeddedEngine
from services.sampler.engines.sglang import EngineRequirements, ListenOptions, SGLangEngine, open_child, open_remote
from services.sampler.engines.sglang.server.launch_command import check_distinct_urls, check_listen_address, parse_extra_flags
from services.sampler.retriever_client import open_retriever
from services.sampler.text.tokenizer import Tokenizer
from treegrpo.config.schema import Config
from treegrpo.config.security import Role
from treegrpo.core.step import PolicyVersion
from treegrpo.net.address import check_free, split_address
from treegrpo.observability.metrics import SamplerMetrics
from treegrpo.security.credentials import Credentials

EXPORT_SECONDS = 1.0
"""Between two exports of the engine's counters."""


async def open_engine(config: Config, path: Path, version: PolicyVersion, name: str, access: Credentials) -> ManagedEngine:
    """Open the engine, serving ``version`` from the model directory ``path``. Close it after use.

    Samples without a seed of their own differ between engines of different ``name`` in the same run.

    Raises:
        ModelError: the model cannot be served.
        EngineError, DeadlineError, UnavailableError, ConfigError, AddressInUseError: SGLang cannot be used; why, and what to do.
    """
    engine, seed = config.engine, zlib.crc32(f"{config.run.seed}/{name}".encode())
    if engine.kind == "sglang":
        return await _open_sglang(
            config,
            EngineRequirements(path, version, config.rollout.max_context, engine.max_running, engine.weights_dir),
            name,
            seed,
            access,
        )
    return await EmbeddedEngine.from_directory(
        path,
        max_running=engine.max_running,
        max_context=config.rollout.max_context,
        cache_tokens=engine.cache_tokens,
        seed=seed,
        threads=engine.threads,
        version=version,
    )


def weights_dir(config: Config) -> Path | None:
    """The directory that policy versions are downloaded to: where SGLang reads them, so that no copy is needed; None: any."""
    return config.engine.weights_dir if config.engine.kind == "sglang" and config.engine.weights_dir.is_dir() else None


async def _open_sglang(config: Config, demands: EngineRequirements, name: str, seed: int, access: Credentials) -> SGLangEngine:
    engine = config.engine
    if engine.urls:
        for url in engine.urls:
            access.check_url("engine.urls", url)
        check_distinct_urls(engine.urls)
        return await open_remote(demands, engine.urls, access.web_context(Role.SAMPLER))
    host, port = split_address(engine.listen, "engine.listen")
    check_listen_address(engine.listen, insecure_network=access.insecure_network)
    check_free(engine.listen, "engine.listen")
    place = ListenOptions(host, port, config.run.dir / "logs" / f"{name}-sglang.log")
    shape = {"cache_tokens": engine.cache_tokens, "dtype": config.model.dtype, "threads": engine.threads, "seed": seed}
    return await open_child(demands, place, engine.python, parse_extra_flags(engine.flags), **shape)


@asynccontextmanager
async def open_environment(config: Config, tokenizer: Tokenizer, access: Credentials) -> AsyncGenerator[SearchQA]:
    """Open the environment, with a client of the retriever that it searches with."""
    environment = config.environment
    async with open_retriever(config, access) as retriever:
        yield SearchQA(
            retriever,
            topk=environment.topk,
            max_observation_tokens=environment.max_observation_tokens,
            count_tokens=lambda text: len(tokenizer.encode(text)),
            reward=environment.reward,
            reward_shape=environment.reward_shape,
            format_penalty=environment.format_penalty,
        )


async def export_engine_metrics(engine: ManagedEngine, metrics: SamplerMetrics) -> None:
    """Copy the engine's counters to ``metrics`` periodically, until cancelled."""
    seen = EngineCounters()
    while True:
        now = engine.counters
        metrics.running.set(now.running)
        metrics.queued.set(now.waiting)
        metrics.cache_used.set(now.cache_tokens)
        metrics.cache_size.set(now.cache_capacity)
        metrics.limit.set(now.limit)
        metrics.cache_evicted.inc(now.evicted - seen.evicted)
        metrics.stalled_for_weights.inc(now.stalled - seen.stalled)
        metrics.restarts.inc(now.restarts - seen.restarts)
        metrics.servers.families = engine.server_metrics
        for error, count in now.errors.items():
            metrics.errors.labels(error).inc(count - seen.errors.get(error, 0))
        seen = now
        await asyncio.sleep(EXPORT_SECONDS)
