"""From groups to what is trained: usable leaves, their weight in the loss, and what the batch says of itself.

A leaf is usable if no step on its path failed. Everything else takes no part: neither in a baseline nor in a
denominator, and never as a reward of zero.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from treegrpo.tree import Group, Leaf, PolicyVersion, Step, Tree

Aggregation = Literal["leaf_mean", "token_mean"]


@dataclass(frozen=True, slots=True)
class Credit:
    """What one leaf gives to every action token on its path."""

    advantage: float
    weight: float
    """w_ℓ of `loss`: 1/(B·G·|H_ℓ|) or 1/Σ|H|."""


@dataclass(frozen=True, slots=True)
class CreditedTree:
    tree: Tree
    credits: dict[int, Credit]
    """By leaf node; a leaf that is not here takes no part."""


@dataclass(frozen=True, slots=True)
class Episodes:
    """The usable leaves of one group, by tree."""

    group: Group
    trees: list[tuple[Tree, list[Leaf]]]

    @property
    def rewards(self) -> list[list[float]]:
        return [[leaf.reward for leaf in leaves] for _, leaves in self.trees]

    @property
    def leaves(self) -> list[Leaf]:
        return [leaf for _, leaves in self.trees for leaf in leaves]


def usable(groups: Sequence[Group]) -> list[Episodes]:
    """The groups that have any usable leaf, each with those it has."""
    found = (Episodes(group, [(tree, [*_usable(tree)]) for _, tree in sorted(group.trees.items())]) for group in groups)
    return [episodes for episodes in found if episodes.leaves]


def _usable(tree: Tree) -> Iterator[Leaf]:
    for node in sorted(tree.leaves):
        path = tree.path(node)
        if action_tokens(path) and not any(step.status.failed for step in path):
            yield tree.leaves[node]


def action_tokens(path: Sequence[Step]) -> int:
    """|H|: tokens of a path that the policy produced."""
    return sum(len(step.action) for step in path)


def credit(
    batch: Sequence[Episodes], advantages: Sequence[Sequence[Sequence[float] | np.ndarray]], how: Aggregation
) -> list[CreditedTree]:
    """Give every usable leaf its advantage and its weight in the loss.

    The weights are those of the whole batch, so gradients of its parts simply add up. ``leaf_mean`` averages over the
    tokens of a leaf, then over the leaves of its group, then over the groups; ``token_mean`` over all action tokens.

    Args:
        batch: B groups.
        advantages: for each group and tree one for each usable leaf, in the order of `Episodes`.
        how: the aggregation.
    """
    total = sum(action_tokens(tree.path(leaf.node)) for one in batch for tree, leaves in one.trees for leaf in leaves)
    credited: list[CreditedTree] = []
    for one, by_tree in zip(batch, advantages, strict=True):
        share = 1 / (len(batch) * len(one.leaves))
        for (tree, leaves), values in zip(one.trees, by_tree, strict=True):
            by_leaf: dict[int, Credit] = {}
            for leaf, value in zip(leaves, values, strict=True):
                own = action_tokens(tree.path(leaf.node))
                by_leaf[leaf.node] = Credit(float(value), share / own if how == "leaf_mean" else 1 / total)
            credited.append(CreditedTree(tree, by_leaf))
    return credited


def version_lag(groups: Sequence[Group], now: PolicyVersion) -> tuple[float, int]:
    """Mean and largest distance in steps between ``now`` and the versions that sampled the tokens.

    After a resume some tokens are from a later step of an abandoned lineage; they are as far away as their steps say.
    """
    spans = [(abs(now.step - s.version.step), s.end - s.start) for group in groups for s in group.spans()]
    tokens = sum(length for _, length in spans)
    mean = sum(lag * length for lag, length in spans) / max(tokens, 1)
    return mean, max((lag for lag, length in spans if length), default=0)


def mixed_siblings(groups: Sequence[Group]) -> float:
    """Share of sibling sets (steps with one parent) whose members were sampled from different versions."""
    sets: list[int] = []
    for tree in (tree for group in groups for tree in group.trees.values()):
        children: dict[int, list[Step]] = {}
        for step in tree.steps.values():
            children.setdefault(step.parent, []).append(step)
        sets += [len({s.version for step in siblings for s in step.spans}) for siblings in children.values() if len(siblings) > 1]
    return sum(versions > 1 for versions in sets) / max(len(sets), 1)
