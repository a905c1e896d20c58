r"""Search question answering in Search-R1's protocol.

    policy       <think>…</think><search>query</search>
    environment  \n\n<information>Doc 1(Title: …) text\n</information>\n\n
    policy       <think>…</think><answer>…</answer>

An episode is an immutable value, so a branch continues from any earlier state. The reward reads the episode's own
actions and nothing else: a prompt that quotes ``<answer>…</answer>`` cannot be mistaken for an answer.
"""

from __future__ import annotations

import re
from bisect import bisect_right
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Literal

from services.environments.base import Forking, Outcome, ToolCall
from services.environments.markup import Markup
from services.environments.retrieval import PROBE_QUERY, Retriever
from services.environments.rewards import exact_match, f1
from treegrpo.question import Question

Kind = Literal["search", "answer", "invalid"]

HINT = Markup(
    "\n\nThat was no valid action. Think between <think> and </think>, then either search with <search> query </search> "
    "or finish with <answer> answer </answer>.\n\n"
)
_ACT = re.compile(r"<(search|answer)>(.*?)</\1>", re.DOTALL)
_WELL_FORMED = re.compile(r"\s*<think>([^<]*)</think>\s*<(search|answer)>([^<]*)</\2>\s*(?:(?:<\|[^<>|]+\|>|</s>)\s*)?")


@dataclass(frozen=True, slots=True)
class Action:
    """One turn of the policy, as the environment understood it."""

    kind: Kind
    text: str
    """The query or the answer, without surrounding white space; empty for an invalid action."""
    well_formed: bool
    """True when the turn is a think followed by exactly one search or answer."""


@dataclass(frozen=True, slots=True)
class Episode:
    """The state of search QA: what was asked and what the policy did about it."""

    question: Question
    actions: tuple[Action, ...] = ()

    @property
    def answer(self) -> str | None:
        """The policy's answer, or ``None`` when the episode has none."""
        last = self.actions[-1] if self.actions else None
        return last.text if last and last.kind == "answer" else None


def parse_action(text: str) -> Action:
    """Understand one turn. White space around it and one trailing end-of-turn token are tolerated.

    Example:
        >>> parse_action("<think>first the city</think><search> Ghazni </search>")
        Action(kind='search', text='Ghazni', well_formed=True)
    """
    found = _ACT.search(text)
    if found is None:
        return Action("invalid", "", well_formed=False)
    kind: Kind = "search" if found[1] == "search" else "answer"
    return Action(kind, found[2].strip(), well_formed=_WELL_FORMED.fullmatch(text) is not None)


class SearchQA:
    """The environment: search with a retriever, finish with an answer."""

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
        format_penalty: float = 0.2,
    ) -> None:
        """Set up the task; nothing is opened.

        Args:
            retriever: the search tool; whoever made it closes it.
            topk: documents per search.
            max_observation_tokens: limit of one observation; longer documents are cut, the tags never.
            count_tokens: length of a text in the policy's tokens.
            reward: the component trained on; the other is only reported.
            format_penalty: λ_f, taken once from an episode that breaks the protocol.
        """
        self._retriever = retriever
        self._topk = topk
        self._max_observation_tokens = max_observation_tokens
        self._count_tokens = count_tokens
        self._reward = reward
        self._format_penalty = format_penalty

    async def start(self, question: Question) -> Episode:
        """See `Environment.start`."""
        return Episode(question)

    async def fork(self, state: Episode) -> Episode:
        """A value is its own copy."""
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
        documents = await self._retriever.search(parsed.text, self._topk)
        return Outcome(after, self._observation(documents), (ToolCall("search", parsed.text),))

    async def probe(self) -> None:
        """A search; see `Environment.probe`."""
        await self._retriever.search(PROBE_QUERY, self._topk)

    def score(self, state: Episode) -> Mapping[str, float]:
        """``em`` or ``f1`` (the one chosen) and ``format``; see `Environment.score`.

        The format is broken by a turn that is not well-formed and by an end without an answer.
        """
        kept = state.answer is not None and all(action.well_formed for action in state.actions)
        return {self._reward: self._judge(state)[self._reward], "format": 0.0 if kept else -self._format_penalty}

    def metrics(self, state: Episode) -> Mapping[str, float]:
        """``em``, ``f1``, and the counts ``invalid_actions`` and ``searches``; see `Environment.metrics`."""
        kinds = [action.kind for action in state.actions]
        performed = kinds[:-1]  # whatever ended the episode used no tool
        counts = {"invalid_actions": kinds.count("invalid"), "searches": performed.count("search")}
        return {**self._judge(state), **{name: float(count) for name, count in counts.items()}}

    def _judge(self, state: Episode) -> dict[str, float]:
        if state.answer is None:
            return {"em": 0.0, "f1": 0.0}
        targets = state.question.targets
        return {"em": exact_match(state.answer, targets), "f1": f1(state.answer, targets)}

    def _observation(self, documents: list[str]) -> Markup:
        body = "".join(_document_line(rank, contents) for rank, contents in enumerate(documents, start=1))
        if self._fits(body, len(body)):
            return _information(body)
        lengths = range(1, len(body))
        kept = bisect_right(lengths, False, key=lambda length: not self._fits(body, length))
        return _information(body[:kept])

    def _fits(self, body: str, length: int) -> bool:
        return self._count_tokens(_information(body[:length])) <= self._max_observation_tokens


def _document_line(rank: int, contents: str) -> str:
    title, _, text = contents.partition("\n")
    return f"Doc {rank}(Title: {title}) {text}\n"


def _information(body: str) -> Markup:
    return Markup("\n\n<information>", body, "</information>\n\n")
