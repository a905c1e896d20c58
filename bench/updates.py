"""Benchmark of weight updates of an SGLang server: from files in memory, as our engine does it, and from shared tensors.

published safetensors ─┬─► checked, copied to /dev/shm ─► pause ─► update from disk ──────────────────────► continue
                       └─► checked, copied likewise ──► pause ─► begin, update from tensor, end ────────► continue
                            while requests run           the server is stalled
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import io
import json
import logging
import math
import statistics
import tempfile
import time
from collections.abc import Iterable
from dataclasses import dataclass
from multiprocessing.reduction import ForkingPickler
from pathlib import Path
from typing import Any

import httpx
import torch
import torch.multiprocessing
from rich.console import Console
from rich.table import Table

from bench.rollout import save_model
from services.sampler.engines.checkpoint import read_tensors, read_weight_shapes
from services.sampler.engines.sglang import EngineRequirements, ListenOptions, SGLangEngine, open_child
from treegrpo.core.step import PolicyVersion

CONTEXT = 256
MAX_RUNNING = 4
_COMMON = {"num_key_value_heads": 2, "max_position_embeddings": 1024, "tie_word_embeddings": True}
MODELS: dict[str, dict[str, Any]] = {
    "geohop": {
        **_COMMON,
        "vocab_size": 1024,
        "hidden_size": 128,
        "intermediate_size": 384,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
    },
    "100m": {
        **_COMMON,
        "vocab_size": 24576,
        "hidden_size": 768,
        "intermediate_size": 2304,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
    },
}
TOLERANCE = 1e-5
"""Log-probabilities of the same weights may differ by this much."""


@dataclass(frozen=True, slots=True)
class UpdateSeconds:
    """Seconds of one update."""

    prepare: float
    """Before the pause, while requests run."""
    stall: float
    """From the pause to the end of the pause."""


@dataclass(frozen=True, slots=True)
class UpdateComparison:
    """One model, medians over the updates."""

    parameters: int
    disk: UpdateSeconds
    tensor: UpdateSeconds
    disk_over_tensor: float
    """Median of the ratios of neighbouring updates' stalls; above 1, tensors are faster."""


async def from_disk(engine: SGLangEngine, published: Path, version: PolicyVersion) -> UpdateSeconds:
    """An update as `SGLangEngine.load_weights` makes it."""
    server, began = engine.servers[0], time.perf_counter()
    staged = await asyncio.to_thread(engine.staging.stage_weights, version, published)
    prepare, before = time.perf_counter() - began, server.stalled
    await server.swap_weights(staged)
    await asyncio.to_thread(engine.staging.remove_version, staged)
    return UpdateSeconds(prepare, server.stalled - before)


async def from_tensor(engine: SGLangEngine, client: httpx.AsyncClient, published: Path, version: PolicyVersion) -> UpdateSeconds:
    """The same update with tensors that this process shares with the server."""
    server, began = engine.servers[0], time.perf_counter()
    tensors = await asyncio.to_thread(_shared, published)  # they must live until the server has read them
    body = {
        "serialized_named_tensors": [_serialized(tensors)],
        "weight_version": str(version),
        "flush_cache": True,
        "abort_all_requests": False,
    }
    prepare, began = time.perf_counter() - began, time.perf_counter()
    server.swapping = True  # its supervision leaves it alone
    await server.client.pause_generation()
    await _post(client, "/begin_weight_update", {})
    await _post(client, "/update_weights_from_tensor", body)
    await _post(client, "/end_weight_update", {})
    await server.client.resume_generation()
    server.swapping = False
    return UpdateSeconds(prepare, time.perf_counter() - began)


def _shared(published: Path) -> list[tuple[str, torch.Tensor]]:
    """The checked tensors in one piece of shared memory; many pieces cost more, since the server opens each by its name."""
    shapes = read_weight_shapes(published, tied=True)
    memory, start = torch.empty(sum(map(math.prod, shapes.values()))).share_memory_(), 0
    tensors: list[tuple[str, torch.Tensor]] = []
    for name, tensor in read_tensors(published, shapes, tied=True):
        end = start + tensor.numel()
        tensors.append((name, memory[start:end].view(tensor.shape).copy_(tensor)))
        start = end
    return tensors


def _serialized(tensors: list[tuple[str, torch.Tensor]]) -> str:
    """Where the tensors are, as SGLang's MultiprocessingSerializer writes it."""
    written = io.BytesIO()
    ForkingPickler(written).dump(tensors)
    return base64.b64encode(written.getvalue()).decode()


async def _post(client: httpx.AsyncClient, path: str, body: dict[str, Any]) -> None:
    answer = (await client.post(path, json=body)).raise_for_status().json()
    assert answer["success"] is True, answer


async def answer(engine: SGLangEngine) -> list[float]:
    """Log-probabilities that tell one set of weights from the other."""
    sampling = {"max_new_tokens": 8, "temperature": 0.0, "ignore_eos": True}
    body: dict[str, Any] = {"input_ids": list(range(16)), "return_logprob": True, "sampling_params": sampling}
    return list((await engine.servers[0].client.generate(body)).logprobs)


async def alternate(engine: SGLangEngine, published: list[Path], updates: int) -> tuple[list[UpdateSeconds], list[UpdateSeconds]]:
    """Both ways in turns; each brings other weights than the last, and what is served must show it."""
    versions = (PolicyVersion(0, step) for step in range(1, 1 << 20))
    first, second = published
    by_disk: list[UpdateSeconds] = []
    by_tensor: list[UpdateSeconds] = []
    async with httpx.AsyncClient(base_url=engine.servers[0].client.url, timeout=300.0, trust_env=False) as client:
        await from_disk(engine, second, next(versions))
        expected = await answer(engine)
        for _ in range(updates + 1):
            by_disk.append(await from_disk(engine, first, next(versions)))
            assert not _same(await answer(engine), expected)
            by_tensor.append(await from_tensor(engine, client, second, next(versions)))
            assert _same(await answer(engine), expected)
    return by_disk[1:], by_tensor[1:]  # the first warms up


def _same(a: list[float], b: list[float]) -> bool:
    return max(abs(x - y) for x, y in zip(a, b, strict=True)) < TOLERANCE


async def compare(python: Path, config: dict[str, Any], updates: int) -> UpdateComparison:
    """Measure one model on a server of its own."""
    with tempfile.TemporaryDirectory() as directory:
        published = [Path(directory) / str(seed) for seed in (0, 1)]
        parameters, _ = (save_model(path, config, seed) for seed, path in enumerate(published))
        requirements = EngineRequirements(published[0], PolicyVersion(), CONTEXT, MAX_RUNNING, Path("/dev/shm"))
        listen = ListenOptions("127.0.0.1", 0, Path(directory) / "sglang.log")
        flags = ("--log-level", "warning")
        async with await open_child(
            requirements, listen, python, flags, dtype="float32", cache_tokens=1024, threads=1, seed=0
        ) as engine:
            by_disk, by_tensor = await alternate(engine, published, updates)
    ratios = [disk.stall / tensor.stall for disk, tensor in zip(by_disk, by_tensor, strict=True)]
    return UpdateComparison(parameters, _median(by_disk), _median(by_tensor), statistics.median(ratios))


def _median(took: Iterable[UpdateSeconds]) -> UpdateSeconds:
    took = list(took)
    return UpdateSeconds(statistics.median(one.prepare for one in took), statistics.median(one.stall for one in took))


def report(compared: dict[str, UpdateComparison], updates: int) -> None:
    table = Table(title=f"One weight update, float32, in ms, medians of {updates}")
    for column in (
        "model",
        "parameters, M",
        "disk: beside",
        "disk: stall",
        "tensor: beside",
        "tensor: stall",
        "stall, disk / tensor",
    ):
        table.add_column(column, justify="right")
    for name, one in compared.items():
        seconds = (one.disk.prepare, one.disk.stall, one.tensor.prepare, one.tensor.stall)
        table.add_row(
            name, f"{one.parameters / 1e6:.1f}", *(f"{1000 * each:.1f}" for each in seconds), f"{one.disk_over_tensor:.2f}"
        )
    Console(width=120).print(table)
    summary = {
        name: {
            "parameters": one.parameters,
            "disk_beside_s": round(one.disk.prepare, 4),
            "disk_stall_s": round(one.disk.stall, 4),
            "tensor_beside_s": round(one.tensor.prepare, 4),
            "tensor_stall_s": round(one.tensor.stall, 4),
            "stall_disk_over_tensor": round(one.disk_over_tensor, 3),
        }
        for name, one in compared.items()
    }
    print(json.dumps({**summary, "updates": updates}))


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.updates", description="Weight updates of SGLang, two ways.")
    parser.add_argument("--python", type=Path, default=Path(".venv-sglang/bin/python"), help="of the environment with SGLang")
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--updates", type=int, default=15)
    options = parser.parse_args()
    logging.disable(logging.WARNING)
    # To take over an open descriptor the server would have to know this process's key; it dies of trying. A name it can open.
    torch.multiprocessing.set_sharing_strategy("file_system")
    compared = {name: asyncio.run(compare(options.python, MODELS[name], options.updates)) for name in options.models}
    report(compared, options.updates)


if __name__ == "__main__":
    main()
