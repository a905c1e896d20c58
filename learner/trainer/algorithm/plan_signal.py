"""Whether groups of a plan can teach anything: an estimator compares leaves, and some plans give it nothing to compare."""

from __future__ import annotations

import numpy as np

from learner.trainer.algorithm.advantages import Branches, Options, advantages
from treegrpo.config.schema import Config
from treegrpo.errors import ConfigError
from treegrpo.net.limits import GROUP_LEAVES


def check_signal(config: Config) -> None:
    """A full group is as large as one may be, and its estimator compares leaves that earned differently. Raises ConfigError."""
    plan, train = config.rollout.plan, config.train
    if plan.leaves > GROUP_LEAVES:
        raise ConfigError(
            f"rollout.trees = {plan.trees}, rounds = {plan.rounds} and expansions = {plan.expansions} make {plan.leaves} leaves "
            f"a question, and {GROUP_LEAVES} are the most; lower one of them."
        )
    earned = np.arange(1.0, plan.leaves + 1).reshape(plan.trees, plan.branches)
    trees = [_bush(reward_L) for reward_L in earned]
    if not any(one.leaf_L.any() or one.node_N.any() for one in advantages(trees, Options.of(train))):
        raise ConfigError(
            f"rollout.trees = {plan.trees}, rounds = {plan.rounds} and expansions = {plan.expansions} make {plan.branches} "
            f"leaf a tree and {plan.leaves} a question, of which train.estimator = {train.estimator} with "
            f"train.singleton = {train.singleton} compares none: every advantage would be 0; raise rollout.trees or "
            "rollout.expansions."
        )


def _bush(reward_L: np.ndarray) -> Branches:
    """A tree whose leaves all hang on its first step; a lone leaf is that step."""
    count = len(reward_L)
    if count == 1:
        return Branches(np.array([-1, 0]), np.array([1]), reward_L, np.zeros(2))
    return Branches(np.array([-1, 0, *([1] * count)]), np.arange(2, 2 + count), reward_L, np.zeros(2 + count))
