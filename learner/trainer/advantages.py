"""Tree-GRPO's advantages: one number per leaf, from the rewards of one question's leaves.

The paper is "Tree Search for LLM Agent Reinforcement Learning" (arXiv 2509.21240). With R the reward of a leaf:

    inter   (R − mean) / (std + 1e-6)   over all leaves of the question
    intra   the same over the leaves of the leaf's own tree
    tree    inter + intra

The standard deviation is the unbiased one (n − 1). Every action token on the path to a leaf carries its advantage.

Example:
    >>> [a.round(4).tolist() for a in advantages([[1, 0], [0, 0]])]
    [[2.2071, -1.2071], [-0.5, -0.5]]
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

Values = NDArray[np.float64]
Estimator = Literal["tree", "inter", "intra"]
Singleton = Literal["zero", "raw"]
EPS = 1e-6


def advantages(
    rewards: Sequence[ArrayLike], estimator: Estimator = "tree", singleton: Singleton = "zero", std_floor: float = 0.0
) -> list[Values]:
    """The advantage of every leaf.

    Args:
        rewards: for each tree of the question the rewards of its leaves; a tree may have none.
        estimator: which of the formulas above.
        singleton: what a leaf without any other to compare it with gets: 0, or its reward as in the reference code.
        std_floor: rewards are divided by at least this much.

    Returns:
        As many arrays as trees, each as long as its rewards.
    """
    trees = [np.asarray(tree, np.float64) for tree in rewards]
    inter = _split(normalise(np.concatenate([*trees, np.zeros(0)]), singleton, std_floor), trees)
    intra = [normalise(tree, singleton, std_floor) for tree in trees]
    match estimator:
        case "inter":
            return inter
        case "intra":
            return intra
        case "tree":
            return [a + b for a, b in zip(inter, intra, strict=True)]


def normalise(rewards_L: Values, singleton: Singleton, std_floor: float) -> Values:
    """(R − mean) / (std + 1e-6), std at least ``std_floor``; exactly 0 where all rewards are equal."""
    if len(rewards_L) == 1 and singleton == "raw":
        return rewards_L.copy()
    if not has_signal([rewards_L]):
        return np.zeros_like(rewards_L)
    return (rewards_L - rewards_L.mean()) / (max(float(rewards_L.std(ddof=1)), std_floor) + EPS)


def has_signal(rewards: Sequence[ArrayLike]) -> bool:
    """Whether the leaves of a question differ in reward at all, so that one can be preferred to another."""
    return np.unique(np.concatenate([*map(np.asarray, rewards), np.zeros(0)])).size > 1


def _split(flat_L: Values, trees: Sequence[Values]) -> list[Values]:
    return np.split(flat_L, np.cumsum([len(tree) for tree in trees])[:-1]) if trees else []
