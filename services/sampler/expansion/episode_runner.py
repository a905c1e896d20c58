"""One branch: the policy acts, the environment answers, until the episode ends.

    prefix ids ─► engine.generate ─► action ids ─► decode ─► environment.step ─► encode ─► observation ids ─┐
        ▲                                                                                                   │
        └────────────────────────────────────── prefix + action + observation ──────────────────────────────┘

Ids go in and ids come out: what the policy produced is decoded for the environment to read, never encoded again.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from services.environments.base import Environment, Outcome
from services.sampler.engines.base import Completion, Engine, Sampling
from services.sampler.expansion.availability import Outage
from services.sampler.expansion.branch import Branch, Turn, first_node
from services.sampler.expansion.call_timer import Clock
from services.sampler.expansion.environment_runner import Performer
from services.sampler.expansion.retries import Retries, within
from services.sampler.text.encoding import encode_text
from treegrpo.core.budget import Budget, Cost
from treegrpo.core.lease import Plan
from treegrpo.core.question import Message
from treegrpo.core.step import Leaf, Step, StepStatus, Subtree, TokenIds
from treegrpo.core.validation import check_steps, tree_label
from treegrpo.errors import EngineError, EnvironmentFaultError, ToolError, TreeError
from treegrpo.observability.metrics import SamplerMetrics
from treegrpo.wire.size_limits import TEXT_LENGTH

_NONE = np.zeros(0, np.uint32)


class Text(Protocol):
    """The part of a tokenizer that episodes need."""

    def encode(self, text: str) -> TokenIds: ...

    def decode(self, ids: Sequence[int] | TokenIds) -> str: ...

    def render(self, messages: Sequence[Message]) -> TokenIds: ...


@dataclass(frozen=True, slots=True)
class _Played:
    step: Step
    leaf: Leaf | None
    action: str
    error: str = ""
    """Why it failed."""

    @property
    def ended(self) -> bool:
        return self.leaf is not None or self.step.status.failed


class Player:
    """Plays branches with one engine and one environment. Safe to use from many tasks."""

    def __init__(self, engine: Engine, environment: Environment[Any], text: Text, retries: int, metrics: SamplerMetrics) -> None:
        self._engine = engine
        self._environment = environment
        self._text = text
        self._metrics = metrics
        self.clock = Clock(metrics)
        self._retries = Retries(retries, metrics)
        self._outage = Outage(engine.health, metrics)
        self._performer = Performer(environment, self._retries, self.clock, metrics)

    @property
    def outages(self) -> tuple[Outage, Outage]:
        """Of the environment's tools and of the engine."""
        return self._performer.outage, self._outage

    @property
    def missing(self) -> str:
        """What is away for so long that nothing should be begun, in words; empty while there is hope."""
        return next((outage.want.what for outage in self.outages if outage.given_up and outage.want), "")

    def context(self, plan: Plan) -> int:
        """Tokens an episode may have."""
        return min(plan.max_context, self._engine.context)

    def next_step(self, branch: Branch) -> Budget:
        """The most that the first step of ``branch`` can cost."""
        plan, length = branch.lease.plan, len(branch.prefix)
        tools = len(branch.tree.path(branch.parent)) < plan.max_turns
        return Budget(length + self._max_tokens(plan, length), int(tools))

    async def play(self, branch: Branch) -> tuple[Subtree, str]:
        """Continue the episode to its end. An error that retries do not cure ends it without a leaf, for the reason returned.

        Raises:
            DeadlineError: the engine or a tool was away for too long, or the lease came to its end meanwhile.
        """
        path = branch.tree.path(branch.parent)
        actions = [self._text.decode(step.action) for step in path]
        prefix, parent = branch.prefix, branch.parent
        steps: list[Step] = []
        leaf: Leaf | None = None
        error = ""
        first = first_node(branch.index, branch.lease.plan)
        for depth in range(len(path), branch.lease.plan.max_turns + 1):
            last = depth == branch.lease.plan.max_turns
            played = await self._turn(Turn(branch, first + len(steps), parent, prefix, actions, last))
            steps.append(played.step)
            leaf, error = played.leaf, played.error
            if played.ended:
                break
            actions.append(played.action)
            prefix, parent = np.concatenate([prefix, played.step.action, played.step.observation]), played.step.node
        subtree = Subtree(
            lease=branch.lease.id,
            tree=branch.tree_index,
            index=branch.index,
            parent=branch.parent,
            steps=tuple(steps),
            leaves=(leaf,) if leaf else (),
            prompt=branch.tree.prompt if branch.index == 0 else _NONE,
        )
        return subtree, error

    async def _turn(self, turn: Turn) -> _Played:
        try:
            completion = await self._generate(turn)
        except EngineError as error:
            cost = turn.branch.bill.close_step()
            nothing = np.zeros(0, np.float32)
            step = Step(turn.node, turn.parent, _NONE, nothing, _NONE, (), StepStatus.ENGINE_ERROR, cost=cost)
            return _Played(step, None, "", str(error))
        text = self._text.decode(completion.ids)
        try:
            return await self._answered(turn, completion, text)
        except (ToolError, EnvironmentFaultError) as error:
            status = StepStatus.TOOL_ERROR if isinstance(error, ToolError) else StepStatus.ENVIRONMENT_ERROR
            return _Played(_step(turn, completion, status), None, text, str(error))

    async def _answered(self, turn: Turn, completion: Completion, text: str) -> _Played:
        """What the environment makes of an action. Raises ToolError, EnvironmentFaultError, and as `play`."""
        truncated = completion.finish == "length"
        outcome = await self._performer.perform(turn, text, last=turn.last or truncated)
        with self._performer.guarded():
            observation = _NONE if outcome.observation is None else await encode_text(self._text, outcome.observation)
        length = len(turn.prefix) + len(completion.ids) + len(observation)
        if outcome.observation is not None and length < self.context(turn.branch.lease.plan):
            turn.branch.states.keep(turn.node, outcome.state)
            return _Played(_step(turn, completion, StepStatus.OK, outcome, observation), None, text)
        # An observation after which nobody could act is left out: the episode ends with the action that asked for it.
        truncated = truncated or outcome.observation is not None
        leaf = self._performer.score(turn.node, outcome.state)
        return _Played(_step(turn, completion, StepStatus.TRUNCATED if truncated else StepStatus.OK, outcome), leaf, text)

    def _max_tokens(self, plan: Plan, length: int) -> int:
        return min(plan.max_action_tokens, self.context(plan) - length)

    async def _generate(self, turn: Turn) -> Completion:
        plan = turn.branch.lease.plan
        stop = tuple(self._environment.stop)
        sampling = Sampling(self._max_tokens(plan, len(turn.prefix)), plan.temperature, stop, turn.seed)

        async def attempt() -> Completion:
            await turn.branch.gate.open()
            with self.clock.turn("engine", turn.branch.bill):
                completion = await within(self._engine.generate(turn.prefix, sampling), EngineError, "The engine")
            cost = Cost(completion.prefilled, completion.cached, len(completion.ids))
            turn.branch.bill.charge(cost)
            for how in ("prefilled", "cached", "decoded"):
                self._metrics.tokens.labels(how).inc(getattr(cost, how))
            _check(turn, completion)
            return completion

        return await self._retries.run(attempt, self._outage, turn.branch.gate)


def _check(turn: Turn, completion: Completion) -> None:
    """An answer that could not be trained on is an engine that failed, before the learner refuses it. Raises EngineError."""
    where = tree_label(turn.branch.lease.id, turn.branch.tree_index)
    try:
        check_steps((Step(turn.node, turn.parent, completion.ids, completion.logprobs, _NONE, completion.spans),), where)
    except TreeError as error:
        raise EngineError(f"The engine's answer is of no use ({error}); see its log.") from error


def _step(
    turn: Turn, completion: Completion, status: StepStatus, outcome: Outcome[Any] | None = None, observation: TokenIds = _NONE
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
        tool_arguments=tool.arguments[: max(0, TEXT_LENGTH - len(tool.name))] if tool else "",  # the learner takes no more
        valid=outcome.valid if outcome else True,
        cost=turn.branch.bill.close_step(),
    )
