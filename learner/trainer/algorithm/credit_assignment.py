"""Credit assignment: usable leaves of groups, their advantages and weights in the loss, and figures of the batch.

A leaf is usable if no step on its path failed. Everything else takes no part: neither in a baseline nor in a
denominator, and never as a reward of zero.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from learner.trainer.algorithm.tree_arrays import Advantage, TreeArrays, Values, compare_rewards
from treegrpo.config.train import Aggregation
from treegrpo.core.step import ROOT, Leaf, PolicyVersion, Step
from treegrpo.core.tree import Group, Tree


@dataclass(frozen=True, slots=True, eq=False)
class Credit:
    """The advantages and the weight of the action tokens on the path of one leaf."""

    weight: float
    """w_ℓ of `loss`: 1/(B·G·|H_ℓ|) or 1/Σ|H|."""
    advantage_D: Values
    """One for each step of the path, root side first; all tokens of a step carry it."""
    inter: float
    """The leaf's plain normalised advantage over the question, whatever the estimator: what diagnostics are split by."""
    intra: float
    """The same over the leaf's own tree."""


@dataclass(frozen=True, slots=True)
class CreditedTree:
    tree: Tree
    credits: dict[int, Credit]
    """By leaf node; a leaf that is not here takes no part."""


@dataclass(frozen=True, slots=True)
class UsableTree:
    """A tree, its usable leaves, and the nodes on the paths to them."""

    tree: Tree
    leaves: list[Leaf]
    """In the order of their nodes."""
    tree_arrays: TreeArrays
    """The input of estimators; its leaves are in the same order."""
    index: dict[int, int]
    """Where a node of the tree is in ``tree_arrays``."""


@dataclass(frozen=True, slots=True)
class UsableGroup:
    """The usable leaves of one group, by tree; a tree may have none."""

    group: Group
    trees: list[UsableTree]

    @property
    def rewards(self) -> list[list[float]]:
        return [[leaf.reward for leaf in one.leaves] for one in self.trees]

    @property
    def leaves(self) -> list[Leaf]:
        return [leaf for one in self.trees for leaf in one.leaves]

    @property
    def tree_arrays(self) -> list[TreeArrays]:
        return [one.tree_arrays for one in self.trees]


def select_usable(groups: Sequence[Group]) -> list[UsableGroup]:
    """The groups with usable leaves, and those leaves."""
    candidates = (UsableGroup(group, [_usable_tree(tree) for _, tree in sorted(group.trees.items())]) for group in groups)
    return [group for group in candidates if group.leaves]


def _usable_tree(tree: Tree) -> UsableTree:
    leaves = [*_usable_leaves(tree)]
    index = {ROOT: 0}
    for leaf in leaves:
        for step in tree.path(leaf.node):
            index.setdefault(step.node, len(index))
    steps = [tree.steps[node] for node in index if node != ROOT]
    tree_arrays = TreeArrays(
        parent_N=np.array([-1, *(index[step.parent] for step in steps)], np.int64),
        leaf_L=np.array([index[leaf.node] for leaf in leaves], np.int64),
        reward_L=np.array([leaf.reward for leaf in leaves], np.float64),
        entropy_N=np.array([0.0, *map(_entropy, steps)]),
    )
    return UsableTree(tree, leaves, tree_arrays, index)


def _usable_leaves(tree: Tree) -> Iterator[Leaf]:
    for node in sorted(tree.leaves):
        path = tree.path(node)
        if count_action_tokens(path) and not any(step.status.failed for step in path):
            yield tree.leaves[node]


def _entropy(step: Step) -> float:
    return -float(step.logprobs.mean(dtype=np.float64)) if len(step.logprobs) else 0.0


def count_action_tokens(path: Sequence[Step]) -> int:
    """|H|: tokens of a path that the policy produced."""
    return sum(len(step.action) for step in path)


def assign_credit(
    batch: Sequence[UsableGroup], advantages: Sequence[Sequence[Advantage]], aggregation: Aggregation
) -> list[CreditedTree]:
    """Give every usable leaf its advantages and its weight in the loss.

    The weights are those of the whole batch, so gradients of its parts simply add up. ``leaf_mean`` averages over the
    tokens of a leaf, then over the leaves of its group, then over the groups; ``token_mean`` over all action tokens.

    Args:
        batch: B groups.
        advantages: for each group and tree those of the estimator, in the order of `UsableGroup`.
        aggregation: the weights.
    """
    total = sum(count_action_tokens(one.tree.path(leaf.node)) for group in batch for one in group.trees for leaf in one.leaves)
    credited: list[CreditedTree] = []
    for group, by_tree in zip(batch, advantages, strict=True):
        share = 1 / (len(batch) * len(group.leaves))
        for one, advantage, inter_L, intra_L in zip(group.trees, by_tree, *compare_rewards(group.rewards), strict=True):
            by_leaf: dict[int, Credit] = {}
            for leaf, base, inter, intra in zip(one.leaves, advantage.leaf_L, inter_L, intra_L, strict=True):
                path = one.tree.path(leaf.node)
                advantage_D = base + advantage.node_N[[one.index[step.node] for step in path]]
                weight = share / count_action_tokens(path) if aggregation == "leaf_mean" else 1 / total
                by_leaf[leaf.node] = Credit(weight, advantage_D, float(inter), float(intra))
            credited.append(CreditedTree(one.tree, by_leaf))
    return credited


def version_lag(groups: Sequence[Group], now: PolicyVersion) -> tuple[float, int]:
    """Mean and largest distance in steps between ``now`` and the versions that sampled the tokens.

    After a resume some tokens are from a later step of an abandoned lineage; they are as far away as their steps say.
    """
    spans = [(abs(now.step - s.version.step), s.end - s.start) for group in groups for s in group.spans()]
    tokens = sum(length for _, length in spans)
    mean = sum(lag * length for lag, length in spans) / max(tokens, 1)
    return mean, max((lag for lag, length in spans if length), default=0)


def mixed_siblings_share(groups: Sequence[Group]) -> float | None:
    """Share of sibling sets (steps with one parent) whose members were not all sampled from the same versions.

    The trees of a question share their root, so their first steps are siblings. Failed steps count like any other, but
    one without a token has no version. None if there are no siblings.
    """
    sets: dict[tuple[int, int, int], list[frozenset[PolicyVersion]]] = {}
    for number, group in enumerate(groups):
        for index, tree in group.trees.items():
            for step in tree.steps.values():
                if step.spans:
                    place = (number, ROOT, ROOT) if step.parent == ROOT else (number, index, step.parent)
                    sets.setdefault(place, []).append(frozenset(span.version for span in step.spans))
    mixed = [len(set(versions)) > 1 for versions in sets.values() if len(versions) > 1]
    return sum(mixed) / len(mixed) if mixed else None
