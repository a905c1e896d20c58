"""A stand-in for agent and task with known sizes: actions of 16 to 24 tokens, observations of about 40."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from services.environments.base import Forking, Outcome, ToolCall
from services.sampler.engines.base import Completion, Engine, Finish, Sampling
from treegrpo.question import Question
from treegrpo.step import PolicyVersion, TokenIds

TURNS = 3
WORDS = [
    "river",
    "town",
    "bridge",
    "north",
    "of",
    "the",
    "old",
    "capital",
    "king",
    "once",
    "built",
    "sold",
    "grain",
    "by",
    "ship",
]


class Turns:
    """The engine with actions of 16 to 24 tokens that count as ended by themselves: a random policy never stops."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._rng = np.random.default_rng(0)
        self.version = engine.version
        self.context = engine.context

    async def generate(self, prefix: Sequence[int] | TokenIds, sampling: Sampling) -> Completion:
        size = int(self._rng.integers(16, 25))
        finish: Finish = "stop"
        return replace(await self._engine.generate(prefix, replace(sampling, max_tokens=size)), finish=finish)

    async def load(self, version: PolicyVersion, path: Path) -> None:
        await self._engine.load(version, path)

    async def health(self) -> None:
        await self._engine.health()

    async def close(self) -> None:
        await self._engine.close()


class Reading:
    """An environment that answers `TURNS` actions with some words each and ends the episode at the next one."""

    forking: Forking = "stateless"
    stop: tuple[str, ...] = ()

    def __init__(self) -> None:
        self._rng = np.random.default_rng(1)

    def words(self, count: int) -> str:
        """``count`` words, each about one token."""
        return "".join(f" {word}" for word in self._rng.choice(WORDS, count))

    async def start(self, question: Question) -> int:
        del question
        return 0

    async def step(self, state: int, action: str, *, last: bool) -> Outcome[int]:
        if last:
            return Outcome(state, None)
        return Outcome(state + 1, self.words(40), (ToolCall("read", action),))

    async def probe(self) -> None:
        return

    async def fork(self, state: int) -> int:
        return state

    def score(self, state: int) -> Mapping[str, float]:
        return {"turns": float(state)}

    def metrics(self, state: int) -> Mapping[str, float]:
        del state
        return {}
