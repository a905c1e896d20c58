"""Runs environment calls of a turn: performs actions, scores episodes, and confines faults to the branch that met them."""

from __future__ import annotations

import contextlib
import logging
import traceback
from collections.abc import Generator, Mapping
from typing import Any

from services.environments.base import Environment, Outcome
from services.sampler.expansion.availability import AvailabilityMonitor
from services.sampler.expansion.branch import Turn
from services.sampler.expansion.call_timer import CallTimer
from services.sampler.expansion.lease_budget import charge_failed_call
from services.sampler.expansion.retries import CallRetrier
from treegrpo.core.budget import Cost
from treegrpo.core.step import Leaf
from treegrpo.errors import EnvironmentFaultError, ToolError
from treegrpo.observability.metrics import SamplerMetrics
from treegrpo.wire.size_limits import LARGEST

log = logging.getLogger(__name__)


class EnvironmentRunner:
    """Calls one environment on behalf of all branches, with retries, timing and fault isolation."""

    def __init__(
        self,
        environment: Environment[Any],
        availability: AvailabilityMonitor,
        retrier: CallRetrier,
        call_timer: CallTimer,
        metrics: SamplerMetrics,
    ) -> None:
        self._environment = environment
        self._availability = availability
        self._retrier = retrier
        self._call_timer = call_timer
        self._metrics = metrics
        self._logged_faults: set[tuple[str, str]] = set()
        """Type and place of each fault that is in the log already."""

    async def perform_action(self, turn: Turn, action: str, *, last: bool) -> Outcome[Any]:
        """Perform ``action``. Raises ToolError, EnvironmentFaultError, and as `CallRetrier.call_with_retries`."""

        async def attempt() -> Outcome[Any]:
            with self._call_timer.time_call("environment", turn.branch.meter), self.contain_faults():
                return await self._retrier.with_timeout(self._step(turn, action, last), ToolError, "The environment")

        return await self._retrier.call_with_retries(attempt, self._availability, turn.branch.control)

    async def _step(self, turn: Turn, action: str, last: bool) -> Outcome[Any]:
        meter = turn.branch.meter
        state = await turn.branch.states.state_after(turn.parent, turn.actions, meter)
        with charge_failed_call(meter, Cost(tool_calls=int(not last))):
            outcome = await self._environment.step(state, action, last=last)
        meter.charge(Cost(tool_calls=len(outcome.tool_calls)))
        if last and outcome.observation is not None:
            name = type(self._environment).__name__
            raise EnvironmentFaultError(f"{name} answered the last action with an observation; with last=True it must end.")
        return outcome

    @contextlib.contextmanager
    def contain_faults(self) -> Generator[None]:
        """Turn any exception but ToolError into an EnvironmentFaultError; count each, log each once."""
        try:
            yield
        except ToolError:
            raise
        except Exception as error:
            kind = type(error).__name__
            self._metrics.errors.labels(kind).inc()
            if (fault := (kind, _raised_at(error))) not in self._logged_faults:
                self._logged_faults.add(fault)
                log.exception(
                    "%s has a fault; its branches are left out, and further occurrences are counted but not logged",
                    type(self._environment).__name__,
                )
            if isinstance(error, EnvironmentFaultError):
                raise
            raise EnvironmentFaultError(f"{kind}: {error}" if str(error) else kind) from error

    def score_episode(self, node: int, state: Any) -> Leaf:
        """Score a finished episode. Raises EnvironmentFaultError."""
        with self.contain_faults():
            leaf = Leaf(node, _floats(self._environment.score(state)), _floats(self._environment.metrics(state)))
            if not all(abs(number) <= LARGEST for number in (*leaf.rewards.values(), *leaf.metrics.values())):
                raise EnvironmentFaultError(
                    f"{type(self._environment).__name__} scored an episode with {leaf.rewards} and {leaf.metrics}; "
                    f"every number must be finite and at most {LARGEST:g} in magnitude."
                )
        return leaf


def _floats(numbers: Mapping[str, float]) -> dict[str, float]:
    return {name: float(number) for name, number in numbers.items()}


def _raised_at(error: Exception) -> str:
    """File and line that raised."""
    last = traceback.extract_tb(error.__traceback__)[-1]
    return f"{last.filename}:{last.lineno}"
