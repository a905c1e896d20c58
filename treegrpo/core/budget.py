"""Measured costs of rollouts, and their budgets.

A budget is counted in two currencies: *computed tokens* (prefilled + decoded; tokens served from a prefix cache
are free) and *tool calls*.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Cost:
    """The metered price of some work. Costs add up with ``+``."""

    prefilled: int = 0
    """Prompt and observation tokens that went through the model."""
    cached: int = 0
    """Tokens whose keys and values came from the prefix cache instead."""
    decoded: int = 0
    """Tokens sampled from the policy."""
    tool_calls: int = 0
    seconds: float = 0.0
    """Wall seconds, engine and tools together."""

    @property
    def tokens(self) -> int:
        """Computed tokens: what the token budget is charged."""
        return self.prefilled + self.decoded

    @classmethod
    def total(cls, costs: Iterable[Cost]) -> Cost:
        """The sum of costs."""
        prefilled = cached = decoded = tool_calls = 0
        seconds = 0.0
        for cost in costs:
            prefilled += cost.prefilled
            cached += cost.cached
            decoded += cost.decoded
            tool_calls += cost.tool_calls
            seconds += cost.seconds
        return cls(prefilled, cached, decoded, tool_calls, seconds)

    def __add__(self, other: Cost) -> Cost:
        return Cost(
            self.prefilled + other.prefilled,
            self.cached + other.cached,
            self.decoded + other.decoded,
            self.tool_calls + other.tool_calls,
            self.seconds + other.seconds,
        )


@dataclass(frozen=True, slots=True)
class Budget:
    """An allowance, or a part of one, in both currencies."""

    tokens: int = 0
    tool_calls: int = 0

    @classmethod
    def for_cost(cls, cost: Cost) -> Budget:
        """The budget that ``cost`` uses up."""
        return cls(cost.tokens, cost.tool_calls)

    def __add__(self, other: Budget) -> Budget:
        return Budget(self.tokens + other.tokens, self.tool_calls + other.tool_calls)

    def __sub__(self, other: Budget) -> Budget:
        return Budget(self.tokens - other.tokens, self.tool_calls - other.tool_calls)

    def __floordiv__(self, parts: int) -> Budget:
        return Budget(self.tokens // parts, self.tool_calls // parts)
