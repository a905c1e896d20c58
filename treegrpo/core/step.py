"""Data classes of rollouts: policy version, step, leaf, subtree.

A step is one turn of an agent: think, act, observe; it becomes a node of a tree (`treegrpo.core.tree`). A *subtree* is the
steps appended below one existing node by one expansion, down to a leaf.

Pure: no network, no clock, no torch. Token ids are uint32 and log-probabilities float32 arrays, the engine's own from
first to last (token-in, token-out).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum

import numpy as np
from numpy.typing import NDArray

from treegrpo.core.budget import Cost
from treegrpo.errors import ContractError

TokenIds = NDArray[np.uint32]
Logprobs = NDArray[np.float32]
ROOT = 0
DIGITS = 10
"""Of a number of a policy version, which has 32 bits."""


@dataclass(frozen=True, slots=True, order=True)
class PolicyVersion:
    """Identifies the weights of the policy: the lineage of the run and the optimiser step in it.

    A restart that goes back to an older checkpoint begins a new lineage, so step 7 of lineage 1 is never mistaken for
    step 7 of lineage 2.
    """

    lineage: int = 0
    step: int = 0

    def __str__(self) -> str:
        return f"{self.lineage}.{self.step}"

    @classmethod
    def parse(cls, text: str) -> PolicyVersion:
        """The inverse of ``str``. Raises ContractError on anything else."""
        parts = text.split(".")
        digits = all(part.isdecimal() and part.isascii() and len(part) <= DIGITS for part in parts)
        if len(parts) != 2 or not digits or max(map(int, parts)) >= 1 << 32:
            raise ContractError(f"{text[:64]!r} is not a policy version; one is written LINEAGE.STEP, like 1.42.")
        return cls(*map(int, parts))


@dataclass(frozen=True, slots=True)
class VersionSpan:
    """Tokens ``start`` (inclusive) to ``end`` (exclusive) of an action were sampled from ``version``."""

    version: PolicyVersion
    start: int
    end: int


class StepStatus(Enum):
    """How a step ended."""

    OK = "ok"
    TRUNCATED = "truncated"
    """The turn or the context was full: a leaf, scored as it is."""
    ENGINE_ERROR = "engine_error"
    TOOL_ERROR = "tool_error"
    ENVIRONMENT_ERROR = "environment_error"
    """The environment itself is wrong: it raised, or scored with what is no number."""

    @property
    def failed(self) -> bool:
        """Whether it failed: it is no leaf with a reward; its branch is dropped and counted."""
        return self not in (StepStatus.OK, StepStatus.TRUNCATED)

    @property
    def final(self) -> bool:
        """Whether no step follows: the episode ended here, or failed."""
        return self is not StepStatus.OK


@dataclass(frozen=True, slots=True, eq=False)
class Step:
    """One think → act → observe turn: a node of the tree."""

    node: int
    parent: int
    action: TokenIds
    """Tokens the policy produced, stop tokens included."""
    logprobs: Logprobs
    """Log-probability of each action token under the policy and temperature it was sampled with."""
    observation: TokenIds
    """Tokens the environment answered with; empty at a leaf."""
    spans: tuple[VersionSpan, ...] = ()
    status: StepStatus = StepStatus.OK
    tool: str = ""
    """The tool used, empty if none."""
    tool_arguments: str = ""
    valid: bool = True
    """False when the action broke the environment's protocol."""
    cost: Cost = field(default_factory=Cost)

    @property
    def length(self) -> int:
        """Tokens this node adds to its path."""
        return len(self.action) + len(self.observation)


@dataclass(frozen=True, slots=True, eq=False)
class Leaf:
    """The end of an episode: its rewards by name. Their sum is what the policy is trained on."""

    node: int
    rewards: dict[str, float]
    metrics: dict[str, float] = field(default_factory=dict)
    """Reported, not trained on: exact match, searches, invalid actions."""

    @property
    def reward(self) -> float:
        return sum(self.rewards.values())


@dataclass(frozen=True, slots=True, eq=False)
class Subtree:
    """The steps one expansion appended below node ``parent`` of a tree, root side first.

    (lease, tree, index) names it once and for all: a subtree that arrives twice is accepted once. Index 0 is the
    tree's initial chain and carries the prompt.
    """

    lease: str
    tree: int
    index: int
    parent: int
    steps: tuple[Step, ...]
    leaves: tuple[Leaf, ...] = ()
    """Empty when the expansion failed."""
    prompt: TokenIds = field(default_factory=lambda: np.zeros(0, np.uint32))

    @property
    def key(self) -> tuple[str, int, int]:
        return (self.lease, self.tree, self.index)

    @property
    def cost(self) -> Cost:
        return Cost.total([step.cost for step in self.steps])
