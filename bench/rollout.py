"""Benchmark of the embedded engine: speed relative to `model.generate`, and computed relative to unique tokens.

    python -m bench.rollout [--threads 1 2] [--repeats 7]

Speed: the same random Qwen2 of 3.7 M parameters in float32, 32 prompts of 16 tokens × 128 sampled tokens with their
log-probabilities, once with Hugging Face's generate and once with the engine, in turns; medians of the repeats.
Prefix reuse: trees grown by the sampler's own expander on an environment that answers each turn with about 40 tokens;
actions have 16 to 24 tokens. *Unique* counts each token of a group once, the prompt too; *computed* is prefilled plus
decoded. The last line is one JSON object; ``tokens_per_s`` and the like are those of the largest number of threads.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import logging
import os
import statistics
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from bench.synthetic import CONTEXT, QUESTIONS, SHAPES, TURNS, WORDS, GrowthCost, grow, label
from services.sampler.engines.base import SamplingParams
from services.sampler.engines.embedded import EmbeddedEngine
from treegrpo.core.step import TokenIds

REQUESTS, PROMPT, TOKENS = 32, 16, 128
CONFIG: dict[str, Any] = {
    "vocab_size": 2048,
    "hidden_size": 256,
    "intermediate_size": 768,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 2048,
    "tie_word_embeddings": True,
}


def save_model(path: Path, config: Mapping[str, Any] = CONFIG, seed: int = 0) -> int:
    """Write a random Qwen2 with a byte-level tokenizer that never ends a sequence; returns its parameters."""
    from tokenizers import Tokenizer as Bpe
    from tokenizers import decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(seed)
    model: Any = Qwen2ForCausalLM(Qwen2Config(**config))
    model.save_pretrained(path)
    bpe = Bpe(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    bpe.train_from_iterator(
        [" ".join(WORDS)] * 2, trainers.BpeTrainer(vocab_size=config["vocab_size"], initial_alphabet=alphabet)
    )
    PreTrainedTokenizerFast(tokenizer_object=bpe).save_pretrained(path)
    return sum(p.numel() for p in model.parameters())


async def open_engine(path: Path, threads: int) -> EmbeddedEngine:
    return await EmbeddedEngine.from_directory(
        path, max_running=REQUESTS, max_context=CONTEXT, cache_tokens=1 << 16, seed=0, threads=threads
    )


def prompts(seed: int) -> TokenIds:
    """[REQUESTS, PROMPT] random ids: nothing to share between requests."""
    return np.random.default_rng(seed).integers(0, CONFIG["vocab_size"], (REQUESTS, PROMPT)).astype(np.uint32)


@dataclass(frozen=True, slots=True)
class ProcessTimes:
    """Wall seconds, and CPU seconds of all threads of this process: the latter mind busy neighbours less."""

    wall: float
    cpu: float

    @classmethod
    def now(cls) -> ProcessTimes:
        return cls(time.perf_counter(), time.process_time())

    def __sub__(self, other: ProcessTimes) -> ProcessTimes:
        return ProcessTimes(self.wall - other.wall, self.cpu - other.cpu)


@torch.inference_mode()
def time_generate(model: Any, prompts: TokenIds) -> ProcessTimes:
    """What Hugging Face's generate takes, and one log-softmax over what it returns."""
    ids = torch.from_numpy(prompts.astype(np.int64))
    began = ProcessTimes.now()
    out = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=TOKENS,
        do_sample=True,
        top_k=0,
        top_p=1.0,
        output_logits=True,
        return_dict_in_generate=True,
        pad_token_id=0,
        eos_token_id=None,
    )
    logprobs = torch.log_softmax(torch.stack(out.logits, dim=1), -1).gather(-1, out.sequences[:, PROMPT:, None])
    assert logprobs.shape == (REQUESTS, TOKENS, 1)
    return ProcessTimes.now() - began


async def time_engine(engine: EmbeddedEngine, prompts: TokenIds) -> ProcessTimes:
    """What the same work takes on the engine."""
    began = ProcessTimes.now()
    completions = await asyncio.gather(*(engine.generate(prompt, SamplingParams(TOKENS)) for prompt in prompts))
    assert all(len(c.logprobs) == TOKENS for c in completions)
    return ProcessTimes.now() - began


@dataclass(frozen=True, slots=True)
class Speed:
    """Tokens sampled per second; the ratios are medians over pairs of neighbouring runs."""

    threads: int
    engine: float
    generate: float
    ratio: float
    cpu_ratio: float


async def measure_speed(path: Path, threads: int, repeats: int) -> Speed:
    """Engine and generate in turns, so that a noisy machine is noisy for both."""
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(threads)
    model: Any = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    pairs: list[tuple[ProcessTimes, ProcessTimes]] = []
    async with await open_engine(path, threads) as engine:
        for seed in range(repeats + 1):
            ours = await time_engine(engine, prompts(seed))
            theirs = await asyncio.to_thread(time_generate, model, prompts(seed))
            pairs.append((ours, theirs))
    del pairs[0]  # the first ones warm up
    work = REQUESTS * TOKENS
    return Speed(
        threads,
        engine=work / statistics.median(ours.wall for ours, _ in pairs),
        generate=work / statistics.median(theirs.wall for _, theirs in pairs),
        ratio=statistics.median(theirs.wall / ours.wall for ours, theirs in pairs),
        cpu_ratio=statistics.median(theirs.cpu / ours.cpu for ours, theirs in pairs),
    )


async def measure_reuse(path: Path, shape: tuple[int, int, int], threads: int) -> GrowthCost:
    """Grow groups of one shape on an engine that has cached nothing."""
    async with await open_engine(path, threads) as engine:
        return await grow(path, engine, shape)


def report(parameters: int, speeds: list[Speed], reuses: dict[str, GrowthCost]) -> None:
    console = Console(width=110)
    table = Table(
        title=f"{REQUESTS} requests × {TOKENS} tokens with log-probabilities, Qwen2 of {parameters / 1e6:.1f} M, float32"
    )
    for column in ("threads", "engine tokens/s", "generate tokens/s", "engine / generate", "in CPU time"):
        table.add_column(column, justify="right")
    for s in speeds:
        table.add_row(str(s.threads), f"{s.engine:.0f}", f"{s.generate:.0f}", f"{s.ratio:.2f}", f"{s.cpu_ratio:.2f}")
    console.print(table)
    table = Table(title=f"{QUESTIONS} groups of trees (M,N,L), {TURNS} turns of about 20 + 40 tokens and an answer")
    for column in ("shape", "prefilled", "cached", "decoded", "unique", "computed / unique", "decoded/s"):
        table.add_column(column, justify="right")
    for shape, r in reuses.items():
        counts = (r.cost.prefilled, r.cost.cached, r.cost.decoded, r.unique)
        table.add_row(shape, *map(str, counts), f"{r.computed_over_unique:.3f}", f"{r.rate:.0f}")
    console.print(table)
    best = speeds[-1]
    summary: dict[str, Any] = {
        "tokens_per_s": round(best.engine),
        "generate_tokens_per_s": round(best.generate),
        "speed_vs_generate": round(best.ratio, 3),
        "cpu_speed_vs_generate": round(best.cpu_ratio, 3),
        "computed_over_unique": {shape: round(r.computed_over_unique, 4) for shape, r in reuses.items()},
        "counts": {
            shape: {"prefilled": r.cost.prefilled, "cached": r.cost.cached, "decoded": r.cost.decoded, "unique": r.unique}
            for shape, r in reuses.items()
        },
        "speed_by_threads": {s.threads: round(s.ratio, 3) for s in speeds},
        "threads": best.threads,
        "parameters": parameters,
        "config": CONFIG,
    }
    print(json.dumps(summary))


async def run(threads: list[int], repeats: int) -> None:
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory)
        parameters = save_model(path)
        speeds = [await measure_speed(path, count, repeats) for count in threads]
        reuses = {label(shape): await measure_reuse(path, shape, threads[-1]) for shape in SHAPES}
    report(parameters, speeds, reuses)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.rollout", description="Speed and prefix reuse of the embedded engine.")
    parser.add_argument("--threads", type=int, nargs="+", default=sorted({1, os.cpu_count() or 1}))
    parser.add_argument("--repeats", type=int, default=7)
    options = parser.parse_args()
    logging.disable(logging.WARNING)
    asyncio.run(run(options.threads, options.repeats))


if __name__ == "__main__":
    main()
