"""Tree arrays, the input of estimators: parents of nodes, leaves and their rewards, for the trees of a question.

Shapes: N nodes of a tree, the root first; L leaves of a tree.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from treegrpo.config.train import Singleton

Values = NDArray[np.float64]
Indices = NDArray[np.int64]
EPS = 1e-6
NOISE = 1e-9
"""Rewards and advantages that are closer than this differ by rounding alone."""


@dataclass(frozen=True, slots=True, eq=False)
class TreeArrays:
    """The nodes on the paths to the usable leaves of one tree, and no others."""

    parent_N: Indices
    """Index of the parent; −1 at index 0, the root. Parents come before their children."""
    leaf_L: Indices
    """Index of each leaf; leaves have no children."""
    reward_L: Values
    entropy_N: Values
    """Mean −logprob of the node's action tokens in nats; 0 at the root."""

    @property
    def paths(self) -> NDArray[np.bool_]:
        """path_LN: whether the node is on the way to the leaf; root and leaf are."""
        path_LN = np.zeros((len(self.leaf_L), len(self.parent_N)), np.bool_)
        path_LN[np.arange(len(self.leaf_L)), self.leaf_L] = True
        for node in range(len(self.parent_N) - 1, 0, -1):
            path_LN[:, self.parent_N[node]] |= path_LN[:, node]
        return path_LN

    @property
    def counts(self) -> Indices:
        """leaves_N: how many leaves are at or below the node."""
        return self.paths.sum(0)

    @property
    def values(self) -> Values:
        """V_N: mean reward of the leaves at or below the node; 0 at a root without leaves."""
        return self.reward_L @ self.paths / self.counts.clip(1)


@dataclass(frozen=True, slots=True, eq=False)
class Advantage:
    """Of one tree. The tokens of node n on the path to leaf ℓ carry ``leaf_L[ℓ] + node_N[n]``."""

    leaf_L: Values
    node_N: Values


def join_trees(trees: Sequence[TreeArrays]) -> TreeArrays:
    """The trees of a question as one: they share their root, the prompt. Each tree's other nodes keep their order."""
    offsets = np.cumsum([0, *(len(one.parent_N) - 1 for one in trees)])[:-1]
    parents = [np.where(one.parent_N > 0, one.parent_N + k, 0)[1:] for one, k in zip(trees, offsets, strict=True)]
    return TreeArrays(
        parent_N=np.concatenate([np.array([-1]), *parents]),
        leaf_L=np.concatenate([np.zeros(0, np.int64), *(one.leaf_L + k for one, k in zip(trees, offsets, strict=True))]),
        reward_L=np.concatenate([np.zeros(0), *(one.reward_L for one in trees)]),
        entropy_N=np.concatenate([np.zeros(1), *(one.entropy_N[1:] for one in trees)]),
    )


def split_by_leaf(trees: Sequence[TreeArrays], leaf_L: Values) -> list[Advantage]:
    """The advantages of all leaves of a question, tree by tree."""
    ends = np.cumsum([len(one.leaf_L) for one in trees])
    parts = np.split(leaf_L, ends[:-1]) if trees else []
    return [Advantage(part, np.zeros(len(one.parent_N))) for one, part in zip(trees, parts, strict=True)]


def split_by_node(trees: Sequence[TreeArrays], node_N: Values) -> list[Advantage]:
    """The advantages of all nodes of the trees as `join_trees` orders them, tree by tree; the root has no action and gets 0."""
    ends = np.cumsum([len(one.parent_N) - 1 for one in trees])
    parts = np.split(node_N[1:], ends[:-1]) if trees else []
    return [Advantage(np.zeros(len(one.leaf_L)), np.array([0.0, *part])) for one, part in zip(trees, parts, strict=True)]


def compare_rewards(
    rewards: Sequence[ArrayLike], singleton: Singleton = "zero", std_floor: float = 0.0
) -> tuple[list[Values], list[Values]]:
    """Each leaf against all leaves of the question (inter) and against those of its own tree (intra); see `normalise`."""
    trees = [np.asarray(one, np.float64) for one in rewards]
    flat = normalise(np.concatenate([np.zeros(0), *trees]), singleton, std_floor)
    inter = np.split(flat, np.cumsum([len(one) for one in trees])[:-1]) if trees else []
    return inter, [normalise(one, singleton, std_floor) for one in trees]


def normalise(values_L: Values, singleton: Singleton, std_floor: float) -> Values:
    """(R − mean) / (max(std, floor) + 1e-6) with the unbiased std; exactly 0 where all values are equal.

    Args:
        values_L: what is compared.
        singleton: what a value without any other to compare it with becomes: 0, or itself as in the reference code.
        std_floor: the least that is divided by.
    """
    if len(values_L) == 1 and singleton == "raw":
        return values_L.copy()
    if not has_signal([values_L]):
        return np.zeros_like(values_L)
    return (values_L - values_L.mean()) / (max(float(values_L.std(ddof=1)), std_floor) + EPS)


def has_signal(rewards: Sequence[ArrayLike]) -> bool:
    """Whether the leaves of a question differ in reward at all, so that one can be preferred to another."""
    flat_L = np.concatenate([np.zeros(0), *(np.asarray(one, np.float64) for one in rewards)])
    return flat_L.size > 1 and float(np.ptp(flat_L)) > NOISE
