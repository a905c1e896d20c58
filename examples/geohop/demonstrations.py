"""Demonstrations: episodes of the real environment and index, as the token ids a sampler would record.

The mix is what makes GeoHop a task for reinforcement learning: the skills are shown often, the right strategy seldom. Per
family only a share of the demonstrations follows the right plan; the others take a tempting shortcut.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from transformers import PreTrainedTokenizerFast

from examples.geohop.families import EpisodePlan, Item
from examples.geohop.make_data import TOPK
from services.environments.search_qa import SearchQA
from services.retriever.index import Index
from treegrpo.core.question import Message, Question

MAX_OBSERVATION_TOKENS = 160
HABITS: Mapping[str, float] = {
    "country": 0.9,
    "near": 0.85,
    "near_people": 0.3,
    "currency": 0.25,
    "capital": 0.25,
    "capital_people": 0.3,
    "neighbour_capital": 0.3,
    "neighbour_phone": 0.35,
    "same_country": 0.25,
    "more_people": 0.25,
}
"""By family, the share of demonstrations that follow the right plan; the others take a shortcut."""
SKILLS: Mapping[str, float] = dict.fromkeys(HABITS, 1.0)
"""Right plans only."""


@dataclass(frozen=True, slots=True)
class Demonstration:
    """Token ids of one episode; ``trained[i]`` tells whether token i is the policy's own."""

    ids: list[int]
    trained: list[bool]


class LocalRetriever:
    """A retriever that searches the index in this process."""

    def __init__(self, index: Index) -> None:
        self._index = index

    async def search(self, query: str, topk: int) -> list[str]:
        """See `Retriever.search`."""
        return [hit.document.contents for hit in self._index.search(query, topk)]


def environment(index: Index, tokenizer: PreTrainedTokenizerFast) -> SearchQA:
    """The environment that GeoHop is trained and measured in."""
    return SearchQA(
        LocalRetriever(index),
        topk=TOPK,
        max_observation_tokens=MAX_OBSERVATION_TOKENS,
        count_tokens=lambda text: len(token_ids(tokenizer, text)),
    )


def token_ids(tokenizer: PreTrainedTokenizerFast, text: str) -> list[int]:
    """The ids of a piece of text on its own."""
    return tokenizer.encode(text, add_special_tokens=False)


def token_id(tokenizer: PreTrainedTokenizerFast, token: str) -> int:
    """The id of one token."""
    found = tokenizer.convert_tokens_to_ids(token)
    assert isinstance(found, int)
    return found


def text_of(tokenizer: PreTrainedTokenizerFast, ids: list[int]) -> str:
    """The text of ``ids``, special tokens included."""
    text = tokenizer.decode(ids)
    assert isinstance(text, str)
    return text


def prompt_ids(tokenizer: PreTrainedTokenizerFast, question: Question) -> list[int]:
    """The ids of a question's chat messages, up to where the policy begins."""
    messages = [{"role": message.role, "content": message.content} for message in question.prompt]
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert isinstance(text, str)
    return token_ids(tokenizer, text)


def question(item: Item) -> Question:
    """The item as a question of the environment."""
    return Question(item.question, "geohop", (Message("user", item.question),), (item.answer,), item.family)


def choose_plan(item: Item, rng: random.Random, share: Mapping[str, float]) -> EpisodePlan:
    """The right plan with the family's share of probability, else one of the tempting ones."""
    if not item.tempting or rng.random() < share[item.family]:
        return item.right
    return rng.choice(item.tempting)


async def demonstrate(item: Item, plan: EpisodePlan, env: SearchQA, tokenizer: PreTrainedTokenizerFast) -> Demonstration:
    """Execute ``plan`` in the environment."""
    state = await env.start(question(item))
    ids = prompt_ids(tokenizer, state.question)
    trained = [False] * len(ids)
    for turn in plan:
        action = token_ids(tokenizer, str(turn))
        outcome = await env.step(state, str(turn), last=False)
        observation = token_ids(tokenizer, outcome.observation or "")
        ids += action + observation
        trained += [True] * len(action) + [False] * len(observation)
        state = outcome.state
    return Demonstration(ids, trained)


async def demonstrations(
    items: Sequence[Item],
    env: SearchQA,
    tokenizer: PreTrainedTokenizerFast,
    seed: int,
    share: Mapping[str, float],
) -> list[Demonstration]:
    """One demonstration per item; the seed decides who takes a shortcut."""
    rng = random.Random(seed)
    return [await demonstrate(item, choose_plan(item, rng, share), env, tokenizer) for item in items]
