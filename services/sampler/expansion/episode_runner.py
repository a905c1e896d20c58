"""Runs one branch: the policy acts, the environment answers, until the episode ends.

    prefix ids ─► engine.generate ─► action ids ─► decode ─► environment.step ─► encode ─► observation ids ─┐
        ▲                                                                                                   │
        └────────────────────────────────────── prefix + action + observation ──────────────────────────────┘

Ids go in and ids come out: what the policy produced is decoded for the environment to read, never encoded again.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from services.environments.base import Environment, Outcome
from services.sampler.engines.base import Completion, Engine, SamplingParams
from services.sampler.expansion.availability import AvailabilityMonitor, CallTimings
from services.sampler.expansion.branch import Branch, Turn, first_node
from services.sampler.expansion.call_timer import CallTimer
from services.sampler.expansion.environment_runner import EnvironmentRunner
from services.sampler.expansion.retries import CallRetrier
from services.sampler.text.encoding import TextCodec, encode_text
from treegrpo.core.budget import Budget, Cost
from treegrpo.core.lease import Plan
from treegrpo.core.step import Leaf, Step, StepStatus, Subtree, TokenIds
from treegrpo.core.validation import check_steps, tree_label
from treegrpo.errors import EngineError, EnvironmentFaultError, ToolError, TreeError
from treegrpo.observability.metrics import SamplerMetrics
from treegrpo.wire.size_limits import TEXT_LENGTH

_NO_TOKENS = np.zeros(0, np.uint32)


@dataclass(frozen=True, slots=True)
class _TurnResult:
    step: Step
    leaf: Leaf | None
    action: str
    error: str = ""
    """Why it failed."""

    @property
    def ends_episode(self) -> bool:
        return self.leaf is not None or self.step.status.failed


class EpisodeRunner:
    """Runs branches with one engine and one environment. Safe to use from many tasks."""

    def __init__(
        self,
        engine: Engine,
        environment: Environment[Any],
        text: TextCodec,
        retries: int,
        metrics: SamplerMetrics,
        timings: CallTimings,
    ) -> None:
        self._engine = engine
        self._environment = environment
        self._text = text
        self._metrics = metrics
        self._retrier = CallRetrier(retries, metrics, timings)
        self.call_timer = CallTimer(metrics)
        self.tools = AvailabilityMonitor(environment.probe, metrics, timings)
        """Availability of the environment's tools."""
        self.engine = AvailabilityMonitor(engine.check_health, metrics, timings)
        """Availability of the engine."""
        self._environment_runner = EnvironmentRunner(environment, self.tools, self._retrier, self.call_timer, metrics)

    @property
    def unavailable_reason(self) -> str:
        """What has been unavailable for longer than any branch waits, in words; empty if nothing has."""
        waits = [monitor.wait_reason for monitor in (self.tools, self.engine) if monitor.wait_limit_passed]
        return next((wait.what for wait in waits if wait is not None), "")

    def context_limit(self, plan: Plan) -> int:
        """Tokens an episode may have."""
        return min(plan.max_context, self._engine.context)

    def first_step_limit(self, branch: Branch) -> Budget:
        """The largest possible cost of the first step of ``branch``."""
        plan, length = branch.lease.plan, len(branch.prefix)
        tools = len(branch.tree.path(branch.parent)) < plan.max_turns
        return Budget(length + self._max_tokens(plan, length), int(tools))

    async def run_episode(self, branch: Branch) -> tuple[Subtree, str]:
        """Continue the episode to its end. An error that retries do not cure ends it without a leaf, for the reason returned.

        Raises:
            DeadlineError: engine or tool was unavailable for too long, or the lease was stopped meanwhile.
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
            result = await self._run_turn(Turn(branch, first + len(steps), parent, prefix, actions, last))
            steps.append(result.step)
            leaf, error = result.leaf, result.error
            if result.ends_episode:
                break
            actions.append(result.action)
            prefix, parent = np.concatenate([prefix, result.step.action, result.step.observation]), result.step.node
        subtree = Subtree(
            lease=branch.lease.id,
            tree=branch.tree_index,
            index=branch.index,
            parent=branch.parent,
            steps=tuple(steps),
            leaves=(leaf,) if leaf else (),
            prompt=branch.tree.prompt if branch.index == 0 else _NO_TOKENS,
        )
        return subtree, error

    async def _run_turn(self, turn: Turn) -> _TurnResult:
        try:
            completion = await self._generate(turn)
        except EngineError as error:
            cost = turn.branch.meter.take_step_cost()
            no_logprobs = np.zeros(0, np.float32)
            step = Step(turn.node, turn.parent, _NO_TOKENS, no_logprobs, _NO_TOKENS, (), StepStatus.ENGINE_ERROR, cost=cost)
            return _TurnResult(step, None, "", str(error))
        text = self._text.decode(completion.ids)
        try:
            return await self._apply_action(turn, completion, text)
        except (ToolError, EnvironmentFaultError) as error:
            status = StepStatus.TOOL_ERROR if isinstance(error, ToolError) else StepStatus.ENVIRONMENT_ERROR
            return _TurnResult(_step(turn, completion, status), None, text, str(error))

    async def _apply_action(self, turn: Turn, completion: Completion, text: str) -> _TurnResult:
        """Pass an action to the environment. Raises ToolError, EnvironmentFaultError, and as `run_episode`."""
        truncated = completion.finish == "length"
        outcome = await self._environment_runner.perform_action(turn, text, last=turn.last or truncated)
        with self._environment_runner.contain_faults():
            observation = _NO_TOKENS if outcome.observation is None else await encode_text(self._text, outcome.observation)
        length = len(turn.prefix) + len(completion.ids) + len(observation)
        if outcome.observation is not None and length < self.context_limit(turn.branch.lease.plan):
            turn.branch.states.store_state(turn.node, outcome.state)
            return _TurnResult(_step(turn, completion, StepStatus.OK, outcome, observation), None, text)
        # An observation that leaves no room for an action is dropped: the episode ends with the action before it.
        truncated = truncated or outcome.observation is not None
        leaf = self._environment_runner.score_episode(turn.node, outcome.state)
        return _TurnResult(_step(turn, completion, StepStatus.TRUNCATED if truncated else StepStatus.OK, outcome), leaf, text)

    def _max_tokens(self, plan: Plan, length: int) -> int:
        return min(plan.max_action_tokens, self.context_limit(plan) - length)

    async def _generate(self, turn: Turn) -> Completion:
        plan = turn.branch.lease.plan
        stop = tuple(self._environment.stop)
        sampling = SamplingParams(self._max_tokens(plan, len(turn.prefix)), plan.temperature, stop, turn.seed)

        async def attempt() -> Completion:
            await turn.branch.control.wait_until_running()
            with self.call_timer.time_call("engine", turn.branch.meter):
                generation = self._engine.generate(turn.prefix, sampling)
                completion = await self._retrier.with_timeout(generation, EngineError, "The engine")
            cost = Cost(completion.prefilled, completion.cached, len(completion.ids))
            turn.branch.meter.charge(cost)
            for how in ("prefilled", "cached", "decoded"):
                self._metrics.tokens.labels(how).inc(getattr(cost, how))
            _check_completion(turn, completion)
            return completion

        return await self._retrier.call_with_retries(attempt, self.engine, turn.branch.control)


def _check_completion(turn: Turn, completion: Completion) -> None:
    """Raise EngineError for a completion that could not be trained on, before the learner refuses it."""
    where = tree_label(turn.branch.lease.id, turn.branch.tree_index)
    try:
        check_steps((Step(turn.node, turn.parent, completion.ids, completion.logprobs, _NO_TOKENS, completion.spans),), where)
    except TreeError as error:
        raise EngineError(f"The engine's completion is invalid ({error}); see its log.") from error


def _step(
    turn: Turn,
    completion: Completion,
    status: StepStatus,
    outcome: Outcome[Any] | None = None,
    observation: TokenIds = _NO_TOKENS,
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
        cost=turn.branch.meter.take_step_cost(),
    )
