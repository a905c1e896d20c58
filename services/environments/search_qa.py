r"""Search question answering in Search-R1's protocol.

    policy       <think>…</think><search>query</search>
    environment  \n\n<information>Doc 1(Title: …) text\n</information>\n\n
    policy       <think>…</think><answer>…</answer>

An episode is an immutable value, so a branch continues from any earlier state. The reward reads the episode's own
actions and nothing else: a prompt that quotes ``<answer>…</answer>`` cannot be mistaken for an answer.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from itertools import islice
from typing import Literal

from services.environments.base import Forking, Outcome, ToolCall
from services.environments.markup import Markup
from services.environments.retrieval import PROBE_QUERY, Retriever
from services.environments.rewards import RewardShape, exact_match, f1, format_reward
from services.environments.truncation import fitting_length
from treegrpo.core.question import Question
from treegrpo.net.limits import LOOP_CHARACTERS, QUERY_LENGTH

Kind = Literal["search", "answer", "invalid"]

HINT = Markup(
    "\n\nThat was no valid action. Think between <think> and </think>, then either search with <search> query </search> "
    "or finish with <answer> answer </answer>.\n\n"
)
_OPENING = re.compile(r"<(search|answer)>")
_TAG = re.compile(r"</?(?:think|search|answer|information)>")
_END = re.compile(r"\s*(?:(?:<\|[^<>|]+\|>|</s>)\s*)?")
MAX_TOKEN_CHARS = 128
"""No token of the usual vocabularies stands for more characters."""


@dataclass(frozen=True, slots=True)
class Action:
    """One turn of the policy, parsed."""

    kind: Kind
    text: str
    """The query or the answer, without surrounding white space; empty for an invalid action."""
    well_formed: bool
    """True when the turn is a think followed by exactly one search or answer."""


@dataclass(frozen=True, slots=True)
class Episode:
    """The state of search QA: the question and the policy's actions."""

    question: Question
    actions: tuple[Action, ...] = ()

    @property
    def answer(self) -> str | None:
        """The policy's answer, or ``None`` when the episode has none."""
        last = self.actions[-1] if self.actions else None
        return last.text if last and last.kind == "answer" else None


def parse_action(text: str) -> Action:
    """Parse one turn: its first complete search or answer. Takes linear time in ``text``.

    A turn is well-formed if it has the four tags of a think and of one action, in this order, and nothing but white space
    outside, where one trailing end-of-turn token is tolerated. Inside, any text is allowed that is no tag of the protocol.

    Example:
        >>> parse_action("<think>3 < 4, so first the city</think><search> Ghazni </search>")
        Action(kind='search', text='Ghazni', well_formed=True)
    """
    ends = {kind: text.rfind(f"</{kind}>") for kind in ("search", "answer")}
    opening = next((tag for tag in _OPENING.finditer(text) if tag.end() <= ends[tag[1]]), None)
    if opening is None:
        return Action("invalid", "", well_formed=False)
    kind: Kind = "search" if opening[1] == "search" else "answer"
    inside = text[opening.end() : text.index(f"</{kind}>", opening.end())]
    return Action(kind, inside.strip(), well_formed=_is_well_formed(text, kind))


def _is_well_formed(text: str, kind: Kind) -> bool:
    tags = list(islice(_TAG.finditer(text), 5))
    if [tag[0] for tag in tags] != ["<think>", "</think>", f"<{kind}>", f"</{kind}>"]:
        return False
    before, between = text[: tags[0].start()], text[tags[1].end() : tags[2].start()]
    return not before.strip() and not between.strip() and _END.fullmatch(text, tags[3].end()) is not None


class SearchQA:
    """The search QA environment: the policy searches with a retriever, and finishes with an answer."""

    forking: Forking = "stateless"
    stop: tuple[str, ...] = ("</search>", "</answer>")

    def __init__(
        self,
        retriever: Retriever,
        *,
        topk: int,
        max_observation_tokens: int,
        count_tokens: Callable[[str], int],
        reward: Literal["em", "f1"] = "em",
        reward_shape: RewardShape = "penalty",
        format_penalty: float = 0.2,
    ) -> None:
        """Set up the task; no connection is opened.

        Args:
            retriever: the search tool; the caller closes it.
            topk: documents per search.
            max_observation_tokens: limit of one observation; longer documents are cut, the tags never.
            count_tokens: length of a text in the policy's tokens.
            reward: the component trained on; the other is only reported.
            reward_shape: what the format adds or takes off (`format_reward`).
            format_penalty: λ_f of the shape `penalty`.
        """
        self._retriever = retriever
        self._topk = topk
        self._max_observation_tokens = max_observation_tokens
        self._count_tokens = count_tokens
        self._reward = reward
        self._reward_shape: RewardShape = reward_shape
        self._format_penalty = format_penalty

    async def start(self, question: Question) -> Episode:
        """See `Environment.start`."""
        return Episode(question)

    async def fork(self, state: Episode) -> Episode:
        """Return ``state``, which is immutable."""
        return state

    async def step(self, state: Episode, action: str, *, last: bool) -> Outcome[Episode]:
        """See `Environment.step`."""
        parsed = parse_action(action)
        after = replace(state, actions=(*state.actions, parsed))
        valid = parsed.kind != "invalid"
        if last or parsed.kind == "answer":
            return Outcome(after, None, valid=valid)
        if parsed.kind == "invalid":
            return Outcome(after, HINT, valid=False)
        query = parsed.text[:QUERY_LENGTH]
        documents = await self._retriever.search(query, self._topk)
        large = sum(map(len, documents)) > LOOP_CHARACTERS
        observation = await asyncio.to_thread(self._observation, documents) if large else self._observation(documents)
        return Outcome(after, observation, (ToolCall("search", query),))

    async def probe(self) -> None:
        """A search; see `Environment.probe`."""
        await self._retriever.search(PROBE_QUERY, self._topk)

    def score(self, state: Episode) -> Mapping[str, float]:
        """``em`` or ``f1`` (the one chosen) and ``format``; see `Environment.score`.

        The format is broken by a turn that is not well-formed and by an end without an answer.
        """
        answered = state.answer is not None
        well_formed = answered and all(action.well_formed for action in state.actions)
        score = self._score_answer(state)[self._reward]
        shape, penalty = self._reward_shape, self._format_penalty
        format_ = format_reward(shape, score, answered=answered, well_formed=well_formed, reward=self._reward, penalty=penalty)
        return {self._reward: score, "format": format_}

    def metrics(self, state: Episode) -> Mapping[str, float]:
        """``em``, ``f1``, and the counts ``invalid_actions`` and ``searches``; see `Environment.metrics`."""
        kinds = [action.kind for action in state.actions]
        performed = kinds[:-1]  # the action that ended the episode used no tool
        counts = {"invalid_actions": kinds.count("invalid"), "searches": performed.count("search")}
        return {**self._score_answer(state), **{name: float(count) for name, count in counts.items()}}

    def _score_answer(self, state: Episode) -> dict[str, float]:
        if state.answer is None:
            return {"em": 0.0, "f1": 0.0}
        targets = state.question.targets
        return {"em": exact_match(state.answer, targets), "f1": f1(state.answer, targets)}

    def _observation(self, documents: list[str]) -> Markup:
        """Format documents for the policy; text beyond the limit is cut off, the tags never."""
        lines, remaining = list[str](), MAX_TOKEN_CHARS * self._max_observation_tokens
        for rank, contents in enumerate(documents, start=1):
            if remaining <= 0:
                break
            lines.append(_document_line(rank, contents[:remaining]))
            remaining -= len(lines[-1])
        body = "".join(lines)
        kept = fitting_length(body, self._max_observation_tokens, lambda text: self._count_tokens(_information(text)))
        return _information(body[:kept])


def _document_line(rank: int, contents: str) -> str:
    title, _, text = contents.partition("\n")
    return f"Doc {rank}(Title: {title}) {text}\n"


def _information(body: str) -> Markup:
    return Markup("\n\n<information>", body, "</information>\n\n")
