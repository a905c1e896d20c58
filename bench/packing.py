"""Benchmark of tree packs: forward and backward pass of a step on trees, relative to their separate paths.

    python -m bench.packing [--repeats 3] [--threads 1] [--models 1m 30m]

Sides: *tree* is the computation of the trainer, `packing.pack` with `attention`. The paths are computed in the two usual
ways: *padded*, sorted by length, in rows of similar length by `scaled_dot_product_attention`; and *sequence-packed*, one
path after another in a row, without padding. Both compute the same loss with the same head. Each side is measured with
several budgets and reported with its fastest; the sides alternate, and the minimum of the repeats is reported.

``token_ratio`` is path tokens / distinct tokens, ``speedup`` the time of the fastest side with paths / the time with
trees, ``efficiency`` = speedup / token_ratio, and ``memory_ratio`` the peak of memory of a pass over all trees of the
case / that of a pass over their (sequence-packed) paths, each in a separate process. The last line is one JSON
object. With CUDA the model has the shape of Qwen2.5-1.5B, computes in bfloat16 and through FlexAttention.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from bench.pass_variants import SIZES, ModelSize, PackingCase, Pass
from bench.random_trees import SHAPES
from learner.trainer.packing.packing import Pack

PEAK_FLOPS = {"H100": 989e12, "H200": 989e12, "A100": 312e12}
"""Dense bfloat16, of the data sheets."""


def seconds(work: Pass, device: torch.device) -> float:
    began = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - began


def fastest(case: PackingCase, budgets: Sequence[int], repeats: int, device: torch.device) -> dict[str, tuple[float, int]]:
    """For each side its least seconds and the budget of these."""
    ways = {"tree": case.tree, "sequence": case.sequence, "padded": case.rows}
    works = {(name, budget): way(budget) for name, way in ways.items() for budget in budgets}
    if device.type == "cuda":
        for work in works.values():  # compiles
            work()
    best = dict.fromkeys(works, float("inf"))
    for _ in range(repeats):
        for key, work in works.items():
            best[key] = min(best[key], seconds(work, device))
            case.model.zero_grad()
    return {name: min((best[name, budget], budget) for budget in budgets) for name in ways}


def peak_bytes(size: str, shape: int, side: str, device: torch.device) -> int:
    """Memory that one pass over all trees of a case takes at most, beyond model and gradients; this process' own."""
    case = PackingCase(SIZES[size], SHAPES[shape], SIZES[size].groups[shape], device)
    case.tree(1024)()  # gradients and what a first pass leaves behind
    work = case.tree(1 << 30) if side == "tree" else case.sequence(1 << 30)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        work()
        return torch.cuda.max_memory_allocated() - before
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # the peak begins anew
    before = _status("VmRSS")
    work()
    return _status("VmHWM") - before


def _status(name: str) -> int:
    found = re.search(rf"{name}:\s+(\d+) kB", Path("/proc/self/status").read_text(encoding="ascii"))
    return 1024 * int(found[1]) if found else 0


def peak_of(size: str, shape: int, side: str, threads: int) -> int:
    """`peak_bytes` in a process of its own."""
    command = [sys.executable, "-m", "bench.packing", "--threads", str(threads), "--peak", size, str(shape), side]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return int(done.stdout.split()[-1])


def measure(name: str, shape: int, repeats: int, threads: int, device: torch.device) -> dict[str, Any]:
    size = SIZES[name]
    case = PackingCase(size, SHAPES[shape], size.groups[shape], device)
    best = fastest(case, size.budgets, repeats, device)
    tree, paths = best["tree"][0], min(best["sequence"][0], best["padded"][0])
    parameters = sum(p.numel() for p in case.model.parameters())
    found: dict[str, Any] = {
        "model": name,
        "parameters": parameters,
        "shape": SHAPES[shape].name,
        "path_tokens": case.whole_apart.tokens,
        "tokens": case.whole.tokens,
        "token_ratio": case.token_ratio,
        "action_token_ratio": len(case.whole_apart.targets.label_A) / len(case.whole.targets.label_A),
        "seconds": {side: round(time_, 4) for side, (time_, _) in best.items()},
        "budgets": {side: budget for side, (_, budget) in best.items()},
        "tokens_per_s": case.whole.tokens / tree,
        "speedup": paths / tree,
        "efficiency": paths / tree / case.token_ratio,
    }
    if device.type == "cuda":
        found["model_flops_per_s"] = _flops(size, case.whole, parameters) / tree
        peak = next((flops for name, flops in PEAK_FLOPS.items() if name in torch.cuda.get_device_name()), None)
        found["model_flops_utilisation"] = found["model_flops_per_s"] / peak if peak else None
    del case
    found["memory_ratio"] = peak_of(name, shape, "tree", threads) / peak_of(name, shape, "sequence", threads)
    return found


def _flops(size: ModelSize, whole: Pack, parameters: int) -> float:
    """Of forward and backward pass: 6 per weight and token, 12·h per layer and pair; the head only meets action tokens."""
    config = size.config
    head = config["vocab_size"] * config["hidden_size"]
    dense = (parameters - head) * whole.tokens + head * len(whole.targets.label_A)
    return 6 * dense + 12 * config["hidden_size"] * config["num_hidden_layers"] * whole.layout.pairs


def show(cases: Sequence[dict[str, Any]]) -> None:
    table = Table("model", "shape", "path tokens", "tokens", "token ratio", "tree s", "sequence s", "padded s", "speedup")
    table.add_column("efficiency")
    table.add_column("memory ratio")
    for one in cases:
        times = (f"{one['seconds'][side]:.2f} ({one['budgets'][side]})" for side in ("tree", "sequence", "padded"))
        ratios = (f"{one[key]:.2f}" for key in ("speedup", "efficiency", "memory_ratio"))
        table.add_row(
            one["model"], one["shape"], str(one["path_tokens"]), str(one["tokens"]), f"{one['token_ratio']:.2f}", *times, *ratios
        )
    Console(width=140).print(table)


def main() -> None:
    cuda = torch.cuda.is_available()
    parser = argparse.ArgumentParser(prog="python -m bench.packing")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--models", nargs="+", choices=SIZES, default=["1.5b"] if cuda else ["1m", "30m"])
    parser.add_argument("--peak", nargs=3, help=argparse.SUPPRESS)
    given = parser.parse_args()
    device = torch.device("cuda" if cuda else "cpu")
    torch.set_num_threads(given.threads)
    if given.peak:
        name, shape, side = given.peak
        print(peak_bytes(name, int(shape), side, device))
        return
    cases: list[dict[str, Any]] = []
    for name in given.models:
        for shape in range(len(SHAPES)):
            cases.append(measure(name, shape, given.repeats, given.threads, device))
            print(".", end="", file=sys.stderr, flush=True)
    show(cases)
    efficiencies = {name: min(one["efficiency"] for one in cases if one["model"] == name) for name in given.models}
    summary = {
        "machine": torch.cuda.get_device_name() if cuda else f"{platform.machine()}, {os.cpu_count()} cores",
        "threads": given.threads,
        "cases": cases,
        **{f"min_efficiency_{name}": value for name, value in efficiencies.items()},
        "min_speedup": min(one["speedup"] for one in cases),
        "max_memory_ratio": max(one["memory_ratio"] for one in cases),
    }
    print(json.dumps(summary))


if __name__ == "__main__":
    main()
