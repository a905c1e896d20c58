"""Environment states of one tree, so that a branch can continue from any of its nodes."""

from __future__ import annotations

import asyncio
from typing import Any

from services.environments.base import Environment
from services.sampler.expansion.lease_budget import BranchCostMeter, charge_failed_call
from treegrpo.core.budget import Cost
from treegrpo.core.question import Question
from treegrpo.core.step import ROOT
from treegrpo.errors import ToolError


class StateCache:
    """Provides states to step from; each may be stepped from once, however often its node is continued.

    - ``stateless``: the cached value itself, it never changes.
    - ``fork``: a copy; the cached one stays as it is.
    - ``replay``: the live state to the first caller, to all others a new episode in which the path's actions are
      performed again.

    The state of a node that another sampler has made is made by performing its path's actions, once.
    """

    def __init__(self, environment: Environment[Any], question: Question) -> None:
        self._environment = environment
        self._question = question
        self._states: dict[int, Any] = {}
        self._replaying: dict[int, asyncio.Lock] = {}

    def store_state(self, node: int, state: Any) -> None:
        """Cache the state after ``node``."""
        self._states[node] = state

    async def state_after(self, node: int, actions: list[str], meter: BranchCostMeter) -> Any:
        """A state after ``node``; ``actions`` are the texts of its path, in case they have to be performed again.

        Raises:
            ToolError: the environment could not provide one.
        """
        if node == ROOT:
            return await self._environment.start(self._question)
        if self._environment.forking == "replay":
            return self._states.pop(node) if node in self._states else await self._replay(actions, meter)
        async with self._replaying.setdefault(node, asyncio.Lock()):
            if node not in self._states:
                self._states[node] = await self._replay(actions, meter)
        state = self._states[node]
        return state if self._environment.forking == "stateless" else await self._environment.fork(state)

    async def _replay(self, actions: list[str], meter: BranchCostMeter) -> Any:
        state = await self._environment.start(self._question)
        for action in actions:
            with charge_failed_call(meter, Cost(tool_calls=1)):
                outcome = await self._environment.step(state, action, last=False)
            meter.charge(Cost(tool_calls=len(outcome.tool_calls)))
            if outcome.observation is None:
                raise ToolError(
                    f"The replay of {len(actions)} actions ended the episode early; the environment is not deterministic."
                )
            state = outcome.state
        return state
