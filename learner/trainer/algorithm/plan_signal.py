"""Checks that groups of a plan have a training signal: an estimator compares leaves, and some plans give it none to compare."""

from __future__ import annotations

import numpy as np

from learner.trainer.algorithm.advantages import EstimatorOptions, TreeArrays, advantages
from treegrpo.config.schema import Config
from treegrpo.errors import ConfigError
from treegrpo.net.limits import GROUP_LEAVES


def check_signal(config: Config) -> None:
    """Check that a full group has at most `GROUP_LEAVES`, and that its estimator compares them. Raises ConfigError."""
    plan, train = config.rollout.plan, config.train
    if plan.leaves > GROUP_LEAVES:
        raise ConfigError(
            f"rollout.trees = {plan.trees}, rounds = {plan.rounds} and expansions = {plan.expansions} make {plan.leaves} leaves "
            f"a question, and {GROUP_LEAVES} are the most; lower one of them."
        )
    earned = np.arange(1.0, plan.leaves + 1).reshape(plan.trees, plan.branches)
    trees = [_one_fork_tree(reward_L) for reward_L in earned]
    if not any(one.leaf_L.any() or one.node_N.any() for one in advantages(trees, EstimatorOptions.from_config(train))):
        raise ConfigError(
            f"rollout.trees = {plan.trees}, rounds = {plan.rounds} and expansions = {plan.expansions} make {plan.branches} "
            f"leaf a tree and {plan.leaves} a question, of which train.estimator = {train.estimator} with "
            f"train.singleton = {train.singleton} compares none: every advantage would be 0; raise rollout.trees or "
            "rollout.expansions."
        )


def _one_fork_tree(reward_L: np.ndarray) -> TreeArrays:
    """A tree whose leaves all hang on its first step; a lone leaf is that step."""
    count = len(reward_L)
    if count == 1:
        return TreeArrays(np.array([-1, 0]), np.array([1]), reward_L, np.zeros(2))
    return TreeArrays(np.array([-1, 0, *([1] * count)]), np.arange(2, 2 + count), reward_L, np.zeros(2 + count))
