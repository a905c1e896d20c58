"""Fakes behind the real protocols: an engine that follows a script, a tokenizer of characters, three tiny environments."""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from services.environments.base import Forking, Outcome, ToolCall
from services.sampler.engines.base import Completion, SamplingParams
from treegrpo.core.budget import Budget
from treegrpo.core.lease import Lease, LeaseKind, Plan
from treegrpo.core.question import Message, Question
from treegrpo.core.step import PolicyVersion, TokenIds, VersionSpan
from treegrpo.errors import AwayError, EngineError, ToolError, WeightsError

EOS = 3
MERGED = 500
"""One id for "ok", which the fake policy always spells in two: decoding and encoding again is not the identity."""

Script = Callable[[str], str | Awaitable[str]]


class FakeText:
    """Characters are tokens, but for one merge that only `encode` makes."""

    def encode(self, text: str) -> TokenIds:
        return np.array([MERGED if c == "\0" else ord(c) for c in text.replace("ok", "\0")], np.uint32)

    def decode(self, ids: Sequence[int] | TokenIds) -> str:
        return "".join("ok" if i == MERGED else chr(i) for i in ids)

    def render(self, messages: Sequence[Message]) -> TokenIds:
        return self.encode("\n".join(message.content for message in messages))


class HeldScript:
    """A script that answers only once it is released."""

    def __init__(self) -> None:
        self.asked = asyncio.Semaphore(0)
        """Released once for each answer that was asked for."""
        self.release = asyncio.Event()

    async def __call__(self, _prefix: str) -> str:
        self.asked.release()
        await self.release.wait()
        return "a!"


class FakeEngine:
    """Answers each prefix with what ``script`` says about its text; EOS ends it unless a stop string does."""

    def __init__(self, script: Script, context: int = 1000) -> None:
        self.script = script
        self.context = context
        self.version = PolicyVersion(1, 0)
        self.prefixes: list[list[int]] = []
        self.samplings: list[SamplingParams] = []
        self.loaded: list[tuple[PolicyVersion, dict[str, bytes]]] = []
        self.refused: set[PolicyVersion] = set()
        self.dead = ""
        """Why it can no longer generate."""
        self.away: AwayError | None = None
        """Why its server is away."""

    async def generate(self, prefix: Sequence[int] | TokenIds, sampling: SamplingParams) -> Completion:
        if len(prefix) + sampling.max_tokens > self.context or sampling.max_tokens < 1:
            raise EngineError(f"{len(prefix)} + {sampling.max_tokens} tokens do not fit")
        await self.check_health()
        self.prefixes.append([int(i) for i in prefix])
        self.samplings.append(sampling)
        before = self.version
        said = self.script(FakeText().decode(prefix))
        text = await said if inspect.isawaitable(said) else said
        ids = [ord(c) for c in text]
        if not text.endswith(sampling.stop):
            ids.append(EOS)
        finish = "stop" if len(ids) <= sampling.max_tokens else "length"
        ids = ids[: sampling.max_tokens]
        halves = [(before, 0, 1), (self.version, 1, len(ids))] if before != self.version else [(before, 0, len(ids))]
        return Completion(
            ids=np.array(ids, np.uint32),
            logprobs=-np.arange(1, len(ids) + 1, dtype=np.float32),
            finish=finish,
            spans=tuple(VersionSpan(*half) for half in halves),
            prefilled=len(prefix) // 2,
            cached=len(prefix) - len(prefix) // 2,
        )

    async def load_weights(self, version: PolicyVersion, path: Path) -> None:
        if version in self.refused:
            raise WeightsError(f"{path} does not fit")
        self.loaded.append((version, {file.name: file.read_bytes() for file in path.iterdir()}))  # noqa: ASYNC240
        self.version = version

    async def check_health(self) -> None:
        if self.dead:
            raise EngineError(self.dead)
        if self.away is not None:
            raise self.away

    async def close_engine(self) -> None:
        return


@dataclass(eq=False)
class Session:
    """A live state: the actions performed on it, in order."""

    actions: list[str] = field(default_factory=list[str])
    last: bool = False


class FakeEnvironment:
    """``…s!`` looks something up and is answered with ``[ok N]``, ``…a!`` answers; N counts the session's actions.

    The state is a live session that every step changes; only ``stateless`` hands out a new one each time.
    """

    stop: tuple[str, ...] = ("!",)

    def __init__(self, forking: Forking = "stateless") -> None:
        self.forking: Forking = forking
        self.fail: Callable[[Session, str], bool] = lambda _session, _action: False
        self.observe: Callable[[int], str] = lambda number: f"[ok {number}]"
        self.away: AwayError | None = None
        """Why its tool is away."""
        self.probes = 0
        self.calls = 0
        self.starts = 0

    async def start(self, question: Question) -> Session:
        self.starts += 1
        return Session()

    async def fork(self, state: Session) -> Session:
        assert self.forking == "fork", "only a forkable environment is forked"
        return Session(list(state.actions))

    async def probe(self) -> None:
        self.probes += 1
        if self.away is not None:
            raise self.away

    async def step(self, state: Session, action: str, *, last: bool) -> Outcome[Session]:
        if self.forking == "stateless":
            state = Session(list(state.actions))
        state.actions.append(action)
        state.last = last
        if last or action.endswith("a!"):
            return Outcome(state, None)
        if not action.endswith("s!"):
            return Outcome(state, "[hint]", valid=False)
        if self.away is not None:
            raise self.away
        if self.fail(state, action):
            raise ToolError("the tool is broken")
        self.calls += 1
        return Outcome(state, self.observe(len(state.actions)), (ToolCall("look", action),))

    def score(self, state: Session) -> Mapping[str, float]:
        return {"right": float(state.actions[-1].endswith("a!")), "length": -0.01 * len("".join(state.actions))}

    def metrics(self, state: Session) -> Mapping[str, float]:
        return {"actions": float(len(state.actions)), "last": float(state.last)}


def turns(prefix: str) -> int:
    """Turns already in a prefix of the fake environment."""
    return prefix.count("[")


def deep(tools: int) -> Script:
    """A policy that looks up ``tools`` times and then answers."""
    return lambda prefix: "s!" if turns(prefix) < tools else "ok a!"


def plan(trees: int = 2, rounds: int = 1, expansions: int = 2, **limits: Any) -> Plan:
    defaults: dict[str, Any] = {"max_turns": 4, "max_action_tokens": 16, "max_context": 200, "temperature": 1.0}
    return Plan(trees, rounds, expansions, **{**defaults, **limits})


def lease(shape: Plan, *, name: str = "lease-1", seed: int = 7, grant: Budget | None = None, prompt: str = "Q: ok?") -> Lease:
    question = Question("fake/train/0", "fake", (Message("user", prompt),), ("a",))
    return Lease(name, LeaseKind.TRAIN, question, shape, grant or shape.grant, seed, PolicyVersion(1, 0))
