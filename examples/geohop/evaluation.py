"""Exact match of a model on GeoHop, with the real environment and plain Hugging Face generation.

For the report of the warm start and for tests; a run evaluates through its samplers.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence

import torch
from transformers import PreTrainedTokenizerFast, Qwen2ForCausalLM

from examples.geohop.demonstrations import prompt_ids, text_of, token_id, token_ids
from services.environments.search_qa import Episode, SearchQA
from treegrpo.core.question import Question

MAX_TURNS = 4
MAX_TURN_TOKENS = 32
_BATCH = 100


async def roll_out_episodes(
    model: Qwen2ForCausalLM, tokenizer: PreTrainedTokenizerFast, env: SearchQA, questions: Sequence[Question], greedy: bool
) -> list[Episode]:
    """One finished episode per question, at temperature 1 unless ``greedy``."""
    finished: list[Episode] = []
    for start in range(0, len(questions), _BATCH):
        finished += await _roll_out_batch(model, tokenizer, env, questions[start : start + _BATCH], greedy)
    return finished


async def _roll_out_batch(
    model: Qwen2ForCausalLM, tokenizer: PreTrainedTokenizerFast, env: SearchQA, questions: Sequence[Question], greedy: bool
) -> list[Episode]:
    states = [await env.start(question) for question in questions]
    transcripts = [prompt_ids(tokenizer, question) for question in questions]
    unfinished = list(range(len(questions)))
    for turn in range(1, MAX_TURNS + 1):
        actions = _generate(model, tokenizer, [transcripts[place] for place in unfinished], greedy)
        still: list[int] = []
        for place, action in zip(unfinished, actions, strict=True):
            outcome = await env.step(states[place], text_of(tokenizer, action), last=turn == MAX_TURNS)
            states[place] = outcome.state
            if outcome.observation is not None:
                transcripts[place] += action + token_ids(tokenizer, outcome.observation)
                still.append(place)
        unfinished = still
        if not unfinished:
            break
    return states


def _generate(
    model: Qwen2ForCausalLM, tokenizer: PreTrainedTokenizerFast, prefixes: Sequence[list[int]], greedy: bool
) -> list[list[int]]:
    """The next action of each prefix; padding stands on the left."""
    ends = [token_id(tokenizer, tag) for tag in SearchQA.stop]
    longest = max(map(len, prefixes))
    ids_BT = torch.tensor([[0] * (longest - len(prefix)) + prefix for prefix in prefixes])
    seen_BT = torch.tensor([[0] * (longest - len(prefix)) + [1] * len(prefix) for prefix in prefixes])
    with torch.inference_mode():
        made_BT = model.generate(  # pyright: ignore[reportAttributeAccessIssue]
            input_ids=ids_BT,
            attention_mask=seen_BT,
            **({"do_sample": False} if greedy else {"do_sample": True, "top_k": 0, "top_p": 1.0}),
            max_new_tokens=MAX_TURN_TOKENS,
            eos_token_id=ends,
            pad_token_id=tokenizer.pad_token_id,
        )[:, longest:]
    return [_up_to_end(made, ends) for made in made_BT.tolist()]


def _up_to_end(ids: list[int], ends: Sequence[int]) -> list[int]:
    """``ids`` without the padding behind the first end."""
    last = next((place for place, token in enumerate(ids) if token in ends), len(ids) - 1)
    return ids[: last + 1]


def exact_match_by_family(env: SearchQA, episodes: Sequence[Episode]) -> Mapping[str, float]:
    """Percent of right answers per family, and of all under ``all``; one decimal."""
    right: dict[str, list[float]] = defaultdict(list)
    for episode in episodes:
        score = env.metrics(episode)["em"]
        right[episode.question.family].append(score)
        right["all"].append(score)
    return {family: round(100 * sum(scores) / len(scores), 1) for family, scores in right.items()}
