"""The embedded engine: the conformance suite, and what is its own."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from services.sampler.engines.base import Engine, SamplingParams
from services.sampler.engines.embedded import EmbeddedEngine
from tests.engines import builders
from tests.engines.conformance import *  # noqa: F403  # the suite's tests run in this module
from tests.engines.conformance import EngineFactory, greedy
from treegrpo.errors import EngineError, ModelError


@asynccontextmanager
async def opened(path: Path, max_running: int = 8, cache_tokens: int = 4096, seed: int = 0) -> AsyncGenerator[EmbeddedEngine]:
    engine = await EmbeddedEngine.from_directory(
        path, max_running=max_running, max_context=512, cache_tokens=cache_tokens, seed=seed
    )
    async with engine:
        yield engine


@pytest.fixture
def open_engine() -> EngineFactory:
    @asynccontextmanager
    async def open_(path: Path) -> AsyncGenerator[Engine]:
        async with opened(path) as engine:
            yield engine

    return open_


@pytest.mark.parametrize(
    "changes", [{"attention_bias": True}, {"mlp_bias": True}, {"tie_word_embeddings": True}, {"num_key_value_heads": 4}]
)
async def test_variants_of_the_architecture_equal_hugging_face(tmp_path: Path, changes: dict[str, Any]) -> None:
    builders.save_model(tmp_path, "llama", seed=5, **changes)
    prefix = builders.prompt(1, 30)
    async with opened(tmp_path) as engine:
        completion = await engine.generate(prefix, SamplingParams(max_tokens=20))
    expected = builders.logprobs(builders.open_reference(tmp_path), prefix, completion.ids)
    assert np.allclose(completion.logprobs, expected, atol=1e-4)


@pytest.mark.parametrize("cache_tokens", [1, 64, 150])
async def test_a_cache_too_small_for_the_work_stays_correct(model: Path, cache_tokens: int) -> None:
    reference = builders.open_reference(model)
    shared = builders.prompt(2, 60)
    prefixes = [np.concatenate((shared[: 20 * (seed % 4)], builders.prompt(seed, 10 + seed))) for seed in range(24)]
    async with opened(model, cache_tokens=cache_tokens) as engine:
        completions = await asyncio.gather(*(engine.generate(p, greedy(15)) for p in prefixes * 2))
        counters = engine.counters
    assert counters.evicted > 0
    assert counters.cache_tokens <= cache_tokens
    for prefix, completion in zip(prefixes * 2, completions, strict=True):
        assert np.allclose(completion.logprobs, builders.logprobs(reference, prefix, completion.ids), atol=1e-4)


async def test_counters_add_up(endless: tuple[Path, Path]) -> None:
    async with opened(endless[0]) as engine:
        completions = await asyncio.gather(*(engine.generate(builders.prompt(s % 3, 40), SamplingParams(9)) for s in range(12)))
        counters = engine.counters
    assert counters.prefilled == sum(c.prefilled for c in completions)
    assert counters.cached == sum(c.cached for c in completions)
    assert counters.decoded == 12 * 9
    assert (counters.running, counters.waiting) == (0, 0)


async def test_cancelling_frees_the_row_at_once(endless: tuple[Path, Path]) -> None:
    async with opened(endless[0], max_running=2) as engine:
        short = asyncio.create_task(engine.generate(builders.prompt(0, 10), SamplingParams(max_tokens=5)))
        doomed = [asyncio.create_task(engine.generate(builders.prompt(seed, 10), SamplingParams(480))) for seed in range(1, 5)]
        await short
        for task in doomed:
            task.cancel()
        await asyncio.wait(doomed)
        await engine.generate(builders.prompt(9, 10), SamplingParams(max_tokens=5))
        assert (engine.counters.running, engine.counters.waiting) == (0, 0)
        assert engine.counters.decoded < 480


async def test_the_same_seed_draws_the_same_tokens(model: Path) -> None:
    drawn: list[list[int]] = []
    for _ in range(2):
        async with opened(model) as engine:
            drawn.append((await engine.generate(builders.prompt(3, 10), SamplingParams(max_tokens=30))).ids.tolist())
    assert drawn[0] == drawn[1]


async def test_a_seeded_completion_does_not_depend_on_other_requests(model: Path) -> None:
    """Bit for bit where it is computed alone and without a cache; see docs/reliability.md."""
    alone = {"max_running": 1, "cache_tokens": 0}
    asked = [(builders.prompt(s % 2, 10 + s), SamplingParams(max_tokens=12, seed=s)) for s in range(6)]
    async with opened(model, **alone) as engine:
        forth = await asyncio.gather(*(engine.generate(*one) for one in asked))
    async with opened(model, **alone, seed=99) as engine:
        await engine.generate(builders.prompt(0, 10), SamplingParams(max_tokens=7))
        back = await asyncio.gather(*(engine.generate(*one) for one in reversed(asked)))
    for one, other in zip(forth, reversed(back), strict=True):
        assert one.ids.tolist() == other.ids.tolist()
        assert one.logprobs.tolist() == other.logprobs.tolist()
    assert len({tuple(completion.ids.tolist()) for completion in forth}) == len(forth)


async def test_closing_fails_what_is_pending(endless: tuple[Path, Path]) -> None:
    engine = await EmbeddedEngine.from_directory(endless[0], max_running=2, max_context=512, cache_tokens=100, seed=0)
    pending = [asyncio.create_task(engine.generate(builders.prompt(seed, 10), SamplingParams(480))) for seed in range(4)]
    await engine.generate(builders.prompt(9, 10), SamplingParams(max_tokens=1))
    await engine.close_engine()
    assert all(isinstance(result, EngineError) for result in await asyncio.gather(*pending, return_exceptions=True))
    with pytest.raises(EngineError, match="closed"):
        await engine.generate([1], SamplingParams(max_tokens=1))


async def test_a_crash_inside_reaches_every_caller(endless: tuple[Path, Path]) -> None:
    async with opened(endless[0]) as engine:
        pending = [asyncio.create_task(engine.generate(builders.prompt(seed, 10), SamplingParams(480))) for seed in range(4)]
        await engine.generate(builders.prompt(9, 10), SamplingParams(max_tokens=5))
        engine._scheduler.model._blocks.append(None)  # pyright: ignore[reportArgumentType, reportPrivateUsage]
        results = await asyncio.gather(*pending, return_exceptions=True)
        assert all(isinstance(result, EngineError) for result in results)
        with pytest.raises(EngineError, match="failed"):
            await engine.check_health()
        with pytest.raises(EngineError, match="failed"):
            await engine.load_weights(engine.version, endless[1])


@pytest.mark.parametrize(
    ("missing", "says"),
    [("config.json", "no config.json"), ("model.safetensors", "safetensors"), ("tokenizer.json", "no tokenizer")],
)
async def test_an_incomplete_directory_is_refused_in_one_sentence(tmp_path: Path, missing: str, says: str) -> None:
    builders.save_model(tmp_path)
    (tmp_path / missing).unlink()
    with pytest.raises(ModelError, match=says) as caught:
        async with opened(tmp_path):
            pass
    assert str(tmp_path) in str(caught.value)


@pytest.mark.parametrize(
    ("key", "value", "says"),
    [
        ("model_type", "gpt2", "gpt2"),
        ("hidden_act", "gelu", "gelu"),
        ("layer_types", ["full_attention", "sliding_attention"], "sliding"),
        ("max_position_embeddings", 64, "lower the context"),
    ],
)
async def test_a_model_it_would_compute_wrongly_is_refused(tmp_path: Path, key: str, value: object, says: str) -> None:
    builders.save_model(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text(encoding="utf-8"))
    (tmp_path / "config.json").write_text(json.dumps({**config, key: value}), encoding="utf-8")
    with pytest.raises(ModelError, match=says):
        async with opened(tmp_path):
            pass
