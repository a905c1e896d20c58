"""A branch: an expansion to be played, and one of its turns."""

from __future__ import annotations

import zlib
from dataclasses import dataclass

import numpy as np

from services.sampler.expansion.lease_budget import Bill
from services.sampler.expansion.lease_control import Gate
from services.sampler.expansion.state_cache import States
from treegrpo.core.lease import Lease, Plan
from treegrpo.core.step import TokenIds
from treegrpo.core.tree import Tree


def first_node(index: int, plan: Plan) -> int:
    """The node ids of an expansion follow from its index alone: it has at most max_turns + 1 steps."""
    return 1 + index * (plan.max_turns + 1)


def action_seed(lease_seed: int, tree: int, node: int) -> int:
    """It follows from question and place in the tree, whoever samples it and when."""
    return zlib.crc32(f"{lease_seed}/{tree}/{node}".encode())


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
class Turn:
    """A turn about to be played."""

    branch: Branch
    node: int
    parent: int
    prefix: TokenIds
    actions: list[str]
    """Texts of the actions before it."""
    last: bool
    """Tools may no longer be used."""

    @property
    def seed(self) -> int:
        """Of its action."""
        return action_seed(self.branch.lease.seed, self.branch.tree_index, self.node)
