from __future__ import annotations

from dataclasses import fields, replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from learner.trainer.algorithm.advantages import EstimatorOptions, advantages
from learner.trainer.algorithm.credit_assignment import Credit, CreditedTree, assign_credit, select_usable
from learner.trainer.algorithm.targets import SIGNS
from learner.trainer.packing.packing import Pack, empty_pack, pack
from tests.trainer.builders import STOP, forked, grown, random_group, step, subtree
from treegrpo.core.step import PolicyVersion, VersionSpan
from treegrpo.core.tree import Group, Tree
from treegrpo.errors import ContractError

pytestmark = pytest.mark.pure

Place = tuple[tuple[int, ...], int, float, float]
"""Tokens before an action token, the token, its weight and its advantage."""


def even(advantage: float, weight: float, steps: int = 2, *, inter: float = 0.0, intra: float = 0.0) -> Credit:
    """The same advantage for every step of a path."""
    return Credit(weight, np.full(steps, advantage), inter, intra)


def path_to(one: Pack, at: int) -> tuple[int, ...]:
    """The tokens that token ``at`` of a pack sees, in order, itself included."""
    end_T = one.layout.end_T
    seen = [j for j in range(at + 1) if at < end_T[j]]
    assert one.position_T[seen].tolist() == list(range(len(seen)))
    return tuple(one.ids_T[seen].tolist())


def places_of(packs: list[Pack]) -> list[Place]:
    found: list[Place] = []
    for one in packs:
        t = one.targets
        for token, weight, advantage in zip(t.token_P.tolist(), t.weight_P.tolist(), t.advantage_P.tolist(), strict=True):
            before = path_to(one, int(one.predictor_A[token]))
            found.append((before, int(t.label_A[token]), weight, advantage))
    return sorted(found)


def expected_places(trees: list[CreditedTree]) -> list[Place]:
    found: list[Place] = []
    for one in trees:
        for leaf, c in one.credits.items():
            before: list[int] = one.tree.prompt.tolist()
            for part, advantage in zip(one.tree.path(leaf), c.advantage_D.tolist(), strict=True):
                for token in part.action.tolist():
                    found.append((tuple(before), token, float(np.float32(c.weight)), float(np.float32(advantage))))
                    before = [*before, token]
                before = [*before, *part.observation.tolist()]
    return sorted(found)


def credited(groups: list[Group], estimator: str = "tree") -> list[CreditedTree]:
    batch = select_usable(groups)
    options = EstimatorOptions(estimator)  # pyright: ignore[reportArgumentType]
    return assign_credit(batch, [advantages(one.tree_arrays, options) for one in batch], "leaf_mean")


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(1, 4), st.integers(8, 200), st.sampled_from(["tree", "treerl"]))
def test_every_action_token_of_every_leaf_is_predicted_from_its_own_path(
    seed: int, groups: int, budget: int, estimator: str
) -> None:
    rng = np.random.default_rng(seed)
    trees = credited([random_group(rng, str(n)) for n in range(groups)], estimator)
    packs = pack(trees, budget, keep_zero=True)
    assert places_of(packs) == expected_places(trees)
    assert sum(p.targets.weight_P.sum().item() for p in packs) == pytest.approx(1, rel=1e-5)
    counted = sum(int(p.targets.counted_A.sum()) for p in packs)
    assert counted == sum(len(s.action) for one in trees for s in one.tree.steps.values())
    for one in packs:
        assert one.tokens <= budget or one.targets.leaves == 1


def test_a_tree_in_one_pack_has_each_token_once_and_no_padding() -> None:
    tree = grown(forked())
    (one,) = pack([CreditedTree(tree, {2: even(1.0, 0.5), 3: even(-1.0, 0.5)})], 1000, keep_zero=False)
    assert one.tokens == tree.unique_tokens - 2  # the last token of a path is only predicted
    assert one.path_tokens == (3 + 5 + 2 - 1) + (3 + 5 + 3 - 1)
    assert one.targets.label_A.tolist() == [10, 11, 12, STOP, 13, 14, STOP]
    assert one.targets.counted_A.all()
    assert one.targets.token_P.tolist() == [0, 1, 2, 3, 0, 1, 4, 5, 6]
    assert one.targets.leaf_P.tolist() == [0] * 4 + [1] * 5


def test_tokens_at_lag_0_are_marked_also_within_an_action() -> None:
    """New weights came in after the first token of node 1; node 3 is of a lineage that was given up."""
    tree, old, now = grown(forked()), PolicyVersion(0, 4), PolicyVersion(1, 5)
    mixed = (VersionSpan(old, 0, 1), VersionSpan(now, 1, 2))
    spans = {1: mixed, 2: (VersionSpan(now, 0, 2),), 3: (VersionSpan(PolicyVersion(0, 5), 0, 3),)}
    tree.steps.update({node: replace(step, spans=spans[node]) for node, step in tree.steps.items()})
    given = {2: even(1.0, 0.5), 3: even(-1.0, 0.5)}
    (one,) = pack([CreditedTree(tree, given)], 1000, keep_zero=False, now=now)
    assert one.targets.label_A[one.targets.fresh_A].tolist() == [11, 12, STOP]
    (unknown,) = pack([CreditedTree(tree, given)], 1000, keep_zero=False)
    assert not unknown.targets.fresh_A.any()


def test_the_last_token_of_the_parent_predicts_the_first_of_a_branch() -> None:
    (one,) = pack([CreditedTree(grown(forked()), {2: even(1.0, 0.5), 3: even(-1.0, 0.5)})], 1000, keep_zero=False)
    branch = one.targets.label_A.tolist().index(13)
    assert path_to(one, int(one.predictor_A[branch])) == (1, 2, 3, 10, 11, 30, 31, 32)


def test_trees_of_one_question_share_their_prompt() -> None:
    first, second = grown(forked(prompt=range(20, 40))), grown(forked((0.0, 1.0), prompt=range(20, 40), tree=1))
    second.steps[1].action[:] = [40, 41]
    (one,) = pack([CreditedTree(t, {2: even(1.0, 0.5), 3: even(-1.0, 0.5)}) for t in (first, second)], 1000, keep_zero=False)
    assert one.tokens == 20 + 2 * (first.unique_tokens - 20 - 2)


def test_what_was_sampled_twice_is_computed_once_and_learned_twice() -> None:
    """Two trees with the same first step, sampled under different versions."""
    first, second = grown(forked()), grown(forked(tree=1))
    second.steps[1].logprobs[:] = -2
    (one,) = pack([CreditedTree(t, {2: even(1.0, 0.5), 3: even(-1.0, 0.5)}) for t in (first, second)], 1000, keep_zero=False)
    assert one.tokens == first.unique_tokens - 2
    assert sorted(one.targets.sampled_A.tolist()) == [-2.0] * 2 + [-1.0] * 12


def test_signed_sums_are_those_of_the_leaves_below_a_token() -> None:
    (one,) = pack([CreditedTree(grown(forked()), {2: even(2.0, 0.5), 3: even(-3.0, 0.25)})], 1000, keep_zero=False)
    assert one.targets.plus_A.tolist() == [1.0] * 4 + [0.0] * 3
    assert one.targets.minus_A.tolist() == [-0.75] * 2 + [0.0] * 2 + [-0.75] * 3
    assert one.targets.weight_A.tolist() == [0.75] * 2 + [0.5] * 2 + [0.25] * 3


def test_signs_weigh_the_leaves_below_a_token() -> None:
    given = {2: even(1, 0.5, inter=1, intra=1), 3: even(1, 0.25, inter=-3, intra=1)}
    (one,) = pack([CreditedTree(grown(forked()), given)], 1000, keep_zero=False)
    assert [SIGNS[i] for i in one.targets.sign_A.tolist()] == ["down_up"] * 2 + ["up_up"] * 2 + ["down_up"] * 3


def test_a_split_tree_has_the_signs_of_the_whole() -> None:
    given = {2: even(1, 0.5, inter=1, intra=1), 3: even(1, 0.25, inter=-3, intra=1)}
    packs = pack([CreditedTree(grown(forked()), given)], 10, keep_zero=False)
    signs = [[SIGNS[i] for i in p.targets.sign_A.tolist()] for p in packs]
    assert signs == [["down_up"] * 2 + ["up_up"] * 2, ["down_up"] * 2 + ["down_up"] * 3]


def test_paths_that_move_nothing_are_packed_only_for_a_penalty() -> None:
    trees = [CreditedTree(grown(forked()), {2: even(0.0, 0.5), 3: even(1.0, 0.5)})]
    assert [p.targets.leaves for p in pack(trees, 1000, keep_zero=False)] == [1]
    assert [p.targets.leaves for p in pack(trees, 1000, keep_zero=True)] == [2]
    assert pack([CreditedTree(grown(forked()), {2: even(0.0, 0.5)})], 1000, keep_zero=False) == []
    assert pack([], 1000, keep_zero=True) == []


def test_a_path_beyond_the_budget_is_packed_alone_and_whole() -> None:
    long = grown([subtree([step(1, 0, range(40))], {1: 1.0}, prompt=[1, 2])])
    short = grown([subtree([step(1, 0, [10])], {1: 1.0}, prompt=[9, 8])])
    packs = pack([CreditedTree(t, {1: even(1.0, 1.0, 1)}) for t in (short, long)], 16, keep_zero=False)
    assert sorted(p.tokens for p in packs) == [2, 41]


def test_a_tree_that_does_not_fit_is_cut_where_its_paths_share_least() -> None:
    """Two deep forks below the root: the cut goes between them, not through one."""
    trunks = [[10] * 20, [11] * 20]
    tree = Tree()
    for index, trunk in enumerate(trunks):
        base = 10 * index
        chain = [step(base + 1, 0, trunk), step(base + 2, base + 1, [1, 1, STOP])]
        tree.append_subtree(subtree(chain, {base + 2: 1.0}, prompt=[5] * 4 if not index else (), index=2 * index))
        tree.append_subtree(subtree([step(base + 3, base + 1, [2, 2, STOP])], {base + 3: 0.0}, index=2 * index + 1))
    packs = pack([CreditedTree(tree, {leaf: even(1.0, 0.25) for leaf in tree.leaves})], 40, keep_zero=True)
    assert [p.tokens for p in packs] == [4 + 20 + 2 + 2] * 2
    assert all(p.targets.counted_A.all() for p in packs)


def test_a_repeated_prefix_counts_in_one_pack_only() -> None:
    packs = pack([CreditedTree(grown(forked()), {2: even(1.0, 0.5), 3: even(1.0, 0.5)})], 10, keep_zero=True)
    assert [p.targets.counted_A.tolist() for p in packs] == [[True] * 4, [False] * 2 + [True] * 3]


def test_several_ranks_get_packs_that_can_be_shared_out() -> None:
    trees = credited([random_group(np.random.default_rng(n), str(n)) for n in range(20)])
    assert len(pack(trees, 10_000, keep_zero=True)) == 1
    split = pack(trees, 10_000, keep_zero=True, ranks=2)
    assert len(split) >= 6
    assert max(p.cost for p in split) <= sum(p.cost for p in split) / 4


def test_an_empty_pack_can_be_computed_and_teaches_nothing() -> None:
    nothing = empty_pack()
    assert (nothing.tokens, len(nothing.targets.label_A), nothing.targets.plus_A.tolist()) == (1, 0, [])


def test_a_tree_without_prompt_is_refused() -> None:
    bare = Tree(steps={1: step(1, 0, [4])}, leaves=grown([subtree([step(1, 0, [4])], {1: 1.0}, prompt=[1])]).leaves)
    with pytest.raises(ContractError, match="has no prompt"):
        pack([CreditedTree(bare, {1: even(1.0, 1.0, 1)})], 100, keep_zero=False)


def test_a_pack_goes_to_a_device_whole() -> None:
    moved = empty_pack().to("meta")
    tensors = [moved.ids_T, moved.position_T, moved.predictor_A]
    tensors += [value for f in fields(moved.targets) if isinstance(value := getattr(moved.targets, f.name), torch.Tensor)]
    assert {t.device.type for t in tensors} == {"meta"}
