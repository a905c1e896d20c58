"""Learning from trees against learning from their paths: forward and backward pass of a step, in one run.

    python -m bench.packing [--repeats 3] [--threads 1] [--models 1m 30m]

Sides: *tree* is the trainer's own way, `packing.pack` with `attention`. The paths are computed in the two ways that
trainers have: *padded*, sorted by length, in rows of like length through `scaled_dot_product_attention`; and *sequence-
packed*, without padding, one after the other in a row. Both compute the same loss by the same head. Every side has its
choice of budgets and counts with its fastest; all take turns, and the minimum of the repeats counts.

``token_ratio`` is path tokens over distinct tokens, ``speedup`` the time of the fastest way with paths over that with
trees, ``efficiency`` = speedup / token_ratio, and ``memory_ratio`` the peak of memory that a pass over all of the
case's trees takes with trees, over the same with (sequence-packed) paths, each in a process of its own. The last line is one JSON
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
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from transformers import PreTrainedModel, Qwen2Config, Qwen2ForCausalLM

from bench.growing import SHAPES, Grower, Shape, apart, credited
from learner.trainer import attention
from learner.trainer.loss import policy_loss
from learner.trainer.model import score, score_hidden
from learner.trainer.packing import Pack, pack
from treegrpo.config import Dtype, TrainConfig

TRAIN = TrainConfig()


@dataclass(frozen=True, slots=True)
class Size:
    """A Qwen2 and how much it gets to do."""

    config: dict[str, int]
    groups: tuple[int, ...]
    """For each of `SHAPES`."""
    budgets: tuple[int, ...]
    """Tokens of a pass: tree packs, sequence packs and padded blocks take their choice."""
    dtype: Dtype = "float32"


def _qwen(vocabulary: int, hidden: int, inner: int, layers: int, heads: int, kv: int) -> dict[str, int]:
    return {
        "vocab_size": vocabulary,
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv,
    }


SIZES = {
    "1m": Size(_qwen(1024, 128, 384, 5, 4, 2), (8, 2, 2), (1024, 2048, 4096)),
    "30m": Size(_qwen(4096, 512, 1408, 10, 8, 2), (3, 1, 1), (1024, 2048, 4096)),
    "1.5b": Size(_qwen(151936, 1536, 8960, 28, 12, 2), (24, 8, 8), (8192, 16384, 32768), "bfloat16"),
}


def build(size: Size, device: torch.device) -> PreTrainedModel:
    torch.manual_seed(0)
    config = Qwen2Config(**cast("Any", size.config), tie_word_embeddings=True, max_position_embeddings=32768)
    with device:
        return cast("PreTrainedModel", cast("Any", Qwen2ForCausalLM(config)).eval())


@dataclass(frozen=True, slots=True)
class Block:
    """Paths as rows, padded right."""

    ids_RS: Tensor
    predictor_A: Tensor
    """Index into the flattened rows."""
    paths: Pack
    """The same paths one after the other, for what is predicted and learned."""


def padded(paths: Pack, device: torch.device) -> Block:
    """The runs of a sequence pack as rows."""
    width = max(b - a for a, b in paths.layout.runs)
    ids_RS = torch.zeros(len(paths.layout.runs), width, dtype=torch.int64)
    place_T = torch.zeros(paths.tokens, dtype=torch.int64)
    for row, (a, b) in enumerate(paths.layout.runs):
        ids_RS[row, : b - a] = paths.ids_T[a:b]
        place_T[a:b] = row * width + torch.arange(b - a)
    return Block(ids_RS.to(device), place_T[paths.predictor_A].to(device), paths.to(device))


def rows_of_like_length(singles: Sequence[Pack], trees: Sequence[Any], budget: int) -> list[Pack]:
    """Sequence packs whose rows would fill at most ``budget`` tokens when padded; ``singles`` and ``trees`` go together."""
    order = sorted(range(len(singles)), key=lambda i: -singles[i].tokens)
    packs: list[Pack] = []
    while order:
        rows = max(1, budget // singles[order[0]].tokens)
        packs += pack([trees[i] for i in order[:rows]], 1 << 30, keep_zero=True)
        order = order[rows:]
    return packs


Pass = Callable[[], None]


class Case:
    """One shape with one model: the ways to compute it."""

    def __init__(self, size: Size, shape: Shape, groups: int, device: torch.device) -> None:
        self.model, self._size, self._device = build(size, device), size, device
        grower = Grower(size.config["vocab_size"])
        self._trees = credited([grower.group(shape, str(n)) for n in range(groups)])
        self._paths = apart(self._trees)
        (self.whole,), (self.whole_apart,) = (pack(trees, 1 << 30, keep_zero=True) for trees in (self._trees, self._paths))

    @property
    def token_ratio(self) -> float:
        return self.whole_apart.tokens / self.whole.tokens

    def tree(self, budget: int) -> Pass:
        return self._packed(pack(self._trees, budget, keep_zero=True))

    def sequence(self, budget: int) -> Pass:
        return self._packed(pack(self._paths, budget, keep_zero=True))

    def rows(self, budget: int) -> Pass:
        singles = [pack([one], 1 << 30, keep_zero=True)[0] for one in self._paths]
        blocks = [padded(one, self._device) for one in rows_of_like_length(singles, self._paths, budget)]

        def run() -> None:
            self.model.set_attn_implementation("sdpa")
            for block in blocks:
                with torch.autocast(self._device.type, torch.bfloat16, enabled=self._size.dtype == "bfloat16"):
                    hidden_RSH = cast("Any", self.model).get_decoder()(input_ids=block.ids_RS, use_cache=False).last_hidden_state
                    hidden_AH = hidden_RSH.flatten(0, 1).index_select(0, block.predictor_A)
                    logprob_A, _ = score_hidden(self.model, hidden_AH, block.paths.targets.label_A, 1.0)
                self._learn(logprob_A, block.paths)

        return run

    def _packed(self, packs: Sequence[Pack]) -> Pass:
        moved = [one.to(self._device) for one in packs]

        def run() -> None:
            self.model.set_attn_implementation(attention.NAME)
            for one in moved:
                self._learn(score(self.model, one, 1.0, self._size.dtype)[0], one)

        return run

    def _learn(self, logprob_A: Tensor, one: Pack) -> None:
        loss, _ = policy_loss(logprob_A, logprob_A.detach(), one.targets, TRAIN)
        loss.backward()


def seconds(work: Pass, device: torch.device) -> float:
    began = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - began


def fastest(case: Case, budgets: Sequence[int], repeats: int, device: torch.device) -> dict[str, tuple[float, int]]:
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
    case = Case(SIZES[size], SHAPES[shape], SIZES[size].groups[shape], device)
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
    case = Case(size, SHAPES[shape], size.groups[shape], device)
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
    del case
    found["memory_ratio"] = peak_of(name, shape, "tree", threads) / peak_of(name, shape, "sequence", threads)
    return found


def _flops(size: Size, whole: Pack, parameters: int) -> float:
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
