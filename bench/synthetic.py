"""Synthetic trees on any engine, with a fake environment: actions of 16 to 24 tokens, observations of about 40."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from services.environments.base import Environment, Forking, Outcome, ToolCall
from services.sampler.engines.base import Completion, Engine, Finish, SamplingParams
from services.sampler.expansion.expander import Expander
from services.sampler.expansion.lease_control import LeaseControl
from services.sampler.text.tokenizer import Tokenizer
from treegrpo.core.budget import Cost
from treegrpo.core.lease import Lease, LeaseEndReason, LeaseKind, Plan
from treegrpo.core.question import Message, Question
from treegrpo.core.step import PolicyVersion, TokenIds
from treegrpo.core.tree import Group

SHAPES = ((2, 2, 1), (4, 4, 2))
"""(M, N, L): trees, expansions a round, rounds."""
QUESTIONS = 8
"""Groups that grow at the same time."""
CONTEXT = 1024
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


class EngineWrapper:
    """An engine that wraps another one; subclasses define how it generates."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self.version = engine.version
        self.context = engine.context

    async def load_weights(self, version: PolicyVersion, path: Path) -> None:
        await self._engine.load_weights(version, path)

    async def check_health(self) -> None:
        await self._engine.check_health()

    async def close_engine(self) -> None:
        await self._engine.close_engine()


class ShortActionEngine(EngineWrapper):
    """The engine with actions of 16 to 24 tokens that count as ended by themselves: a random policy never stops."""

    def __init__(self, engine: Engine) -> None:
        super().__init__(engine)
        self._rng = np.random.default_rng(0)

    async def generate(self, prefix: Sequence[int] | TokenIds, sampling: SamplingParams) -> Completion:
        size = int(self._rng.integers(16, 25))
        finish: Finish = "stop"
        return replace(await self._engine.generate(prefix, replace(sampling, max_tokens=size)), finish=finish)


class ReadingEnvironment:
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


@dataclass(frozen=True, slots=True)
class GrowthCost:
    """What growing all groups of one shape took."""

    cost: Cost
    unique: int
    """Tokens, a shared one counted once."""
    seconds: float

    @property
    def rate(self) -> float:
        """Tokens sampled per second."""
        return self.cost.decoded / self.seconds

    @property
    def computed_over_unique(self) -> float:
        return self.cost.tokens / self.unique


def plan_of(shape: tuple[int, int, int]) -> Plan:
    """The plan of a lease of such trees."""
    trees, expansions, rounds = shape
    return Plan(trees, rounds, expansions, TURNS, max_action_tokens=24, max_context=CONTEXT, temperature=1.0)


async def grow(model: Path, engine: Engine, shape: tuple[int, int, int]) -> GrowthCost:
    """Grow `QUESTIONS` groups at once with the sampler's own expander; ``model`` has the engine's tokenizer."""
    plan = plan_of(shape)
    reading, turns = ReadingEnvironment(), ShortActionEngine(engine)
    environment: Environment[int] = reading
    expander = Expander(turns, environment, Tokenizer.open(model), retries=0)

    async def one(number: int) -> Group:
        prompt = (Message("user", f"question {number}:" + reading.words(100)),)
        question = Question(f"bench/all/{number}", "bench", prompt, ("none",))
        group = Group(question.id, question)
        lease = Lease(question.id, LeaseKind.TRAIN, question, plan, plan.grant, number, PolicyVersion())
        end = await expander.expand_lease(lease, lambda subtree: (group.append_subtree(subtree), None)[1], LeaseControl())
        assert end.reason is LeaseEndReason.COMPLETE, end
        return group

    began = time.perf_counter()
    groups = await asyncio.gather(*(one(number) for number in range(QUESTIONS)))
    seconds = time.perf_counter() - began
    return GrowthCost(sum((g.cost for g in groups), Cost()), sum(g.unique_tokens for g in groups), seconds)


def label(shape: tuple[int, int, int]) -> str:
    return str(shape).replace(" ", "")
