"""Samples from SGLang engines as the sampler does, and checks the completions."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

from services.sampler.engines.base import Completion, SamplingParams
from services.sampler.engines.sglang import ListenOptions, SGLangEngine, open_child
from services.sampler.expansion.availability import AvailabilityMonitor, CallTimings
from services.sampler.expansion.lease_control import LeaseControl
from services.sampler.expansion.retries import CallRetrier
from tests.engines import builders
from tests.engines.conformance import FIRST, SECOND, check_spans
from tests.sglang.server_harness import PYTHON, requirements
from treegrpo.observability.metrics import SamplerMetrics

LAUNCH = {"cache_tokens": 8192, "dtype": "float32", "threads": 1, "seed": 0}


@asynccontextmanager
async def child(path: Path, log: Path, *flags: str) -> AsyncGenerator[SGLangEngine]:
    listen = ListenOptions("127.0.0.1", 0, log)
    engine = await open_child(requirements(path, max_running=16), listen, PYTHON, ("--log-level", "warning", *flags), **LAUNCH)
    async with engine:
        yield engine


async def sample(engine: SGLangEngine, seeds: range, tokens: int) -> list[Completion]:
    """Sample as the sampler does: retry, and wait for an engine that is unavailable."""
    metrics = SamplerMetrics()
    timings = CallTimings(wait_limit=240.0)  # two slow cores take longer than a GPU machine to start a server
    availability, retrier = AvailabilityMonitor(engine.check_health, metrics, timings), CallRetrier(2, metrics, timings)

    async def one(seed: int) -> Completion:
        return await retrier.call_with_retries(
            lambda: engine.generate(builders.prompt(seed, 20), SamplingParams(tokens)), availability, LeaseControl()
        )

    return await asyncio.gather(*(one(seed) for seed in seeds))


def check(completions: list[Completion], seeds: range, tokens: int, *models: Path) -> None:
    """All are complete, and each token has the log-probability that its version's weights give it."""
    references = dict(zip((FIRST, SECOND), map(builders.open_reference, models), strict=False))
    for seed, completion in zip(seeds, completions, strict=True):
        assert len(completion.ids) == tokens
        check_spans(builders.prompt(seed, 20), completion, references)


async def until(is_so: Callable[[], object]) -> None:
    """Wait for something that servers do in their own time; the test's time limit ends it."""
    while not is_so():  # noqa: ASYNC110
        await asyncio.sleep(0.05)


async def running(engine: SGLangEngine, asking: asyncio.Task[list[Completion]]) -> None:
    """Wait until a server says that it computes, asked again and again: what the engine knows may be a look old, and a
    request may begin and end between two looks."""
    while not any([(await server.client.get_load()).running for server in engine.servers]):
        assert not asking.done(), "all requests ended before a server was seen to compute; ask for more tokens"
        await asyncio.sleep(0.01)
