"""Estimators: from the rewards of one question's leaves to the advantage of every action token.

    leaf level   one number for a leaf, carried by every token on its path     tree inter intra rloo two_norm treepo
    node level   one number for a node, carried by its tokens on every path    treerl sibling_loo at2po

R is the reward of a leaf, V the mean reward of the leaves at or below a node. The trees of a question share their root,
so the parent of a tree's first step is the same node in all of them and V(root) is the mean over the question. Standard
deviations are unbiased (n − 1). `ESTIMATORS` is the list; docs/estimators.md is the table and says how to add one.

Example:
    >>> def fork(*rewards: float) -> TreeArrays:  # the root, one step, and two leaves below it
    ...     return TreeArrays(np.array([-1, 0, 1, 1]), np.array([2, 3]), np.array(rewards), np.zeros(4))
    >>> [a.leaf_L.round(4).tolist() for a in advantages([fork(1, 0), fork(0, 0)], EstimatorOptions("tree"))]
    [[2.2071, -1.2071], [-0.5, -0.5]]
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from learner.trainer.algorithm.tree_arrays import (
    NOISE,
    Advantage,
    TreeArrays,
    Values,
    compare_rewards,
    has_signal,
    join_trees,
    normalise,
    split_by_leaf,
    split_by_node,
)
from treegrpo.config.train import Estimator, Singleton, TrainConfig

__all__ = ["ESTIMATORS", "Advantage", "EstimatorOptions", "TreeArrays", "advantages", "has_signal"]

Estimate = Callable[[Sequence[TreeArrays], "EstimatorOptions"], list[Advantage]]


@dataclass(frozen=True, slots=True)
class EstimatorOptions:
    """The estimator and its options, named as in [train] of the configuration, which refuses those an estimator ignores."""

    estimator: Estimator = "tree"
    singleton: Singleton = "zero"
    """The advantage of a leaf without any other to compare it with: 0, or its reward."""
    std_floor: float = 0.0
    """Rewards are divided by at least this much."""
    inter_weight: float = 1.0
    intra_weight: float = 1.0

    @classmethod
    def from_config(cls, train: TrainConfig) -> EstimatorOptions:
        """The options of a run."""
        return cls(train.estimator, train.singleton, train.std_floor, train.inter_weight, train.intra_weight)


def advantages(trees: Sequence[TreeArrays], options: EstimatorOptions) -> list[Advantage]:
    """The advantages in every tree of one question.

    Args:
        trees: of the question; a tree may have no leaf, then it is its root alone.
        options: the estimator and its options.

    Returns:
        One for each tree. Where rewards are equal, the advantage is exactly 0 and no rounding error.
    """
    found = ESTIMATORS[options.estimator](trees, options)
    return [Advantage(_without_noise(one.leaf_L), _without_noise(one.node_N)) for one in found]


def _without_noise(values: Values) -> Values:
    return np.where(np.abs(values) > NOISE, values, 0.0)


def tree(trees: Sequence[TreeArrays], options: EstimatorOptions) -> list[Advantage]:
    """inter_weight · inter + intra_weight · intra. Tree-GRPO, 2509.21240."""
    inter, intra = _compared(trees, options)
    return split_by_leaf(trees, options.inter_weight * inter + options.intra_weight * intra)


def inter(trees: Sequence[TreeArrays], options: EstimatorOptions) -> list[Advantage]:
    """(R − mean) / (std + 1e-6) over all leaves of the question. GRPO, 2402.03300."""
    return split_by_leaf(trees, _compared(trees, options)[0])


def intra(trees: Sequence[TreeArrays], options: EstimatorOptions) -> list[Advantage]:
    """The same over the leaves of the leaf's own tree: half of Tree-GRPO, 2509.21240."""
    return split_by_leaf(trees, _compared(trees, options)[1])


def two_norm(trees: Sequence[TreeArrays], options: EstimatorOptions) -> list[Advantage]:
    """`inter`, and that normalised once more within the leaf's own tree. The other variant in the code of 2509.21240.

    Only the second mean and deviation matter where they exist, so it differs from `intra` by 1e-6 and ``std_floor``,
    which is applied both times, and in lone leaves: with "raw" these get what `inter` gives them.
    """
    first, _ = compare_rewards([one.reward_L for one in trees], options.singleton, options.std_floor)
    return split_by_leaf(trees, _flat([normalise(one, options.singleton, options.std_floor) for one in first]))


def rloo(trees: Sequence[TreeArrays], options: EstimatorOptions) -> list[Advantage]:
    """R − mean reward of all other leaves of the question. REINFORCE leave-one-out, 2402.14740."""
    reward_L = _flat([one.reward_L for one in trees])
    others = len(reward_L) - 1
    if others < 1:
        return split_by_leaf(trees, _lone(reward_L, options))
    return split_by_leaf(trees, reward_L - (reward_L.sum() - reward_L) / others)


def treepo(trees: Sequence[TreeArrays], options: EstimatorOptions) -> list[Advantage]:
    """Mean over the ancestors n of the leaf, root included, of R − V(n). TreePO, 2508.17445.

    An ancestor with a single leaf below it compares nothing and is skipped. Ancestors count alike, however many leaves
    they have. The published code then whitens over the tokens of the batch; that is left out here, as it would make a
    question's advantages depend on the questions beside it.
    """
    whole = join_trees(trees)
    level_LN = whole.paths & (whole.counts > 1)
    levels_L = level_LN.sum(1)
    baseline_L = level_LN @ whole.values / levels_L.clip(1)
    return split_by_leaf(trees, np.where(levels_L > 0, whole.reward_L - baseline_L, _lone(whole.reward_L, options)))


def treerl(trees: Sequence[TreeArrays], _: EstimatorOptions) -> list[Advantage]:
    """((V − V(root)) + (V − V(parent))) / √leaves at or below the node. TreeRL, 2506.11902."""
    whole = join_trees(trees)
    value_N = whole.values
    return split_by_node(trees, (2 * value_N - value_N[0] - value_N[whole.parent_N]) / np.sqrt(whole.counts.clip(1)))


def sibling_loo(trees: Sequence[TreeArrays], _: EstimatorOptions) -> list[Advantage]:
    """V − mean V of the siblings. The leave-one-out baseline of 2402.14740 in the step groups of TreeRPO, 2506.05183.

    An only child has no alternative to compare with: it gets its parent's advantage, 0 below the root. So the steps
    between two forks carry one advantage, and on chains, which fork at the root only, this is `rloo`.
    """
    whole = join_trees(trees)
    value_N, parent_N = whole.values, whole.parent_N
    children_N = np.bincount(parent_N[1:], minlength=len(parent_N))
    total_N = np.bincount(parent_N[1:], value_N[1:], minlength=len(parent_N))
    advantage_N = np.zeros(len(parent_N))
    for node in range(1, len(parent_N)):
        parent = parent_N[node]
        siblings = children_N[parent] - 1
        others = (total_N[parent] - value_N[node]) / max(siblings, 1)
        advantage_N[node] = value_N[node] - others if siblings else advantage_N[parent]
    return split_by_node(trees, advantage_N)


def at2po(trees: Sequence[TreeArrays], options: EstimatorOptions) -> list[Advantage]:
    """A(n) = U(n) = Σ_c softmax_c(H(c)) · U(c) over the children c of n; at a leaf U = `inter`. AT²PO, 2601.04767.

    H is the mean −logprob of a node's action tokens, so uncertain turns weigh more. This is what the published code
    computes as configured for its experiments ("child_softmax", "node_value"), except that it takes the biased standard
    deviation of the leaves.
    """
    whole = join_trees(trees)
    advantage_N = np.zeros(len(whole.parent_N))
    advantage_N[whole.leaf_L] = normalise(whole.reward_L, options.singleton, options.std_floor)
    for node in range(len(advantage_N) - 1, -1, -1):
        children = np.flatnonzero(whole.parent_N == node)
        if len(children):
            weights = np.exp(whole.entropy_N[children] - whole.entropy_N[children].max())
            advantage_N[node] = weights @ advantage_N[children] / weights.sum()
    return split_by_node(trees, advantage_N)


def _compared(trees: Sequence[TreeArrays], options: EstimatorOptions) -> tuple[Values, Values]:
    inter, intra = compare_rewards([one.reward_L for one in trees], options.singleton, options.std_floor)
    return _flat(inter), _flat(intra)


def _flat(parts: Sequence[Values]) -> Values:
    return np.concatenate([np.zeros(0), *parts])


def _lone(reward_L: Values, options: EstimatorOptions) -> Values:
    return reward_L if options.singleton == "raw" else np.zeros_like(reward_L)


ESTIMATORS: dict[Estimator, Estimate] = {
    "tree": tree,
    "inter": inter,
    "intra": intra,
    "two_norm": two_norm,
    "rloo": rloo,
    "treepo": treepo,
    "treerl": treerl,
    "sibling_loo": sibling_loo,
    "at2po": at2po,
}
