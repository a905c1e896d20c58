"""One branch: the policy acts, the environment answers, until the episode ends.

    prefix ids ─► engine.generate ─► action ids ─► decode ─► environment.step ─► encode ─► observation ids ─┐
        ▲                                                                                                   │
        └────────────────────────────────────── prefix + action + observation ──────────────────────────────┘

Ids go in and ids come out: what the policy produced is decoded for the environment to read, never encoded again.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Awaitable, Callable, Generator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import numpy as np

from services.environments.base import Environment, Outcome
from services.sampler.allowance import Bill
from services.sampler.engines.base import Completion, Engine, Sampling
from services.sampler.gate import Gate
from services.sampler.states import States
from treegrpo.budget import Budget, Cost
from treegrpo.errors import ContractError, EngineError, ToolError, TreeError
from treegrpo.lease import Lease, Plan
from treegrpo.question import Message
from treegrpo.soundness import check_steps, name
from treegrpo.step import Leaf, Step, StepStatus, Subtree, TokenIds
from treegrpo.telemetry import SamplerMetrics
from treegrpo.tree import Tree

log = logging.getLogger(__name__)
FIRST_WAIT_SECONDS = 0.1
"""Before the first retry; doubles with each."""
ATTEMPT_SECONDS = 600.0
"""The longest one attempt of an engine or an environment may take, whatever its own time-outs."""
_NONE = np.zeros(0, np.uint32)
Result = TypeVar("Result")


class Text(Protocol):
    """The part of a tokenizer that episodes need."""

    def encode(self, text: str) -> TokenIds: ...

    def decode(self, ids: Sequence[int] | TokenIds) -> str: ...

    def render(self, messages: Sequence[Message]) -> TokenIds: ...


def first_node(index: int, plan: Plan) -> int:
    """The node ids of an expansion follow from its index alone: it has at most max_turns + 1 steps."""
    return 1 + index * (plan.max_turns + 1)


@dataclass(frozen=True, slots=True)
class Branch:
    """An expansion to be played: node ``parent`` of a tree, continued to the end of the episode."""

    lease: Lease
    tree_index: int
    index: int
    parent: int
    tree: Tree
    """The tree as it is now; its prompt and the path to ``parent`` are the prefix."""
    states: States
    bill: Bill
    gate: Gate

    @property
    def prefix(self) -> TokenIds:
        """[n] prompt and path, as sampled."""
        return np.concatenate(
            [self.tree.prompt, *(part for step in self.tree.path(self.parent) for part in (step.action, step.observation))]
        )


@dataclass(frozen=True, slots=True)
class _Turn:
    """A turn about to be played."""

    branch: Branch
    node: int
    parent: int
    prefix: TokenIds
    actions: list[str]
    """Texts of the actions before it."""
    last: bool
    """Tools may no longer be used."""


@dataclass(frozen=True, slots=True)
class _Played:
    step: Step
    leaf: Leaf | None
    action: str

    @property
    def ended(self) -> bool:
        return self.leaf is not None or self.step.status.failed


class Player:
    """Plays branches with one engine and one environment. Safe to use from many tasks."""

    def __init__(self, engine: Engine, environment: Environment[Any], text: Text, retries: int, metrics: SamplerMetrics) -> None:
        self._engine = engine
        self._environment = environment
        self._text = text
        self._retries = retries
        self._metrics = metrics

    def context(self, plan: Plan) -> int:
        """Tokens an episode may have."""
        return min(plan.max_context, self._engine.context)

    def next_step(self, branch: Branch) -> Budget:
        """The most that the first step of ``branch`` can cost."""
        plan, length = branch.lease.plan, len(branch.prefix)
        tools = len(branch.tree.path(branch.parent)) < plan.max_turns
        return Budget(length + self._max_tokens(plan, length), int(tools))

    async def play(self, branch: Branch) -> Subtree:
        """Continue the episode to its end. An error that retries do not cure ends it without a leaf."""
        path = branch.tree.path(branch.parent)
        actions = [self._text.decode(step.action) for step in path]
        prefix, parent = branch.prefix, branch.parent
        steps: list[Step] = []
        leaf: Leaf | None = None
        first = first_node(branch.index, branch.lease.plan)
        for depth in range(len(path), branch.lease.plan.max_turns + 1):
            last = depth == branch.lease.plan.max_turns
            played = await self._turn(_Turn(branch, first + len(steps), parent, prefix, actions, last))
            steps.append(played.step)
            leaf = played.leaf
            if played.ended:
                break
            actions.append(played.action)
            prefix, parent = np.concatenate([prefix, played.step.action, played.step.observation]), played.step.node
        return Subtree(
            lease=branch.lease.id,
            tree=branch.tree_index,
            index=branch.index,
            parent=branch.parent,
            steps=tuple(steps),
            leaves=(leaf,) if leaf else (),
            prompt=branch.tree.prompt if branch.index == 0 else _NONE,
        )

    async def _turn(self, turn: _Turn) -> _Played:
        bill = turn.branch.bill
        try:
            completion = await self._generate(turn)
        except EngineError:
            step = Step(
                turn.node, turn.parent, _NONE, np.zeros(0, np.float32), _NONE, (), StepStatus.ENGINE_ERROR, cost=bill.close_step()
            )
            return _Played(step, None, "")
        text = self._text.decode(completion.ids)
        truncated = completion.finish == "length"
        try:
            outcome = await self._perform(turn, text, last=turn.last or truncated)
        except ToolError:
            return _Played(_step(turn, completion, StepStatus.TOOL_ERROR), None, text)
        observation = _NONE if outcome.observation is None else self._text.encode(outcome.observation)
        length = len(turn.prefix) + len(completion.ids) + len(observation)
        if outcome.observation is not None and length < self.context(turn.branch.lease.plan):
            turn.branch.states.keep(turn.node, outcome.state)
            return _Played(_step(turn, completion, StepStatus.OK, outcome, observation), None, text)
        # An observation after which nobody could act is left out: the episode ends with the action that asked for it.
        truncated = truncated or outcome.observation is not None
        step = _step(turn, completion, StepStatus.TRUNCATED if truncated else StepStatus.OK, outcome)
        score, metrics = self._environment.score(outcome.state), self._environment.metrics(outcome.state)
        return _Played(step, Leaf(turn.node, dict(score), dict(metrics)), text)

    def _max_tokens(self, plan: Plan, length: int) -> int:
        return min(plan.max_action_tokens, self.context(plan) - length)

    async def _generate(self, turn: _Turn) -> Completion:
        plan = turn.branch.lease.plan
        sampling = Sampling(self._max_tokens(plan, len(turn.prefix)), plan.temperature, tuple(self._environment.stop))

        async def attempt() -> Completion:
            await turn.branch.gate.open()
            with self._clock("engine", turn.branch.bill):
                completion = await _within(self._engine.generate(turn.prefix, sampling), EngineError, "The engine")
            cost = Cost(completion.prefilled, completion.cached, len(completion.ids))
            turn.branch.bill.charge(cost)
            for how in ("prefilled", "cached", "decoded"):
                self._metrics.tokens.labels(how).inc(getattr(cost, how))
            _check(turn, completion)
            return completion

        return await self._retried(attempt)

    async def _perform(self, turn: _Turn, action: str, *, last: bool) -> Outcome[Any]:
        bill = turn.branch.bill

        async def attempt() -> Outcome[Any]:
            with self._clock("environment", bill):
                return await _within(self._step(turn, action, last), ToolError, "The environment")

        outcome = await self._retried(attempt)
        bill.charge(Cost(tool_calls=len(outcome.tool_calls)))
        if last and outcome.observation is not None:
            raise ContractError(
                f"{type(self._environment).__name__} answered the last action with an observation; with last=True it must end."
            )
        return outcome

    async def _step(self, turn: _Turn, action: str, last: bool) -> Outcome[Any]:
        state = await turn.branch.states.at(turn.parent, turn.actions, turn.branch.bill)
        try:
            return await self._environment.step(state, action, last=last)
        except ToolError:
            turn.branch.bill.charge(Cost(tool_calls=int(not last)))  # the call was made, whatever became of it
            raise

    async def _retried(self, attempt: Callable[[], Awaitable[Result]]) -> Result:
        """The result of the first attempt that succeeds. Raises the last one's EngineError or ToolError."""
        for wait in [FIRST_WAIT_SECONDS * 2**k for k in range(self._retries)]:
            try:
                return await attempt()
            except (EngineError, ToolError) as error:
                self._count(error)
                log.warning("trying again in %.1f s: %s", wait, error)
                await asyncio.sleep(wait)
        try:
            return await attempt()
        except (EngineError, ToolError) as error:
            self._count(error)
            log.warning("a branch is left out after %d attempts: %s", self._retries + 1, error)
            raise

    def _count(self, error: Exception) -> None:
        self._metrics.errors.labels(type(error).__name__).inc()

    @contextlib.contextmanager
    def _clock(self, part: str, bill: Bill) -> Generator[None]:
        """Charge the seconds of the block, failed or not."""
        began = time.monotonic()
        try:
            yield
        finally:
            seconds = time.monotonic() - began
            bill.charge(Cost(seconds=seconds))
            self._metrics.turn.labels(part).observe(seconds)


async def _within(work: Awaitable[Result], error: type[EngineError | ToolError], who: str) -> Result:
    """Wait ATTEMPT_SECONDS for ``work`` at most. Raises ``error`` afterwards."""
    try:
        async with asyncio.timeout(ATTEMPT_SECONDS):
            return await work
    except TimeoutError as late:
        raise error(f"{who} did not answer within {ATTEMPT_SECONDS:.0f} s; see its log.") from late


def _check(turn: _Turn, completion: Completion) -> None:
    """An answer that could not be trained on is an engine that failed, before the learner refuses it. Raises EngineError."""
    where = name(turn.branch.lease.id, turn.branch.tree_index)
    try:
        check_steps((Step(turn.node, turn.parent, completion.ids, completion.logprobs, _NONE, completion.spans),), where)
    except TreeError as error:
        raise EngineError(f"The engine's answer is of no use ({error}); see its log.") from error


def _step(
    turn: _Turn, completion: Completion, status: StepStatus, outcome: Outcome[Any] | None = None, observation: TokenIds = _NONE
) -> Step:
    tool = outcome.tool_calls[0] if outcome and outcome.tool_calls else None
    return Step(
        node=turn.node,
        parent=turn.parent,
        action=completion.ids,
        logprobs=completion.logprobs,
        observation=observation,
        spans=completion.spans,
        status=status,
        tool=tool.name if tool else "",
        tool_arguments=tool.arguments if tool else "",
        valid=outcome.valid if outcome else True,
        cost=turn.branch.bill.close_step(),
    )
