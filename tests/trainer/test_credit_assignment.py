from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from learner.trainer.algorithm.advantages import Advantage, EstimatorOptions, advantages
from learner.trainer.algorithm.credit_assignment import (
    Credit,
    CreditedTree,
    UsableGroup,
    assign_credit,
    count_action_tokens,
    mixed_siblings_share,
    select_usable,
    version_lag,
)
from tests.trainer.builders import forked, group, grown, random_group, step, subtree
from treegrpo.config.train import Aggregation
from treegrpo.core.step import Leaf, PolicyVersion, Step, StepStatus, VersionSpan
from treegrpo.core.tree import Group

pytestmark = pytest.mark.pure


def credited(
    batch: list[UsableGroup], aggregation: Aggregation = "leaf_mean", options: EstimatorOptions | None = None
) -> list[CreditedTree]:
    return assign_credit(batch, [advantages(one.tree_arrays, options or EstimatorOptions()) for one in batch], aggregation)


def plain(one: Credit) -> tuple[float, list[float], float, float]:
    return one.weight, one.advantage_D.tolist(), one.inter, one.intra


def with_failures() -> Group:
    """Two good leaves, a branch that failed, and what no tree accepts by itself: a leaf below a failed step."""
    made = group([*forked((1.0, 0.5)), subtree([step(4, 1, [15], status=StepStatus.TOOL_ERROR)], {}, index=2)])
    made.trees[0].steps |= {5: step(5, 1, [16], status=StepStatus.ENGINE_ERROR), 6: step(6, 5, [17])}
    made.trees[0].leaves[6] = Leaf(6, {"em": 0.0})
    return made


def test_a_failed_branch_is_neither_a_leaf_nor_a_zero_reward() -> None:
    (episodes,) = select_usable([with_failures()])
    assert episodes.rewards == [[1.0, 0.5]]
    assert [leaf.node for leaf in episodes.leaves] == [2, 3]


@pytest.mark.parametrize("how", ["leaf_mean", "token_mean"])
def test_failed_branches_change_no_credit(how: Aggregation) -> None:
    (failed,), (good,) = (credited(select_usable([one]), how) for one in (with_failures(), group(forked((1.0, 0.5)))))
    assert {leaf: plain(c) for leaf, c in failed.credits.items()} == {leaf: plain(c) for leaf, c in good.credits.items()}


def test_branches_have_the_nodes_on_the_way_to_usable_leaves_and_no_others() -> None:
    (episodes,) = select_usable([with_failures()])
    (one,) = episodes.trees
    assert one.index == {0: 0, 1: 1, 2: 2, 3: 3}
    assert one.tree_arrays.parent_N.tolist() == [-1, 0, 1, 1]
    assert one.tree_arrays.leaf_L.tolist() == [2, 3]
    assert one.tree_arrays.reward_L.tolist() == [1.0, 0.5]


def test_a_step_that_only_failed_branches_went_on_from_is_in_no_branches() -> None:
    dead = [
        subtree([step(1, 0, [9]), step(2, 1, [10])], {2: 1.0}, prompt=[1]),
        subtree([step(3, 0, [11]), step(4, 3, [12], status=StepStatus.TOOL_ERROR)], {}, index=1),
    ]
    (episodes,) = select_usable([group(dead)])
    assert episodes.trees[0].index == {0: 0, 1: 1, 2: 2}


def test_parents_come_first_whatever_the_node_ids_are() -> None:
    chain = [step(7, 0, [9]), step(5, 7, [10]), step(6, 5, [11])]
    (episodes,) = select_usable([group([subtree(chain, {6: 1.0}, prompt=[1]), subtree([step(2, 5, [12])], {2: 0.0}, index=1)])])
    (one,) = episodes.trees
    assert [leaf.node for leaf in one.leaves] == [2, 6]
    assert one.index == {0: 0, 7: 1, 5: 2, 2: 3, 6: 4}
    assert one.tree_arrays.parent_N.tolist() == [-1, 0, 1, 2, 2]
    assert one.tree_arrays.leaf_L.tolist() == [3, 4]


def test_entropy_is_the_mean_surprise_of_a_step() -> None:
    nothing = Step(2, 1, np.zeros(0, np.uint32), np.zeros(0, np.float32), np.array([5], np.uint32))
    chain = [step(1, 0, [9, 10], logprobs=[-1.0, -2.0]), nothing, step(3, 2, [11], logprobs=[-0.25])]
    (episodes,) = select_usable([group([subtree(chain, {3: 1.0}, prompt=[1])])])
    assert episodes.tree_arrays[0].entropy_N.tolist() == [0.0, 1.5, 0.0, 0.25]


def test_each_step_of_a_path_carries_what_leaf_and_node_got() -> None:
    batch = select_usable([group([*forked((1.0, 0.0)), *forked((0.5, 0.5), tree=1)])])
    given = [Advantage(np.array([1.0, 2.0]), np.array([0, 10.0, 20.0, 30.0])), Advantage(np.array([3.0, 4.0]), np.zeros(4))]
    first, second = assign_credit(batch, [given], "leaf_mean")
    assert {leaf: c.advantage_D.tolist() for leaf, c in first.credits.items()} == {2: [11, 21], 3: [12, 32]}
    assert {leaf: c.advantage_D.tolist() for leaf, c in second.credits.items()} == {2: [3, 3], 3: [4, 4]}


def test_inter_and_intra_are_the_plain_ones_whatever_the_estimator() -> None:
    batch = select_usable([group([*forked((1.0, 0.0)), *forked((0.0, 0.0), tree=1)])])
    for options in (EstimatorOptions("treerl"), EstimatorOptions("tree", std_floor=9.0, inter_weight=0)):
        first, second = credited(batch, options=options)
        assert [(c.inter, c.intra) for c in first.credits.values()] == [
            pytest.approx((1.5, 0.7071), abs=1e-4),
            pytest.approx((-0.5, -0.7071), abs=1e-4),
        ]
        assert [(c.inter, c.intra) for c in second.credits.values()] == [pytest.approx((-0.5, 0), abs=1e-4)] * 2


def test_groups_without_any_leaf_are_left_out() -> None:
    empty = group([subtree([step(1, 0, [9], status=StepStatus.ENGINE_ERROR)], {}, prompt=[1])], "empty")
    assert [one.group.id for one in select_usable([empty, group(forked(), "good")])] == ["good"]
    assert select_usable([empty]) == []


@pytest.mark.parametrize("how", ["leaf_mean", "token_mean"])
def test_the_weights_of_all_action_tokens_of_a_batch_sum_to_one(how: Aggregation) -> None:
    rng = np.random.default_rng(3)
    batch = select_usable([random_group(rng, str(n), trees=n + 1) for n in range(3)])
    trees = credited(batch, how)
    parts = [c.weight * count_action_tokens(one.tree.path(leaf)) for one in trees for leaf, c in one.credits.items()]
    assert sum(parts) == pytest.approx(1)


def test_leaf_mean_gives_each_group_and_each_leaf_in_it_the_same_share() -> None:
    batch = select_usable([group(forked(), "a"), group([*forked(), *forked(tree=1)], "b")])
    first, second, _ = credited(batch)
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
    assert mixed_siblings_share([group([chain, same])]) == 0
    assert mixed_siblings_share([group([chain, later]), group([chain, same])]) == 0.5


def test_siblings_count_as_mixed_also_if_one_failed() -> None:
    failed = subtree([step(3, 1, [5], status=StepStatus.TOOL_ERROR, version=PolicyVersion(0, 1))], {}, index=1)
    assert mixed_siblings_share([group([forked()[0], failed])]) == 1


def test_the_first_steps_of_all_trees_of_a_question_are_siblings() -> None:
    later = subtree([step(1, 0, [5], version=PolicyVersion(0, 1))], {1: 0.0}, prompt=[1], tree=1)
    assert mixed_siblings_share([group([*forked(), later])]) == 0.5
    assert mixed_siblings_share([group(forked(), "a"), group([later], "b")]) == 0


def test_siblings_that_changed_version_alike_are_not_mixed() -> None:
    both = (VersionSpan(PolicyVersion(0, 0), 0, 1), VersionSpan(PolicyVersion(0, 1), 1, 2))
    one, other, third = (replace(step(node, 0, [5, 6]), spans=both) for node in (1, 2, 3))
    alike = [subtree([one], {1: 1.0}, prompt=[1]), subtree([other], {2: 0.0}, index=1)]
    assert mixed_siblings_share([group(alike)]) == 0
    assert (
        mixed_siblings_share([group([*alike, subtree([replace(third, spans=(replace(both[0], end=2),))], {3: 0.0}, index=2)])])
        == 1
    )


def test_without_siblings_whose_version_is_known_no_share_is_mixed() -> None:
    mute = subtree([step(2, 0, [], status=StepStatus.ENGINE_ERROR)], {}, index=1)
    mute = replace(mute, steps=(replace(mute.steps[0], spans=()),))
    assert mixed_siblings_share([group([subtree([step(1, 0, [5])], {1: 1.0}, prompt=[1]), mute])]) is None
    assert mixed_siblings_share([]) is None


def test_a_tree_without_leaf_takes_its_place_in_the_group() -> None:
    lone = subtree([step(1, 0, [9], status=StepStatus.TOOL_ERROR)], {}, prompt=[1], tree=0)
    (episodes,) = select_usable([group([lone, *forked(tree=1)])])
    assert episodes.rewards == [[], [1.0, 0.0]]
    assert [len(one.tree_arrays.parent_N) for one in episodes.trees] == [1, 4]
    assert [len(one.credits) for one in credited([episodes])] == [0, 2]
    assert grown(forked()).unique_tokens == 3 + 5 + 2 + 3
