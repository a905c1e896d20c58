"""Conformance suite of engines. A test module imports these tests and provides the fixture ``open_engine``.

``open_engine(path)`` is an async context manager that yields an `Engine` on the model directory ``path``, at policy
version 0.0, with a context of 512 tokens and room for at least eight running requests.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager
from pathlib import Path

import numpy as np
import pytest
from safetensors.torch import load_file, save_file

from services.sampler.engines.base import Completion, Engine, SamplingParams
from services.sampler.text.tokenizer import Tokenizer
from tests.engines import builders
from treegrpo.core.step import PolicyVersion, TokenIds, VersionSpan
from treegrpo.errors import EngineError, WeightsError

EngineFactory = Callable[[Path], AbstractAsyncContextManager[Engine]]
FIRST, SECOND = PolicyVersion(0, 0), PolicyVersion(0, 1)
TOLERANCE = 1e-4


def greedy(tokens: int) -> SamplingParams:
    return SamplingParams(max_tokens=tokens, temperature=0.0)


@pytest.fixture(scope="module", params=builders.KINDS)
def each_model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return builders.save_model(tmp_path_factory.mktemp(request.param), request.param, seed=1)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return builders.save_model(tmp_path_factory.mktemp("model"), "qwen2", seed=2)


@pytest.fixture(scope="module")
def next_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Other weights for ``model``."""
    return builders.save_model(tmp_path_factory.mktemp("next"), "qwen2", seed=3)


@pytest.fixture(scope="module")
def endless(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return builders.save_endless(tmp_path_factory.mktemp("endless"))


async def test_greedy_tokens_equal_a_plain_hugging_face_loop(open_engine: EngineFactory, each_model: Path) -> None:
    reference = builders.open_reference(each_model)
    end = next(iter(Tokenizer.open(each_model).eos))
    async with open_engine(each_model) as engine:
        for seed, length in enumerate((1, 7, 60, 300)):
            prefix = builders.prompt(seed, length)
            completion = await engine.generate(prefix, greedy(24))
            assert completion.ids.tolist() == builders.greedy(reference, prefix, 24, end)
            assert np.allclose(completion.logprobs, builders.logprobs(reference, prefix, completion.ids), atol=TOLERANCE)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
async def test_logprobs_are_those_of_the_distribution_sampled_from(
    open_engine: EngineFactory, each_model: Path, temperature: float
) -> None:
    reference = builders.open_reference(each_model)
    prefix = builders.prompt(5, 20)
    async with open_engine(each_model) as engine:
        sampling = SamplingParams(max_tokens=30, temperature=temperature)
        completions = await asyncio.gather(*(engine.generate(prefix, sampling) for _ in range(8)))
    assert len({tuple(c.ids.tolist()) for c in completions}) > 1
    for c in completions:
        assert (c.ids.dtype, c.logprobs.dtype) == (np.uint32, np.float32)
        assert np.allclose(c.logprobs, builders.logprobs(reference, prefix, c.ids, temperature), atol=TOLERANCE)


async def test_tokens_are_drawn_as_often_as_the_softmax_says(open_engine: EngineFactory, model: Path) -> None:
    prefix = builders.prompt(6, 12)
    async with open_engine(model) as engine:
        drawn = await asyncio.gather(*(engine.generate(prefix, SamplingParams(max_tokens=1)) for _ in range(1500)))
    counts = np.bincount([int(c.ids[0]) for c in drawn], minlength=builders.VOCABULARY)
    expected = builders.next_probabilities(builders.open_reference(model), prefix)
    # Standard error of a share is at most 0.013 here; 0.07 is five of them.
    assert np.abs(counts / 1500 - expected).max() < 0.07


async def test_a_cached_prefix_is_reused_and_changes_nothing(open_engine: EngineFactory, each_model: Path) -> None:
    reference = builders.open_reference(each_model)
    end = next(iter(Tokenizer.open(each_model).eos))
    async with open_engine(each_model) as engine:
        prefix = builders.prompt(7, 100)
        first = await engine.generate(prefix, greedy(20))
        assert (first.prefilled, first.cached) == (100, 0)
        # The last sampled token was never an input, so it is computed with the observation.
        longer = np.concatenate((prefix, first.ids, builders.prompt(8, 30)))
        second = await engine.generate(longer, greedy(20))
        forked = np.concatenate((longer[:60], builders.prompt(9, 10)))
        third = await engine.generate(forked, greedy(20))
    assert (second.prefilled, second.cached) == (31, len(longer) - 31)
    assert (third.prefilled, third.cached) == (10, 60)
    for whole, completion in ((longer, second), (forked, third)):
        assert completion.ids.tolist() == builders.greedy(reference, whole, 20, end)
        assert np.allclose(completion.logprobs, builders.logprobs(reference, whole, completion.ids), atol=TOLERANCE)


async def test_siblings_that_start_together_prefill_their_prompt_once(open_engine: EngineFactory, model: Path) -> None:
    prefix = builders.prompt(10, 200)
    async with open_engine(model) as engine:
        completions = await asyncio.gather(*(engine.generate(prefix, SamplingParams(max_tokens=5)) for _ in range(8)))
    assert sum(c.prefilled for c in completions) <= 200 + 7
    assert all(c.prefilled + c.cached == 200 for c in completions)


async def test_stop_strings_cut_at_the_token_that_completes_them(open_engine: EngineFactory, endless: tuple[Path, Path]) -> None:
    tokenizer = Tokenizer.open(endless[0])
    prefix = builders.prompt(11, 10)
    async with open_engine(endless[0]) as engine:
        free = await engine.generate(prefix, greedy(40))
        for stop in builders.stop_strings_in(tokenizer, free.ids):
            cut = await engine.generate(prefix, SamplingParams(40, 0.0, ("never said", stop)))
            assert cut.finish == "stop"
            assert cut.ids.tolist() == builders.until(tokenizer, free.ids, stop)
            assert stop in tokenizer.decode(cut.ids)
            assert stop not in tokenizer.decode(cut.ids[:-1])


async def test_a_stop_string_in_the_prefix_does_not_stop(open_engine: EngineFactory, endless: tuple[Path, Path]) -> None:
    tokenizer = Tokenizer.open(endless[0])
    prefix = np.concatenate((builders.prompt(12, 5), tokenizer.encode("</search></sear")))
    async with open_engine(endless[0]) as engine:
        completion = await engine.generate(prefix, SamplingParams(10, 1.0, ("</search>",)))
    assert completion.finish == "length"
    assert len(completion.ids) == 10


async def test_the_end_of_sequence_token_is_kept(open_engine: EngineFactory, tmp_path: Path) -> None:
    prefix = builders.prompt(13, 10)
    builders.save_model(tmp_path, "qwen2", seed=4)
    free = builders.greedy(builders.open_reference(tmp_path), prefix, 6)
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [287, free[4]]}), encoding="utf-8")
    async with open_engine(tmp_path) as engine:
        completion = await engine.generate(prefix, greedy(20))
    assert completion.finish == "stop"
    assert completion.ids.tolist() == free[: free.index(free[4]) + 1]
    assert len(completion.logprobs) == len(completion.ids)


async def test_a_full_context_ends_with_length(open_engine: EngineFactory, endless: tuple[Path, Path]) -> None:
    async with open_engine(endless[0]) as engine:
        completion = await engine.generate(builders.prompt(14, engine.context - 5), SamplingParams(max_tokens=50))
        assert (len(completion.ids), completion.finish) == (5, "length")
        with pytest.raises(EngineError, match="context"):
            await engine.generate(builders.prompt(14, engine.context), SamplingParams(max_tokens=1))


async def test_forty_requests_at_once_equal_one_by_one(open_engine: EngineFactory, model: Path) -> None:
    shared = builders.prompt(15, 40)
    prefixes = [np.concatenate((shared[: 3 * seed % 41], builders.prompt(seed, 1 + 7 * seed % 90))) for seed in range(40)]
    lengths = [1 + 5 * seed % 33 for seed in range(40)]
    async with open_engine(model) as engine:
        alone = [await engine.generate(p, greedy(n)) for p, n in zip(prefixes, lengths, strict=True)]
    async with open_engine(model) as engine:
        together = await asyncio.gather(*(engine.generate(p, greedy(n)) for p, n in zip(prefixes, lengths, strict=True)))
    for one, other in zip(alone, together, strict=True):
        assert one.ids.tolist() == other.ids.tolist()
        assert np.allclose(one.logprobs, other.logprobs, atol=TOLERANCE)


async def test_a_swap_under_load_serves_nothing_of_the_old_version(
    open_engine: EngineFactory, endless: tuple[Path, Path]
) -> None:
    references = {FIRST: builders.open_reference(endless[0]), SECOND: builders.open_reference(endless[1])}
    shared = builders.prompt(16, 50)
    prefixes = [np.concatenate((shared, builders.prompt(seed, seed))) for seed in range(1, 7)]
    async with open_engine(endless[0]) as engine:
        running = [asyncio.create_task(engine.generate(p, SamplingParams(max_tokens=400))) for p in prefixes]
        # When this one is done, the others have been sampling beside it.
        await engine.generate(shared, SamplingParams(max_tokens=64))
        await engine.load_weights(SECOND, endless[1])
        assert engine.version == SECOND
        later = [await engine.generate(p, SamplingParams(max_tokens=30)) for p in prefixes]
        swapped = await asyncio.gather(*running)
    for prefix, c in zip(prefixes, swapped, strict=True):
        assert [span.version for span in c.spans] == [FIRST, SECOND]
        assert len(c.ids) == 400
        assert c.prefilled + c.cached > len(prefix)
        check_spans(prefix, c, references)
    for prefix, c in zip(prefixes, later, strict=True):
        assert c.spans == (VersionSpan(SECOND, 0, len(c.ids)),)
        check_spans(prefix, c, references)


def check_spans(prefix: TokenIds, c: Completion, references: dict[PolicyVersion, object]) -> None:
    """Spans tile the completion, and each token has the log-probability that its own version's weights give it."""
    assert [span.start for span in c.spans] == [0, *(span.end for span in c.spans[:-1])]
    assert c.spans[-1].end == len(c.ids)
    for span in c.spans:
        expected = builders.logprobs(references[span.version], prefix, c.ids)
        assert np.allclose(c.logprobs[span.start : span.end], expected[span.start : span.end], atol=TOLERANCE)


async def test_a_cache_filled_before_a_swap_is_not_used_after_it(
    open_engine: EngineFactory, model: Path, next_model: Path
) -> None:
    prefix = builders.prompt(17, 80)
    async with open_engine(model) as engine:
        await engine.generate(prefix, greedy(10))
        await engine.load_weights(SECOND, next_model)
        fresh = await engine.generate(prefix, greedy(10))
        again = await engine.generate(prefix, greedy(10))
    assert (fresh.prefilled, fresh.cached) == (80, 0)
    assert again.cached == 79
    expected = builders.logprobs(builders.open_reference(next_model), prefix, fresh.ids)
    assert np.allclose(fresh.logprobs, expected, atol=TOLERANCE)
    assert np.allclose(again.logprobs, expected, atol=TOLERANCE)


@pytest.mark.parametrize("damage", ["missing tensor", "other shape", "not finite", "torn file", "no file"])
async def test_refused_weights_leave_the_old_version_serving(
    open_engine: EngineFactory, model: Path, next_model: Path, tmp_path: Path, damage: str
) -> None:
    spoil(next_model, tmp_path, damage)
    prefix = builders.prompt(18, 20)
    async with open_engine(model) as engine:
        before = await engine.generate(prefix, greedy(10))
        with pytest.raises(WeightsError, match=str(tmp_path)):
            await engine.load_weights(SECOND, tmp_path)
        assert engine.version == FIRST
        after = await engine.generate(prefix, greedy(10))
        await engine.check_health()
    assert after.ids.tolist() == before.ids.tolist()
    assert after.spans == (VersionSpan(FIRST, 0, len(after.ids)),)


def spoil(source: Path, target: Path, damage: str) -> None:
    weights = load_file(source / "model.safetensors")
    norm = weights["model.norm.weight"]
    if damage == "missing tensor":
        del weights["model.norm.weight"]
    elif damage == "other shape":
        weights["model.norm.weight"] = norm[:-1]
    elif damage == "not finite":
        norm[3] = float("nan")
    if damage != "no file":
        save_file(weights, target / "model.safetensors")
    if damage == "torn file":
        content = (target / "model.safetensors").read_bytes()
        (target / "model.safetensors").write_bytes(content[: len(content) // 2])


async def test_a_cancelled_request_leaves_room_for_others(open_engine: EngineFactory, endless: tuple[Path, Path]) -> None:
    async with open_engine(endless[0]) as engine:
        short = asyncio.create_task(engine.generate(builders.prompt(98, 10), SamplingParams(max_tokens=5)))
        doomed = [asyncio.create_task(engine.generate(builders.prompt(seed, 10), SamplingParams(480))) for seed in range(60)]
        await short
        for task in doomed:
            task.cancel()
        done = await asyncio.wait_for(engine.generate(builders.prompt(99, 10), SamplingParams(max_tokens=5)), 30)
        assert len(done.ids) == 5
        assert all(isinstance(r, asyncio.CancelledError) for r in await asyncio.gather(*doomed, return_exceptions=True))


async def test_requests_that_cannot_be_run_are_refused(open_engine: EngineFactory, model: Path) -> None:
    async with open_engine(model) as engine:
        for prefix in ([], [builders.VOCABULARY], [5, 100000]):
            with pytest.raises(EngineError, match="prefix"):
                await engine.generate(prefix, SamplingParams(max_tokens=5))
        for sampling in (SamplingParams(max_tokens=0), SamplingParams(1, -1.0), SamplingParams(1, 1.0, ("",))):
            with pytest.raises(EngineError, match="out of range"):
                await engine.generate([5], sampling)
        await engine.check_health()
