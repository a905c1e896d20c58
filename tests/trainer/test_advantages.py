from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any, get_args

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from learner.trainer.algorithm.advantages import ESTIMATORS, Advantage, EstimatorOptions, TreeArrays, advantages, has_signal
from treegrpo.config.train import ESTIMATOR_OPTIONS, Estimator, TrainConfig

pytestmark = pytest.mark.pure

LEAF_LEVEL: list[Estimator] = ["tree", "inter", "intra", "two_norm", "rloo", "treepo"]
NODE_LEVEL: list[Estimator] = ["treerl", "sibling_loo", "at2po"]
ALL = LEAF_LEVEL + NODE_LEVEL

TABLE: list[tuple[list[list[float]], dict[Estimator, list[float]]]] = [
    (
        [[1, 0.2, 0.2], [0.1, 0.1, 0.1]],
        {
            "inter": [2.0216, -0.2351, -0.2351, -0.5172, -0.5172, -0.5172],
            "intra": [1.1547, -0.5773, -0.5773, 0, 0, 0],
            "tree": [3.1763, -0.8124, -0.8124, -0.5172, -0.5172, -0.5172],
        },
    ),
    (
        [[1, 0], [0, 0]],
        {"inter": [1.5, -0.5, -0.5, -0.5], "intra": [0.7071, -0.7071, 0, 0], "tree": [2.2071, -1.2071, -0.5, -0.5]},
    ),
    ([[1], [0]], {"inter": [0.7071, -0.7071], "intra": [1, 0], "tree": [1.7071, -0.7071]}),
    (
        [[1, 0.8, 0.2], [0.1, 1, 0.2]],
        {
            "inter": [1.0519, 0.5844, -0.8182, -1.0519, 1.0519, -0.8182],
            "intra": [0.8006, 0.3203, -1.1209, -0.6757, 1.1488, -0.473],
            "tree": [1.8526, 0.9047, -1.9391, -1.7277, 2.2007, -1.2912],
        },
    ),
]
CASES = [(rewards, name, values) for rewards, by_name in TABLE for name, values in by_name.items()]


def branches(parents: Sequence[int], leaves: dict[int, float], entropies: Sequence[float] | None = None) -> TreeArrays:
    """A tree by the parents of its nodes after the root, and the rewards of its leaves by node."""
    entropy_N = np.zeros(len(parents) + 1) if entropies is None else np.array([0.0, *entropies])
    return TreeArrays(np.array([-1, *parents]), np.array([*leaves], np.int64), np.array([*leaves.values()], float), entropy_N)


def fan(rewards: Sequence[float]) -> TreeArrays:
    """One step below the root, and a leaf for each reward below that."""
    return branches([0] + [1] * len(rewards), dict(enumerate(rewards, 2))) if rewards else branches([], {})


def fans(rewards: Sequence[Sequence[float]]) -> list[TreeArrays]:
    return [fan(of_tree) for of_tree in rewards]


def chains(rewards: Sequence[float]) -> list[TreeArrays]:
    """Trees without a fork, of one step, two steps, and so on."""
    return [branches(range(n), {n: reward}) for n, reward in enumerate(rewards, 1)]


def of_leaves(found: Sequence[Advantage]) -> list[float]:
    assert not any(one.node_N.any() for one in found)
    return np.concatenate([np.zeros(0), *(one.leaf_L for one in found)]).tolist()


def of_nodes(found: Sequence[Advantage]) -> list[list[float]]:
    """Without the root."""
    assert not any(one.leaf_L.any() or one.node_N[0] for one in found)
    return [one.node_N[1:].tolist() for one in found]


def fork_and_chain() -> list[TreeArrays]:
    """What the numbers below are worked out on.

    tree 1   root ── 1 ─┬─ 2      R = 1      V(1) = 0.5, V(2) = 1, V(3) = V(4) = 0
                        └─ 3 ── 4 R = 0
    tree 2   root ── 1            R = 0.2    V(1) = 0.2
    V(root) = (1 + 0 + 0.2) / 3 = 0.4
    """
    return [branches([0, 1, 1, 3], {2: 1.0, 4: 0.0}, [5.0, np.log(3), 0.0, 2.0]), branches([0], {1: 0.2}, [1.0])]


@pytest.mark.parametrize(("rewards", "estimator", "expected"), CASES)
def test_advantages_equal_the_reference_values(rewards: list[list[float]], estimator: Estimator, expected: list[float]) -> None:
    found = of_leaves(advantages(fans(rewards), EstimatorOptions(estimator, singleton="raw")))
    assert found == pytest.approx(expected, abs=1e-4)


def test_tree_weighs_its_two_parts() -> None:
    # 3·[1.5, −.5, −.5, −.5] + 2·[.7071, −.7071, 0, 0]
    found = of_leaves(advantages(fans([[1, 0], [0, 0]]), EstimatorOptions("tree", inter_weight=3, intra_weight=2)))
    assert found == pytest.approx([5.9142, -2.9142, -1.5, -1.5], abs=1e-4)


def test_two_norm_normalises_twice() -> None:
    # inter, then over the tree: (1 − .4667) / .4619 = 1.1547, as the first step is undone by the second; equal ones are 0
    found = of_leaves(advantages(fans([[1, 0.2, 0.2], [0.1, 0.1, 0.1]]), EstimatorOptions("two_norm")))
    assert found == pytest.approx([1.1547, -0.5773, -0.5773, 0, 0, 0], abs=1e-4)
    # floor 1: [1, 0, 0, 0] has mean .25 and std .5 → [.75, −.25 ×3]; of [.75, −.25] the mean is .25 and the std .7071 → ±.5
    found = of_leaves(advantages(fans([[1, 0], [0, 0]]), EstimatorOptions("two_norm", std_floor=1)))
    assert found == pytest.approx([0.5, -0.5, 0, 0], abs=1e-5)


def test_two_norm_keeps_the_first_norm_of_lone_leaves_if_told() -> None:
    assert of_leaves(advantages(chains([1, 0]), EstimatorOptions("two_norm", singleton="raw"))) == pytest.approx(
        [0.7071, -0.7071], abs=1e-4
    )
    assert of_leaves(advantages(chains([1, 0]), EstimatorOptions("two_norm"))) == [0, 0]


def test_rloo_compares_with_all_other_leaves() -> None:
    # 1 − (0 + .2)/2, 0 − (1 + .2)/2, .2 − (1 + 0)/2
    assert of_leaves(advantages(fork_and_chain(), EstimatorOptions("rloo"))) == pytest.approx([0.9, -0.6, -0.3])


def test_treepo_averages_over_the_ancestors_that_compare_anything() -> None:
    # leaf 2: root 1 − .4, node 1 1 − .5; leaf 4: root −.4, node 1 −.5, node 3 has one leaf; tree 2: root alone .2 − .4
    assert of_leaves(advantages(fork_and_chain(), EstimatorOptions("treepo"))) == pytest.approx([0.55, -0.45, -0.2])


def test_treerl_adds_global_and_local_advantage() -> None:
    # 1: (.1 + .1)/√2; 2: .6 + .5; 3: −.4 − .5; 4: −.4 + 0; tree 2: −.2 − .2
    first, second = of_nodes(advantages(fork_and_chain(), EstimatorOptions("treerl")))
    assert first == pytest.approx([0.2 / 2**0.5, 1.1, -0.9, -0.4])
    assert second == pytest.approx([-0.4])


def test_sibling_loo_compares_siblings_also_of_other_trees() -> None:
    # 1 against tree 2: .5 − .2; 2 against 3: 1 − 0; 4 has no sibling and goes on with 3
    first, second = of_nodes(advantages(fork_and_chain(), EstimatorOptions("sibling_loo")))
    assert first == pytest.approx([0.3, 1, -1, -1])
    assert second == pytest.approx([-0.3])


def test_sibling_loo_takes_the_mean_of_siblings_whatever_their_leaves() -> None:
    # V = [.5, 1, 0], the first of two leaves: .5 − (1 + 0)/2, 1 − (.5 + 0)/2, 0 − (.5 + 1)/2
    first, second, third = of_nodes(advantages([fan([1, 0]), *chains([1, 0])], EstimatorOptions("sibling_loo")))
    assert first == pytest.approx([0, 1, -1])
    assert second == pytest.approx([0.75])
    assert third == pytest.approx([-0.75, -0.75])


def test_at2po_backs_up_normalised_rewards_with_entropy_weights() -> None:
    # mean .4, std √((.36 + .16 + .04)/2) = .52915; leaves .6/.52915, −.4/.52915, −.2/.52915
    # children of 1 have entropy ln 3 and 0, so weights 3/4 and 1/4: (.75·.6 − .25·.4)/.52915
    first, second = of_nodes(advantages(fork_and_chain(), EstimatorOptions("at2po")))
    assert first == pytest.approx([0.661438, 1.133893, -0.755929, -0.755929], abs=1e-5)
    assert second == pytest.approx([-0.377964], abs=1e-5)


def test_at2po_takes_any_entropy() -> None:
    (found,) = of_nodes(advantages([branches([0, 1, 1], {2: 1.0, 3: 0.0}, [0, 5000, 0])], EstimatorOptions("at2po")))
    assert found == pytest.approx([0.7071, 0.7071, -0.7071], abs=1e-4)


@pytest.mark.parametrize("estimator", ["tree", "inter", "intra", "two_norm", "at2po"])
def test_a_std_floor_keeps_tiny_differences_tiny(estimator: Estimator) -> None:
    def largest(floor: float) -> float:
        (found,) = advantages([fan([-0.2, -0.2, -0.201])], EstimatorOptions(estimator, std_floor=floor))
        return max(abs(found.leaf_L).max(), abs(found.node_N).max())

    assert largest(0) > 1
    assert largest(0.1) < 0.1


@pytest.mark.parametrize("estimator", ALL)
def test_a_lone_leaf_gets_nothing(estimator: Estimator) -> None:
    empty, lone = advantages([branches([], {}), branches([0, 1], {2: 0.7})], EstimatorOptions(estimator))
    assert (empty.leaf_L.tolist(), empty.node_N.tolist()) == ([], [0])
    assert (lone.leaf_L.tolist(), lone.node_N.tolist()) == ([0], [0, 0, 0])


@pytest.mark.parametrize("estimator", ["inter", "intra", "two_norm", "rloo", "treepo"])
def test_a_lone_leaf_gets_its_reward_if_told(estimator: Estimator) -> None:
    assert of_leaves(advantages([branches([0, 1], {2: 0.7})], EstimatorOptions(estimator, singleton="raw"))) == [0.7]


def test_at2po_gives_the_path_of_a_lone_leaf_its_reward_if_told() -> None:
    assert of_nodes(advantages([branches([0, 1], {2: 0.7})], EstimatorOptions("at2po", singleton="raw"))) == [[0.7, 0.7]]


@pytest.mark.parametrize("estimator", ALL)
def test_a_question_without_any_leaf_has_no_advantages(estimator: Estimator) -> None:
    assert advantages([], EstimatorOptions(estimator)) == []
    (found,) = advantages([branches([], {})], EstimatorOptions(estimator))
    assert (found.leaf_L.tolist(), found.node_N.tolist()) == ([], [0])


def test_chains_are_compared_by_siblings_as_by_rloo() -> None:
    rewards = [1, 0.2, 0.4]
    expected = of_leaves(advantages(chains(rewards), EstimatorOptions("rloo")))
    for nodes, value in zip(of_nodes(advantages(chains(rewards), EstimatorOptions("sibling_loo"))), expected, strict=True):
        assert nodes == pytest.approx([value] * len(nodes))


def test_rounding_is_no_signal() -> None:
    assert not has_signal([[0.1 + 0.2], [0.3]])
    assert not has_signal([[], [0.3]])
    assert has_signal([[0.3], [0.301]])


@st.composite
def trees(draw: st.DrawFn, reward: st.SearchStrategy[float]) -> TreeArrays:
    """Up to four leaves, each at the end of up to three steps off any node that is no leaf."""
    parents: list[int] = []
    leaves: dict[int, float] = {}
    for _ in range(draw(st.integers(0, 4))):
        node = draw(st.sampled_from([n for n in range(len(parents) + 1) if n not in leaves]))
        for _ in range(draw(st.integers(1, 3))):
            parents.append(node)
            node = len(parents)
        leaves[node] = draw(reward)
    return branches(parents, leaves, [draw(st.floats(0, 4)) for _ in parents])


questions = st.lists(trees(st.integers(-20, 20).map(lambda n: n / 10)), min_size=1, max_size=3)
estimators: st.SearchStrategy[Estimator] = st.sampled_from(ALL)


def on_paths(question: Sequence[TreeArrays], found: Sequence[Advantage]) -> list[list[list[float]]]:
    """What each leaf's path carries, from the root down, by tree."""
    return [
        [
            (value.leaf_L[leaf] + value.node_N[path])[1:].tolist()
            for leaf, path in enumerate(np.flatnonzero(row) for row in one.paths)
        ]
        for one, value in zip(question, found, strict=True)
    ]


@settings(deadline=None)
@given(questions, estimators, st.randoms())
def test_the_order_of_leaves_and_trees_does_not_matter(question: list[TreeArrays], estimator: Estimator, random: Any) -> None:
    order = random.sample(range(len(question)), len(question))
    leaves = [random.sample(range(len(one.leaf_L)), len(one.leaf_L)) for one in question]
    moved = [
        TreeArrays(one.parent_N, one.leaf_L[leaves[n]], one.reward_L[leaves[n]], one.entropy_N)
        for n, one in ((n, question[n]) for n in order)
    ]
    before = on_paths(question, advantages(question, EstimatorOptions(estimator)))
    after = on_paths(moved, advantages(moved, EstimatorOptions(estimator)))
    for place, tree in enumerate(order):
        for leaf, values in zip(leaves[tree], after[place], strict=True):
            assert values == pytest.approx(before[tree][leaf], abs=1e-7)


@settings(deadline=None)
@given(questions, estimators)
def test_advantages_have_the_shape_of_the_trees_and_are_finite(question: list[TreeArrays], estimator: Estimator) -> None:
    for one, value in zip(question, advantages(question, EstimatorOptions(estimator)), strict=True):
        assert (value.leaf_L.shape, value.node_N.shape) == (one.leaf_L.shape, one.parent_N.shape)
        assert np.isfinite(value.leaf_L).all()
        assert np.isfinite(value.node_N).all()


@settings(deadline=None)
@given(st.lists(trees(st.sampled_from([0.1 + 0.2, 0.3])), min_size=1, max_size=3), estimators)
def test_equal_rewards_give_exactly_nothing(question: list[TreeArrays], estimator: Estimator) -> None:
    for found in advantages(question, EstimatorOptions(estimator)):
        assert not found.leaf_L.any()
        assert not found.node_N.any()


@settings(deadline=None)
@given(questions, estimators, st.floats(-3, 3))
def test_a_constant_added_to_all_rewards_changes_nothing(
    question: list[TreeArrays], estimator: Estimator, constant: float
) -> None:
    moved = [TreeArrays(one.parent_N, one.leaf_L, one.reward_L + constant, one.entropy_N) for one in question]
    before, after = (advantages(each, EstimatorOptions(estimator)) for each in (question, moved))
    for a, b in zip(before, after, strict=True):
        assert a.leaf_L == pytest.approx(b.leaf_L, abs=1e-6)
        assert a.node_N == pytest.approx(b.node_N, abs=1e-6)


@given(questions)
def test_comparisons_of_all_leaves_sum_to_nothing(question: list[TreeArrays]) -> None:
    for estimator in ("tree", "inter", "intra", "two_norm", "rloo"):
        assert sum(of_leaves(advantages(question, EstimatorOptions(estimator)))) == pytest.approx(0, abs=1e-6)


@given(questions)
def test_comparisons_within_a_tree_sum_to_nothing_in_each(question: list[TreeArrays]) -> None:
    for estimator in ("intra", "two_norm"):
        for found in advantages(question, EstimatorOptions(estimator)):
            assert found.leaf_L.sum() == pytest.approx(0, abs=1e-6)


@settings(deadline=None)
@given(questions)
def test_siblings_sum_to_nothing(question: list[TreeArrays]) -> None:
    found = advantages(question, EstimatorOptions("sibling_loo"))
    below_root = [(one.parent_N == 0, value.node_N) for one, value in zip(question, found, strict=True)]
    assert sum(node_N[at].sum() for at, node_N in below_root) == pytest.approx(0, abs=1e-6)
    for one, value in zip(question, found, strict=True):
        for parent in range(1, len(one.parent_N)):
            siblings = value.node_N[one.parent_N == parent]
            assert len(siblings) == 1 or siblings.sum() == pytest.approx(0, abs=1e-6)


@settings(deadline=None)
@given(questions)
def test_a_better_leaf_never_gets_less(question: list[TreeArrays]) -> None:
    reward = np.concatenate([one.reward_L for one in question])
    for estimator in ("inter", "rloo"):
        values = np.array(of_leaves(advantages(question, EstimatorOptions(estimator))))
        assert all(a <= b + 1e-9 for a, b in pairwise(values[np.argsort(reward, kind="stable")]))


def test_every_estimator_of_the_configuration_exists() -> None:
    assert set(ESTIMATORS) == set(get_args(Estimator)) == set(ALL)
    assert set(ESTIMATOR_OPTIONS) <= set(ALL)


@settings(deadline=None)
@given(questions, estimators)
def test_an_option_that_is_refused_would_have_changed_nothing(question: list[TreeArrays], estimator: Estimator) -> None:
    others: dict[str, Any] = {"singleton": "raw", "std_floor": 0.7, "inter_weight": 3.0, "intra_weight": 2.0}
    unused = {name: value for name, value in others.items() if name not in ESTIMATOR_OPTIONS.get(estimator, set())}
    plain, same = advantages(question, EstimatorOptions(estimator)), advantages(question, EstimatorOptions(estimator, **unused))
    assert on_paths(question, plain) == on_paths(question, same)


@pytest.mark.parametrize(
    "values",
    [
        {"estimator": "rloo", "std_floor": 0.1},
        {"estimator": "treerl", "singleton": "raw"},
        {"estimator": "inter", "intra_weight": 0.5},
        {"inter_weight": 0, "intra_weight": 0},
    ],
)
def test_options_that_would_do_nothing_are_refused(values: dict[str, Any]) -> None:
    with pytest.raises(ValidationError, match=r"uses it, and train\.estimator is |every advantage would be 0"):
        TrainConfig.model_validate(values)


def test_the_options_of_a_run_are_those_of_its_configuration() -> None:
    values = {"estimator": "tree", "singleton": "raw", "std_floor": 0.1, "inter_weight": 0.5, "intra_weight": 2}
    assert EstimatorOptions.from_config(TrainConfig.model_validate(values)) == EstimatorOptions("tree", "raw", 0.1, 0.5, 2)
