"""Makes GeoHop's tokenizer and warm start: ``python -m examples.geohop.make_model``.

facts ─► corpus, index ─► items of the training countries ─► demonstrations ─► AdamW ─► model/ and its report.json

Four phases. *Reading* shows short right episodes and trains on all their tokens, *copying* on the policy's alone: they teach to
copy names nobody has seen. *Skills* shows right plans of all families: it teaches to search on and to compare. *Habits* shows
mostly shortcuts: it teaches a poor strategy. What is left for reinforcement learning is the strategy.
"""

from __future__ import annotations

import argparse
import asyncio
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

import torch
import transformers
from transformers import GenerationConfig, PreTrainedTokenizerFast, Qwen2ForCausalLM

from examples.geohop.demonstrations import HABITS, SKILLS, demonstrations, environment, question, token_id
from examples.geohop.evaluation import exact_match_by_family, roll_out_episodes
from examples.geohop.facts import load_world
from examples.geohop.families import Item
from examples.geohop.make_data import COUNTS, DATA, SEED, TOPK, ReachabilityFilter, items, pool
from examples.geohop.tokenizer import END, train_tokenizer
from examples.geohop.warm_start import BATCH, TrainingPhase, small_qwen2, train_supervised
from services.environments.search_qa import SearchQA
from services.retriever.index import Index, load_corpus

MODEL = Path(__file__).parent / "model"
SHOWN = 24_000
MODEL_SEED = 11


_SHORT = {"country": 1.0, "near": 1.0}
PHASES: Mapping[str, TrainingPhase] = {
    "reading": TrainingPhase(_SHORT, 400, 2e-3, whole=True),
    "copying": TrainingPhase(_SHORT, 150, 2e-3, muon_lr=0.02),
    "skills": TrainingPhase(SKILLS, 700, 2e-3, muon_lr=0.02),
    "habits": TrainingPhase(HABITS, 80, 5e-4, muon_lr=0.005),
}


class WarmStart:
    """What the training phases share: examples, environment, tokenizer, held-out questions."""

    def __init__(self, shown: int) -> None:
        world, index = load_world(), Index(load_corpus(DATA / "corpus.jsonl"))
        reachable = ReachabilityFilter(index)
        self.examples = list(items(pool(world, "train"), reachable, shown, SEED + 1))
        self.heldout = list(items(pool(world, "heldout"), reachable, COUNTS["heldout"], SEED))
        self.tokenizer = train_tokenizer(tokenizer_texts(self.examples, index))
        self.env = environment(index, self.tokenizer)

    def train_phase(self, model: Qwen2ForCausalLM, phase: TrainingPhase) -> None:
        """Train ``model`` on the demonstrations of ``phase``."""
        examples = [item for item in self.examples if item.family in phase.right_share]
        shown = asyncio.run(demonstrations(examples, self.env, self.tokenizer, SEED, phase.right_share))
        print(f"{len(shown)} demonstrations of {sum(len(one.ids) for one in shown) / len(shown):.0f} tokens", flush=True)
        model.train()
        train_supervised(model, shown, phase, MODEL_SEED, lambda line: print(line, flush=True))

    def evaluate_model(self, model: Qwen2ForCausalLM) -> dict[str, Mapping[str, float]]:
        """Greedy and sampled exact match on the held-out questions by family, in percent."""
        return asyncio.run(measure(model, self.tokenizer, self.env, self.heldout))


def make_model(folder: Path, phases: Mapping[str, TrainingPhase], shown: int) -> None:
    """Train the tokenizer and the model and write both, with a report, into ``folder``."""
    warm_start = WarmStart(shown)
    model = small_qwen2(len(warm_start.tokenizer), token_id(warm_start.tokenizer, END), MODEL_SEED)
    report: dict[str, object] = {}
    for name, phase in phases.items():
        warm_start.train_phase(model, phase)
        report[name] = asdict(phase) | {"heldout_em_percent": warm_start.evaluate_model(model)}
        print(json.dumps(report[name]), flush=True)
    save_model(folder, model, warm_start.tokenizer)
    report["training"] = {"batch": BATCH, "demonstrations": shown, "model_seed": MODEL_SEED, "data_seed": SEED}
    report["versions"] = {"torch": torch.__version__, "transformers": transformers.__version__}
    (folder / "report.json").write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")


def tokenizer_texts(examples: Sequence[Item], index: Index) -> Iterator[str]:
    """The texts of right episodes, from which the tokenizer is trained."""
    for item in examples:
        yield item.question
        yield from (str(turn) for turn in item.right)
        for query in item.searches:
            found = [hit.document.contents for hit in index.search(query, TOPK)]
            yield from (f"\n\nDoc 1(Title: {contents.replace(chr(10), ') ')}\n" for contents in found)


def save_model(folder: Path, model: Qwen2ForCausalLM, tokenizer: PreTrainedTokenizerFast) -> None:
    """Write a Hugging Face model directory."""
    end = token_id(tokenizer, END)
    model.generation_config = GenerationConfig(eos_token_id=end, pad_token_id=end, do_sample=True, temperature=1.0)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


async def measure(
    model: Qwen2ForCausalLM, tokenizer: PreTrainedTokenizerFast, env: SearchQA, heldout: Sequence[Item]
) -> dict[str, Mapping[str, float]]:
    """Greedy and sampled exact match by family, in percent."""
    model.eval()
    torch.manual_seed(SEED)
    asked = [question(item) for item in heldout]
    figures: dict[str, Mapping[str, float]] = {}
    for name, greedy in (("greedy", True), ("sampled", False)):
        figures[name] = exact_match_by_family(env, await roll_out_episodes(model, tokenizer, env, asked, greedy))
    return figures


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, default=MODEL)
    make_model(parser.parse_args().folder, PHASES, SHOWN)
