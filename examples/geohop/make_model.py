"""Make GeoHop's tokenizer and warm start: ``python -m examples.geohop.make_model``.

facts ─► corpus, index ─► items of the training countries ─► demonstrations ─► AdamW ─► model/ and its report.json

Four courses. *Reading* shows short right episodes and trains on all their tokens, *copying* on the policy's alone: they teach to
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
from examples.geohop.evaluation import exact_match_by_family, play
from examples.geohop.facts import load_world
from examples.geohop.families import Item
from examples.geohop.make_data import COUNTS, DATA, SEED, TOPK, Reachable, items, pool
from examples.geohop.tokenizer import END, train_tokenizer
from examples.geohop.warm_start import BATCH, Course, small_qwen2, train
from services.environments.search_qa import SearchQA
from services.retriever.index import Index, load_corpus

MODEL = Path(__file__).parent / "model"
SHOWN = 24_000
MODEL_SEED = 11


_SHORT = {"country": 1.0, "near": 1.0}
COURSES: Mapping[str, Course] = {
    "reading": Course(_SHORT, 400, 2e-3, whole=True),
    "copying": Course(_SHORT, 150, 2e-3, muon_lr=0.02),
    "skills": Course(SKILLS, 700, 2e-3, muon_lr=0.02),
    "habits": Course(HABITS, 80, 5e-4, muon_lr=0.005),
}


class School:
    """What both courses share: the examples, the environment, the tokenizer, the held-out questions."""

    def __init__(self, shown: int) -> None:
        world, index = load_world(), Index(load_corpus(DATA / "corpus.jsonl"))
        reachable = Reachable(index)
        self.examples = list(items(pool(world, "train"), reachable, shown, SEED + 1))
        self.heldout = list(items(pool(world, "heldout"), reachable, COUNTS["heldout"], SEED))
        self.tokenizer = train_tokenizer(spoken(self.examples, index))
        self.env = environment(index, self.tokenizer)

    def teach(self, model: Qwen2ForCausalLM, course: Course) -> None:
        """Train ``model`` on the demonstrations of ``course``."""
        examples = [item for item in self.examples if item.family in course.right_share]
        shown = asyncio.run(demonstrations(examples, self.env, self.tokenizer, SEED, course.right_share))
        print(f"{len(shown)} demonstrations of {sum(len(one.ids) for one in shown) / len(shown):.0f} tokens", flush=True)
        model.train()
        train(model, shown, course, MODEL_SEED, lambda line: print(line, flush=True))

    def examine(self, model: Qwen2ForCausalLM) -> dict[str, Mapping[str, float]]:
        """Greedy and sampled exact match on the held-out questions by family, in percent."""
        return asyncio.run(measure(model, self.tokenizer, self.env, self.heldout))


def make(folder: Path, courses: Mapping[str, Course], shown: int) -> None:
    """Train the tokenizer and the model and write both, with a report, into ``folder``."""
    school = School(shown)
    model = small_qwen2(len(school.tokenizer), token_id(school.tokenizer, END), MODEL_SEED)
    report: dict[str, object] = {}
    for name, course in courses.items():
        school.teach(model, course)
        report[name] = asdict(course) | {"heldout_em_percent": school.examine(model)}
        print(json.dumps(report[name]), flush=True)
    save(folder, model, school.tokenizer)
    report["training"] = {"batch": BATCH, "demonstrations": shown, "model_seed": MODEL_SEED, "data_seed": SEED}
    report["versions"] = {"torch": torch.__version__, "transformers": transformers.__version__}
    (folder / "report.json").write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")


def spoken(examples: Sequence[Item], index: Index) -> Iterator[str]:
    """What is said in right episodes: the texts that the tokenizer learns from."""
    for item in examples:
        yield item.question
        yield from (str(turn) for turn in item.right)
        for query in item.searches:
            found = [hit.document.contents for hit in index.search(query, TOPK)]
            yield from (f"\n\nDoc 1(Title: {contents.replace(chr(10), ') ')}\n" for contents in found)


def save(folder: Path, model: Qwen2ForCausalLM, tokenizer: PreTrainedTokenizerFast) -> None:
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
        figures[name] = exact_match_by_family(env, await play(model, tokenizer, env, asked, greedy))
    return figures


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, default=MODEL)
    make(parser.parse_args().folder, COURSES, SHOWN)
