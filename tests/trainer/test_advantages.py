from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from learner.trainer.advantages import Estimator, advantages, has_signal

TABLE: list[tuple[list[list[float]], dict[str, list[float]]]] = [
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
rewards_of_trees = st.lists(st.lists(st.floats(-2, 2).map(lambda r: round(r, 3)), max_size=5), min_size=1, max_size=4)


@pytest.mark.parametrize(("rewards", "estimator", "expected"), CASES)
def test_advantages_equal_the_reference_values(rewards: list[list[float]], estimator: Estimator, expected: list[float]) -> None:
    found = np.concatenate(advantages(rewards, estimator, singleton="raw"))
    assert found == pytest.approx(expected, abs=1e-4)


def test_a_lone_leaf_gets_nothing_or_its_reward() -> None:
    assert [a.tolist() for a in advantages([[0.7]], "inter", singleton="zero")] == [[0.0]]
    assert [a.tolist() for a in advantages([[0.7]], "inter", singleton="raw")] == [[0.7]]
    assert [a.tolist() for a in advantages([[1], [0]], "intra", singleton="zero")] == [[0.0], [0.0]]


def test_a_std_floor_keeps_tiny_differences_tiny() -> None:
    rewards = [[-0.2, -0.2, -0.201]]
    assert abs(advantages(rewards, "inter")[0]).max() > 1
    assert abs(advantages(rewards, "inter", std_floor=0.1)[0]).max() < 0.01


@given(st.lists(st.just(0.2), min_size=2, max_size=7))
def test_equal_rewards_give_exactly_nothing(rewards: list[float]) -> None:
    assert not has_signal([rewards])
    assert advantages([rewards], "tree")[0].tolist() == [0.0] * len(rewards)


@given(rewards_of_trees)
def test_advantages_keep_the_shape_and_sum_to_nothing(rewards: list[list[float]]) -> None:
    inter, intra, both = (advantages(rewards, name) for name in ("inter", "intra", "tree"))
    assert [len(a) for a in both] == [len(r) for r in rewards]
    assert sum(a.sum() for a in inter) == pytest.approx(0, abs=1e-6)
    assert all(a.sum() == pytest.approx(0, abs=1e-6) for a in intra)
    for total, one, other in zip(both, inter, intra, strict=True):
        assert total == pytest.approx(one + other)


@given(rewards_of_trees, st.floats(-3, 3))
def test_a_constant_added_to_all_rewards_changes_nothing(rewards: list[list[float]], constant: float) -> None:
    moved = [[r + constant for r in tree] for tree in rewards]
    for a, b in zip(advantages(rewards, std_floor=0.05), advantages(moved, std_floor=0.05), strict=True):
        assert a == pytest.approx(b, abs=1e-6)


@given(rewards_of_trees)
def test_a_better_leaf_never_gets_a_smaller_inter_advantage(rewards: list[list[float]]) -> None:
    flat_R, flat_A = (np.concatenate([*map(np.asarray, x), np.zeros(0)]) for x in (rewards, advantages(rewards, "inter")))
    assert (np.diff(flat_A[np.argsort(flat_R, kind="stable")]) >= -1e-12).all()
