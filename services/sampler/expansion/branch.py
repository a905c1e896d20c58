"""A branch, which is one expansion of a tree, and one of its turns."""

from __future__ import annotations

import zlib
from dataclasses import dataclass

import numpy as np

from services.sampler.expansion.lease_budget import BranchCostMeter
from services.sampler.expansion.lease_control import LeaseControl
from services.sampler.expansion.state_cache import StateCache
from treegrpo.core.lease import Lease, Plan
from treegrpo.core.step import TokenIds
from treegrpo.core.tree import Tree


def first_node(index: int, plan: Plan) -> int:
    """The first node id of expansion ``index``: ids follow from the index alone, since it has at most max_turns + 1 steps."""
    return 1 + index * (plan.max_turns + 1)


def action_seed(lease_seed: int, tree: int, node: int) -> int:
    """The sampling seed of an action: a function of lease seed and place in the tree only."""
    return zlib.crc32(f"{lease_seed}/{tree}/{node}".encode())


@dataclass(frozen=True, slots=True)
class Branch:
    """An expansion to be run: node ``parent`` of a tree, continued to the end of the episode."""

    lease: Lease
    tree_index: int
    index: int
    parent: int
    tree: Tree
    """The tree as it is now; its prompt and the path to ``parent`` are the prefix."""
    states: StateCache
    meter: BranchCostMeter
    control: LeaseControl

    @property
    def prefix(self) -> TokenIds:
        """[n] prompt and path, as sampled."""
        return np.concatenate(
            [self.tree.prompt, *(part for step in self.tree.path(self.parent) for part in (step.action, step.observation))]
        )


@dataclass(frozen=True, slots=True)
class Turn:
    """A turn about to be run."""

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
        """The seed of its action."""
        return action_seed(self.branch.lease.seed, self.branch.tree_index, self.node)
