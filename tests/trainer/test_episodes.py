from __future__ import annotations

import numpy as np
import pytest

from learner.trainer.advantages import advantages
from learner.trainer.episodes import Aggregation, action_tokens, credit, mixed_siblings, usable, version_lag
from tests.trainer.builders import forked, group, grown, random_group, step, subtree
from treegrpo.tree import Group, PolicyVersion, StepStatus


def with_failures() -> Group:
    """Two good leaves, a branch that failed, and a leaf below a failed step."""
    failed = subtree([step(4, 1, [15], status=StepStatus.TOOL_ERROR)], {}, index=2)
    below = subtree([step(5, 1, [16], status=StepStatus.ENGINE_ERROR), step(6, 5, [17])], {6: 0.0}, index=3)
    return group([*forked((1.0, 0.5)), failed, below])


def test_a_failed_branch_is_neither_a_leaf_nor_a_zero_reward() -> None:
    (episodes,) = usable([with_failures()])
    assert episodes.rewards == [[1.0, 0.5]]
    assert [leaf.node for leaf in episodes.leaves] == [2, 3]


def test_failed_branches_change_no_weight() -> None:
    for how in ("leaf_mean", "token_mean"):
        (whole,), (plain,) = (
            credit(batch, [advantages(one.rewards) for one in batch], how)
            for batch in (usable([with_failures()]), usable([group(forked((1.0, 0.5)))]))
        )
        assert whole.credits == plain.credits


def test_groups_without_any_leaf_are_left_out() -> None:
    empty = group([subtree([step(1, 0, [9], status=StepStatus.ENGINE_ERROR)], {}, prompt=[1])], "empty")
    assert [one.group.id for one in usable([empty, group(forked(), "good")])] == ["good"]
    assert usable([empty]) == []


@pytest.mark.parametrize("how", ["leaf_mean", "token_mean"])
def test_the_weights_of_all_action_tokens_of_a_batch_sum_to_one(how: Aggregation) -> None:
    rng = np.random.default_rng(3)
    batch = usable([random_group(rng, str(n), trees=n + 1) for n in range(3)])
    credited = credit(batch, [advantages(one.rewards) for one in batch], how)
    parts = [c.weight * action_tokens(one.tree.path(leaf)) for one in credited for leaf, c in one.credits.items()]
    assert sum(parts) == pytest.approx(1)


def test_leaf_mean_gives_each_group_and_each_leaf_in_it_the_same_share() -> None:
    batch = usable([group(forked(), "a"), group([*forked(), *forked(tree=1)], "b")])
    first, second, _ = credit(batch, [advantages(one.rewards) for one in batch], "leaf_mean")
    assert first.credits[2].weight == pytest.approx(1 / (2 * 2 * 4))
    assert first.credits[3].weight == pytest.approx(1 / (2 * 2 * 5))
    assert second.credits[2].weight == pytest.approx(1 / (2 * 4 * 4))


def test_lag_is_weighted_by_tokens() -> None:
    old, new = PolicyVersion(0, 3), PolicyVersion(0, 5)
    chain = [step(1, 0, [1, 2, 3], version=old), step(2, 1, [4], version=new)]
    assert version_lag([group([subtree(chain, {2: 1.0}, prompt=[1])])], new) == (1.5, 2)
    assert version_lag([], new) == (0.0, 0)


def test_siblings_of_different_versions_are_counted() -> None:
    later = subtree([step(3, 1, [5], version=PolicyVersion(0, 1))], {3: 0.0}, index=1)
    chain, same = forked()
    assert mixed_siblings([group([chain, same])]) == 0
    assert mixed_siblings([group([chain, later]), group([chain, same])]) == 0.5


def test_a_tree_without_leaf_takes_its_place_in_the_group() -> None:
    lone = subtree([step(1, 0, [9], status=StepStatus.TOOL_ERROR)], {}, prompt=[1], tree=0)
    (episodes,) = usable([group([lone, *forked(tree=1)])])
    assert episodes.rewards == [[], [1.0, 0.0]]
    assert [len(tree.credits) for tree in credit([episodes], [advantages(episodes.rewards)], "leaf_mean")] == [0, 2]
    assert grown(forked()).unique_tokens == 3 + 5 + 2 + 3
