"""Make GeoHop's tokenizer and warm start: ``python -m examples.geohop.make_model``.

facts ─► corpus, index ─► items of the training countries ─► demonstrations ─► AdamW ─► model/ and its report.json
"""

from __future__ import annotations

import argparse
import asyncio
import json
from collections.abc import Mapping
from pathlib import Path

import torch
import transformers
from transformers import GenerationConfig, PreTrainedTokenizerFast, Qwen2ForCausalLM

from examples.geohop.demonstrations import RIGHT_SHARE, demonstrations, environment, question
from examples.geohop.evaluation import exact_match_by_family, play
from examples.geohop.facts import load_world
from examples.geohop.families import Item
from examples.geohop.make_data import COUNTS, DATA, SEED, Reachable, items, pool
from examples.geohop.tokenizer import train_tokenizer
from examples.geohop.warm_start import BATCH, small_qwen2, train
from services.environments.search_qa import SearchQA
from services.retriever.index import Index, load_corpus

MODEL = Path(__file__).parent / "model"
STEPS = 1500
SHOWN = 24_000
_MODEL_SEED = 11


def make(folder: Path, steps: int, shown: int, share: Mapping[str, float]) -> None:
    """Train the tokenizer and the model and write both, with a report, into ``folder``."""
    documents = load_corpus(DATA / "corpus.jsonl")
    world, index = load_world(), Index(documents)
    reachable = Reachable(index)
    examples = list(items(pool(world, "train"), reachable, shown, SEED + 1))
    texts = [document.contents for document in documents] + [item.question for item in examples]
    texts += [str(turn) for item in examples for turn in item.right]
    tokenizer = train_tokenizer(texts)
    env = environment(index, tokenizer)
    made = asyncio.run(demonstrations(examples, env, tokenizer, SEED, share))
    print(f"{len(made)} demonstrations of {sum(len(one.ids) for one in made) / len(made):.0f} tokens", flush=True)
    model = small_qwen2(len(tokenizer), tokenizer.convert_tokens_to_ids("<|end|>"), _MODEL_SEED)
    train(model, made, steps, _MODEL_SEED, report=lambda line: print(line, flush=True))
    save(folder, model, tokenizer)
    heldout = list(items(pool(world, "heldout"), reachable, COUNTS["heldout"], SEED))
    figures = asyncio.run(measure(model, tokenizer, env, heldout))
    _write_report(folder, figures, steps, shown, share)


def save(folder: Path, model: Qwen2ForCausalLM, tokenizer: PreTrainedTokenizerFast) -> None:
    """Write a Hugging Face model directory."""
    end = tokenizer.eos_token_id
    model.generation_config = GenerationConfig(eos_token_id=end, pad_token_id=end, do_sample=True, temperature=1.0)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


async def measure(
    model: Qwen2ForCausalLM, tokenizer: PreTrainedTokenizerFast, env: SearchQA, heldout: list[Item]
) -> dict[str, Mapping[str, float]]:
    """Greedy and sampled exact match by family, in percent."""
    model.eval()
    torch.manual_seed(SEED)
    asked = [question(item) for item in heldout]
    figures: dict[str, Mapping[str, float]] = {}
    for name, greedy in (("greedy", True), ("sampled", False)):
        figures[name] = exact_match_by_family(env, await play(model, tokenizer, env, asked, greedy))
    return figures


def _write_report(
    folder: Path, figures: Mapping[str, Mapping[str, float]], steps: int, shown: int, share: Mapping[str, float]
) -> None:
    report = {
        "heldout_em_percent": figures,
        "right_share": share,
        "training": {"steps": steps, "batch": BATCH, "demonstrations": shown, "seed": _MODEL_SEED, "data_seed": SEED},
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
    }
    text = json.dumps(report, indent=2)
    (folder / "report.json").write_text(text + "\n", encoding="utf-8")
    print(text)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, default=MODEL)
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--demonstrations", type=int, default=SHOWN)
    parser.add_argument("--perfect", action="store_true", help="show only right plans: what the skills allow")
    asked = parser.parse_args()
    perfect = dict.fromkeys(RIGHT_SHARE, 1.0)
    make(asked.folder, asked.steps, asked.demonstrations, perfect if asked.perfect else RIGHT_SHARE)
