"""Benchmark of engines: the same trees on the embedded engine, on SGLang through the sampler, and on SGLang by a bare client.

sampler grows trees ─► every request is recorded ─► repeated with the same dependencies by a bare client

A turn depends on the turn before it, and the branches of a round depend on the nodes of all rounds before it, from which they
are drawn. The bare client waits for these too.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import logging
import statistics
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import httpx
import numpy as np
from rich.console import Console
from rich.table import Table

from bench.rollout import save_model
from bench.synthetic import CONTEXT, QUESTIONS, SHAPES, EngineWrapper, GrowthCost, grow, label, plan_of
from services.sampler.engines.base import Completion, Engine, SamplingParams
from services.sampler.engines.embedded import EmbeddedEngine
from services.sampler.engines.sglang import EngineRequirements, ListenOptions, SGLangEngine, open_child
from services.sampler.engines.sglang.server.http_client import IDLE_SECONDS
from services.sampler.expansion.branch import action_seed, first_node
from treegrpo.core.step import PolicyVersion, TokenIds

MAX_RUNNING = 64
CACHE_TOKENS = 1 << 16
LOAD_TOKENS = 400
UPDATES = 5


@dataclass(eq=False)
class RecordedRequest:
    """One request, and those whose answers led to it."""

    prefix: TokenIds
    tokens: int
    after: list[RecordedRequest]
    done: asyncio.Event = field(default_factory=asyncio.Event)


class RecordingEngine(EngineWrapper):
    """An engine that samples greedily, so that a replay gives the same tokens, and that records its requests."""

    def __init__(self, engine: Engine, shape: tuple[int, int, int]) -> None:
        super().__init__(engine)
        self._plan = plan_of(shape)
        self._places = {
            action_seed(question, tree, node): (question, tree, node)
            for question in range(QUESTIONS)
            for tree in range(self._plan.trees)
            for node in range(1, first_node(self._plan.branches, self._plan))
        }
        self._asked: dict[tuple[int, int, int], RecordedRequest] = {}
        """By question, tree and node, in the order in which they were answered."""

    @property
    def requests(self) -> list[RecordedRequest]:
        return list(self._asked.values())

    async def generate(self, prefix: Sequence[int] | TokenIds, sampling: SamplingParams) -> Completion:
        ids = np.asarray(prefix, np.uint32)
        completion = await self._engine.generate(ids, replace(sampling, temperature=0.0))
        assert sampling.seed is not None
        place = self._places[sampling.seed]
        self._asked[place] = RecordedRequest(ids, sampling.max_tokens, self._causes(*place))
        return completion

    def _causes(self, question: int, tree: int, node: int) -> list[RecordedRequest]:
        """The turn before; of a branch's first turn, all that the rounds before have made of its tree."""
        index, turn = divmod(node - 1, first_node(1, self._plan) - 1)
        if turn:
            return [self._asked[question, tree, node - 1]]
        begun = 1 + (index - 1) // self._plan.expansions * self._plan.expansions if index else 0
        known = range(1, first_node(begun, self._plan))
        return [self._asked[question, tree, other] for other in known if (question, tree, other) in self._asked]


async def replay(url: str, requests: list[RecordedRequest]) -> float:
    """Make the same requests to the server alone, each as soon as those that led to it are answered; tokens per second."""
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=None, keepalive_expiry=IDLE_SECONDS)
    async with httpx.AsyncClient(timeout=600.0, trust_env=False, limits=limits) as client:
        (await client.post(f"{url}/flush_cache")).raise_for_status()

        async def one(request: RecordedRequest) -> int:
            for cause in request.after:
                await cause.done.wait()
            body = {
                "input_ids": request.prefix.tolist(),
                "return_logprob": True,
                "sampling_params": {"max_new_tokens": request.tokens, "temperature": 0.0, "ignore_eos": True},
            }
            answer = (await client.post(f"{url}/generate", json=body)).raise_for_status().json()
            request.done.set()
            return len(answer["output_ids"])

        began = time.perf_counter()
        decoded = sum(await asyncio.gather(*(one(request) for request in requests)))
        return decoded / (time.perf_counter() - began)


@dataclass(frozen=True, slots=True)
class EngineComparison:
    """One shape, medians over the repeats."""

    shape: str
    embedded: float
    sampler: float
    raw: float
    sampler_over_raw: float
    computed_over_unique: dict[str, float]


async def compare(
    path: Path, embedded: EmbeddedEngine, sglang: SGLangEngine, shape: tuple[int, int, int], repeats: int
) -> EngineComparison:
    """All three in turns, so that a noisy machine is noisy for all; the first turn warms up."""
    turns: list[tuple[GrowthCost, GrowthCost, float]] = []
    for _ in range(repeats + 1):
        for engine in (embedded, sglang):  # new weights empty the cache
            await engine.load_weights(_after(engine.version), path)
        ours, recording = await grow(path, RecordingEngine(embedded, shape), shape), RecordingEngine(sglang, shape)
        theirs = await grow(path, recording, shape)
        turns.append((ours, theirs, await replay(sglang.servers[0].client.url, recording.requests)))
    del turns[0]
    return EngineComparison(
        label(shape),
        embedded=statistics.median(ours.rate for ours, _, _ in turns),
        sampler=statistics.median(theirs.rate for _, theirs, _ in turns),
        raw=statistics.median(raw for _, _, raw in turns),
        sampler_over_raw=statistics.median(theirs.rate / raw for _, theirs, raw in turns),
        computed_over_unique={
            "embedded": statistics.median(ours.computed_over_unique for ours, _, _ in turns),
            "sglang": statistics.median(theirs.computed_over_unique for _, theirs, _ in turns),
        },
    )


async def stall(path: Path, engine: SGLangEngine) -> float:
    """Seconds that the server stands still for one weight update while 32 requests run: the median."""
    stalls: list[float] = []
    prefixes = np.random.default_rng(0).integers(0, 2048, (32, 16)).astype(np.uint32)
    running = [asyncio.create_task(engine.generate(prefix, SamplingParams(LOAD_TOKENS))) for prefix in prefixes]
    await engine.generate(prefixes[0], SamplingParams(8))
    for _ in range(UPDATES):
        before = engine.counters.stalled
        await engine.load_weights(_after(engine.version), path)
        stalls.append(engine.counters.stalled - before)
        await engine.generate(prefixes[0], SamplingParams(8))
    await asyncio.gather(*running)
    return statistics.median(stalls)


def _after(version: PolicyVersion) -> PolicyVersion:
    return PolicyVersion(version.lineage, version.step + 1)


def report(compared: list[EngineComparison], stalled: float, parameters: int, repeats: int) -> None:
    console = Console(width=120)
    table = Table(
        title=f"{QUESTIONS} groups of trees (M,N,L), Qwen2 of {parameters / 1e6:.1f} M, float32: tokens sampled per second"
    )
    for column in ("shape", "embedded", "SGLang through the sampler", "SGLang alone", "sampler / alone", "computed / unique"):
        table.add_column(column, justify="right")
    for one in compared:
        computed = ", ".join(f"{name} {value:.3f}" for name, value in one.computed_over_unique.items())
        table.add_row(
            one.shape, f"{one.embedded:.0f}", f"{one.sampler:.0f}", f"{one.raw:.0f}", f"{one.sampler_over_raw:.3f}", computed
        )
    console.print(table)
    console.print(f"stall of a weight update under load: {1000 * stalled:.1f} ms")
    summary: dict[str, Any] = {
        "sampler_over_raw": {one.shape: round(one.sampler_over_raw, 4) for one in compared},
        "computed_over_unique": {
            one.shape: {name: round(value, 4) for name, value in one.computed_over_unique.items()} for one in compared
        },
        "tokens_per_s": {
            one.shape: {"embedded": round(one.embedded), "sampler": round(one.sampler), "raw": round(one.raw)} for one in compared
        },
        "stall_s_per_update": round(stalled, 4),
        "repeats": repeats,
        "parameters": parameters,
    }
    print(json.dumps(summary))


async def run(python: Path, repeats: int) -> None:
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "model"
        parameters = save_model(path)
        requirements = EngineRequirements(path, PolicyVersion(), CONTEXT, MAX_RUNNING, Path("/dev/shm"))
        shape: dict[str, Any] = {"cache_tokens": CACHE_TOKENS, "threads": 1, "seed": 0}
        listen = ListenOptions("127.0.0.1", 0, Path(directory) / "sglang.log")
        embedded = await EmbeddedEngine.from_directory(path, max_running=MAX_RUNNING, max_context=CONTEXT, **shape)
        async with (
            embedded,
            await open_child(requirements, listen, python, ("--log-level", "warning"), dtype="float32", **shape) as sglang,
        ):
            compared = [await compare(path, embedded, sglang, one, repeats) for one in SHAPES]
            stalled = await stall(path, sglang)
    report(compared, stalled, parameters, repeats)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.engines", description="The same trees on each engine.")
    parser.add_argument("--python", type=Path, default=Path(".venv-sglang/bin/python"), help="of the environment with SGLang")
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    logging.disable(logging.WARNING)
    asyncio.run(run(options.python, options.repeats))


if __name__ == "__main__":
    main()
