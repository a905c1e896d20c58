"""The environment's side of a turn: actions performed, episodes scored, and its faults kept to the branch that met them."""

from __future__ import annotations

import contextlib
import logging
import traceback
from collections.abc import Generator, Mapping
from typing import Any

from services.environments.base import Environment, Outcome
from services.sampler.expansion.availability import Outage
from services.sampler.expansion.branch import Turn
from services.sampler.expansion.call_timer import Clock
from services.sampler.expansion.lease_budget import charged
from services.sampler.expansion.retries import Retries, within
from treegrpo.core.budget import Cost
from treegrpo.core.step import Leaf
from treegrpo.errors import EnvironmentFaultError, ToolError
from treegrpo.observability.metrics import SamplerMetrics
from treegrpo.wire.size_limits import LARGEST

log = logging.getLogger(__name__)


class Performer:
    def __init__(self, environment: Environment[Any], retries: Retries, clock: Clock, metrics: SamplerMetrics) -> None:
        self._environment = environment
        self._retries = retries
        self._clock = clock
        self._metrics = metrics
        self._faults: set[tuple[str, str]] = set()
        """Those that the log has: what was raised, and where."""
        self.outage = Outage(environment.probe, metrics)

    async def perform(self, turn: Turn, action: str, *, last: bool) -> Outcome[Any]:
        """What ``action`` leads to. Raises ToolError, EnvironmentFaultError, and as `Retries.run`."""

        async def attempt() -> Outcome[Any]:
            with self._clock.turn("environment", turn.branch.bill), self.guarded():
                return await within(self._step(turn, action, last), ToolError, "The environment")

        return await self._retries.run(attempt, self.outage, turn.branch.gate)

    async def _step(self, turn: Turn, action: str, last: bool) -> Outcome[Any]:
        bill = turn.branch.bill
        state = await turn.branch.states.at(turn.parent, turn.actions, bill)
        with charged(bill, Cost(tool_calls=int(not last))):
            outcome = await self._environment.step(state, action, last=last)
        bill.charge(Cost(tool_calls=len(outcome.tool_calls)))
        if last and outcome.observation is not None:
            who = type(self._environment).__name__
            raise EnvironmentFaultError(f"{who} answered the last action with an observation; with last=True it must end.")
        return outcome

    @contextlib.contextmanager
    def guarded(self) -> Generator[None]:
        """Whatever the environment raises in the block, but for ToolError, is a fault of its own, counted and named once."""
        try:
            yield
        except ToolError:
            raise
        except Exception as error:
            kind = type(error).__name__
            self._metrics.errors.labels(kind).inc()
            if (fault := (kind, _place(error))) not in self._faults:
                self._faults.add(fault)
                log.exception(
                    "%s is at fault; its branches are left out, and from now on only counted", type(self._environment).__name__
                )
            if isinstance(error, EnvironmentFaultError):
                raise
            raise EnvironmentFaultError(f"{kind}: {error}" if str(error) else kind) from error

    def score(self, node: int, state: Any) -> Leaf:
        """The end of an episode. Raises EnvironmentFaultError."""
        with self.guarded():
            leaf = Leaf(node, _floats(self._environment.score(state)), _floats(self._environment.metrics(state)))
            if not all(abs(number) <= LARGEST for number in (*leaf.rewards.values(), *leaf.metrics.values())):
                raise EnvironmentFaultError(
                    f"{type(self._environment).__name__} scored an episode with {leaf.rewards} and {leaf.metrics}; "
                    f"every number must be finite, and none beyond {LARGEST:g}."
                )
        return leaf


def _floats(numbers: Mapping[str, float]) -> dict[str, float]:
    return {name: float(number) for name, number in numbers.items()}


def _place(error: Exception) -> str:
    """File and line that raised."""
    last = traceback.extract_tb(error.__traceback__)[-1]
    return f"{last.filename}:{last.lineno}"
