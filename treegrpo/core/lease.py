"""Lease: the assignment of one question, with a plan and a budget, to one sampler."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import Enum

from treegrpo.core.budget import Budget, Cost
from treegrpo.core.question import Question
from treegrpo.core.step import PolicyVersion, Subtree

HEARTBEAT_SECONDS = 5.0
"""Interval of heartbeats: a sampler sends something at least this often."""
SILENCE_SECONDS = 4 * HEARTBEAT_SECONDS
"""A sampler of which nothing was heard for so long has lost its leases, whether its connection is open or not."""


class LeaseKind(Enum):
    TRAIN = "train"
    EVAL = "eval"
    """Greedy, one chain, held-out question; budgeted and counted apart."""


class LeaseEndReason(Enum):
    COMPLETE = "complete"
    STOPPED = "stopped"
    """The learner asked to stop expanding, or the sampler drains."""
    BUDGET = "budget"
    """The remaining budget does not cover another step."""
    FAILED = "failed"
    LOST = "lost"
    """The sampler disconnected or sent nothing for too long. Set by the learner, never sent by a sampler."""
    RETURNED = "returned"
    """Unfinished, and not because of the question: the sampler drains, a tool is unavailable, or the lease never arrived."""
    INTERRUPTED = "interrupted"
    """The learner shut down, or restarted and the sampler did not reconnect. Set by the learner, never sent by a sampler."""

    @property
    def from_sampler(self) -> bool:
        """Whether a sampler may end its lease with this reason."""
        return not self.silent

    @property
    def unfinished(self) -> bool:
        """Whether another sampler can continue the group."""
        return self not in (LeaseEndReason.COMPLETE, LeaseEndReason.STOPPED, LeaseEndReason.BUDGET)

    @property
    def silent(self) -> bool:
        """Whether the final cost is unknown."""
        return self in (LeaseEndReason.LOST, LeaseEndReason.INTERRUPTED)


@dataclass(frozen=True, slots=True)
class Plan:
    """The shape of a group, M·(N·L + 1) leaves, and the limits of its episodes."""

    trees: int
    """M: initial chains."""
    rounds: int
    """L."""
    expansions: int
    """N: expansions of each tree in a round."""
    max_turns: int
    """Turns with tools; one more follows without."""
    max_action_tokens: int
    max_context: int
    temperature: float

    @property
    def leaves(self) -> int:
        """G, the size of a full group."""
        return self.trees * self.branches

    @property
    def width(self) -> int:
        """Branches of one group that can run at the same time."""
        return self.trees * max(1, self.expansions if self.rounds else 1)

    @property
    def grant(self) -> Budget:
        """The largest possible cost of a group: no shared prefix, every episode at its length limit."""
        return Budget(tokens=self.leaves * self.max_context, tool_calls=self.leaves * self.max_turns)

    def remaining_budget(self, accepted: Sequence[Subtree]) -> Budget:
        """What is left of `grant` for a lease that continues a group with the subtrees ``accepted``."""
        left = self.grant - Budget.for_cost(Cost.total([subtree.cost for subtree in accepted]))
        return Budget(max(0, left.tokens), max(0, left.tool_calls))

    @property
    def branches(self) -> int:
        """Subtrees of one tree, N·L + 1; their indices begin at 0."""
        return self.rounds * self.expansions + 1

    def as_eval(self) -> Plan:
        """The same limits, one greedy chain."""
        return Plan(1, 0, 0, self.max_turns, self.max_action_tokens, self.max_context, 0.0)


@dataclass(frozen=True, slots=True)
class Lease:
    id: str
    kind: LeaseKind
    question: Question
    plan: Plan
    grant: Budget
    seed: int
    """Seeds the draws of nodes."""
    min_version: PolicyVersion
    """Work on it with this version or a later one."""
    accepted: tuple[Subtree, ...] = ()
    """What an earlier lease of the same group has brought in already, parents first: only what is missing is to be made."""


@dataclass(frozen=True, slots=True)
class LeaseEnd:
    lease: str
    reason: LeaseEndReason
    forgone: int = 0
    """Planned expansions that were not made."""
    unaccounted: Cost = field(default_factory=Cost)
    """What failed attempts cost that no step accounts for."""
    error: str = ""
