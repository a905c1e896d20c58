"""Policy versions share no keys and values."""

from __future__ import annotations

from pathlib import Path

from services.sampler.engines.base import SamplingParams
from tests.engines import builders
from tests.engines.conformance import FIRST, SECOND
from tests.sglang.server_harness import ServerPool, remote

TOKENS = 64


async def test_versions_share_no_cache_even_without_a_flush(pool: ServerPool, endless: tuple[Path, Path]) -> None:
    """An update flushes a server's cache; what is beyond it, in memory of the host or of other servers, is kept apart by name."""
    prefix, cached = builders.prompt(77, TOKENS), list[int]()
    async with remote(endless[0], pool.url("qwen2")) as engine:
        for version in (FIRST, FIRST, SECOND, SECOND, FIRST):
            engine.servers[0].cache_namespace = str(version)
            cached.append((await engine.generate(prefix, SamplingParams(1))).cached)
    assert cached == [0, TOKENS - 1, 0, TOKENS - 1, TOKENS - 1]
