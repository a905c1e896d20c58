from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from learner.trainer.advantages import advantages
from learner.trainer.episodes import Credit, CreditedTree, credit, usable
from learner.trainer.packing import Pack, pack
from tests.trainer.builders import STOP, forked, grown, random_group, step, subtree
from treegrpo.errors import ContractError


def actions_of(packs: list[Pack]) -> list[tuple[tuple[int, ...], int, float]]:
    """(tokens before, action token, sampler log-probability) of every action token, sorted."""
    found: list[tuple[tuple[int, ...], int, float]] = []
    for one in packs:
        for at, label, sampled in zip(one.predictor_A.tolist(), one.label_A.tolist(), one.sampled_A.tolist(), strict=True):
            row, column = divmod(at, one.ids_RS.shape[1])
            found.append((tuple(one.ids_RS[row, : column + 1].tolist()), label, sampled))
    return sorted(found)


def expected_of(trees: list[CreditedTree]) -> list[tuple[tuple[int, ...], int, float]]:
    found: list[tuple[tuple[int, ...], int, float]] = []
    for one in trees:
        for leaf in one.credits:
            before: list[int] = one.tree.prompt.tolist()
            for part in one.tree.path(leaf):
                for token, logprob in zip(part.action.tolist(), part.logprobs.tolist(), strict=True):
                    found.append((tuple(before), token, logprob))
                    before = [*before, token]
                before = [*before, *part.observation.tolist()]
    return sorted(found)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(1, 4), st.integers(8, 200))
def test_every_action_token_of_every_leaf_is_predicted_once_from_its_own_path(seed: int, groups: int, budget: int) -> None:
    rng = np.random.default_rng(seed)
    batch = usable([random_group(rng, str(n)) for n in range(groups)])
    trees = credit(batch, [advantages(one.rewards) for one in batch], "leaf_mean")
    packs = pack(trees, budget, keep_zero=True)
    assert actions_of(packs) == expected_of(trees)
    assert sum(p.weight_A.sum().item() for p in packs) == pytest.approx(1, rel=1e-5)
    for one in packs:
        assert one.ids_RS.numel() <= budget or one.ids_RS.shape[0] == 1


def test_stop_tokens_are_trained_and_observations_are_not() -> None:
    (one,) = pack([CreditedTree(grown(forked()), {2: Credit(1.0, 0.5), 3: Credit(-1.0, 0.5)})], 1000, keep_zero=False)
    assert sorted(one.label_A.tolist()) == sorted([10, 11, 12, STOP, 10, 11, 13, 14, STOP])


def test_the_advantage_goes_to_its_side_times_the_weight() -> None:
    (one,) = pack([CreditedTree(grown(forked()), {2: Credit(2.0, 0.5), 3: Credit(-3.0, 0.25)})], 1000, keep_zero=False)
    assert one.plus_A.tolist() == [0.0] * 5 + [1.0] * 4  # the longer path comes first
    assert one.minus_A.tolist() == [-0.75] * 5 + [0.0] * 4
    assert one.weight_A.tolist() == [0.25] * 5 + [0.5] * 4


def test_paths_that_move_nothing_are_packed_only_for_a_penalty() -> None:
    trees = [CreditedTree(grown(forked()), {2: Credit(0.0, 0.5), 3: Credit(1.0, 0.5)})]
    assert [p.ids_RS.shape[0] for p in pack(trees, 1000, keep_zero=False)] == [1]
    assert [p.ids_RS.shape[0] for p in pack(trees, 1000, keep_zero=True)] == [2]
    assert pack([CreditedTree(grown(forked()), {2: Credit(0.0, 0.5)})], 1000, keep_zero=False) == []


def test_a_path_beyond_the_budget_is_packed_alone_and_whole() -> None:
    long = grown([subtree([step(1, 0, range(40))], {1: 1.0}, prompt=[1, 2])])
    short = grown(forked())
    packs = pack([CreditedTree(short, {2: Credit(1.0, 1.0)}), CreditedTree(long, {1: Credit(1.0, 1.0)})], 16, keep_zero=False)
    assert [tuple(p.ids_RS.shape) for p in packs] == [(1, 41), (1, 9)]
    assert [p.tokens for p in packs] == [41, 9]


def test_a_tree_without_prompt_is_refused() -> None:
    bare = grown([subtree([step(1, 0, [4])], {1: 1.0}, index=1)])  # a branch whose tree's first subtree never came
    with pytest.raises(ContractError, match="has no prompt"):
        pack([CreditedTree(bare, {1: Credit(1.0, 1.0)})], 100, keep_zero=False)
