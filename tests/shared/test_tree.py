from __future__ import annotations

import pickle
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.intake.builders import chain, question, step
from tests.shared.invalid_subtrees import EVERY, NUMBERS, SHAPES
from treegrpo.core.budget import Budget
from treegrpo.core.lease import Plan
from treegrpo.core.step import ROOT, Leaf, StepStatus, Subtree
from treegrpo.core.tree import Group, Tree
from treegrpo.errors import TreeError

pytestmark = pytest.mark.pure

PROMPT = np.arange(3, dtype=np.uint32)


def test_a_tree_grows_by_subtrees_and_shares_their_prefixes() -> None:
    tree = Tree()
    tree.append_subtree(chain("a", index=0))
    tree.append_subtree(chain("a", index=1, parent=1))
    assert [s.node for s in tree.path(12)] == [1, 11, 12]
    assert tree.expandable() == [ROOT, 1, 11]
    assert tree.unique_tokens == 7 + 2 * (7 + 4)


def test_failed_steps_are_no_place_to_go_on_from() -> None:
    tree = Tree()
    tree.append_subtree(chain("a", fails=True))
    assert tree.expandable() == [ROOT, 1]
    assert not tree.leaves


def test_a_truncated_step_is_a_leaf_not_a_failure() -> None:
    tree = Tree()
    only = step(1, ROOT, observations=0, status=StepStatus.TRUNCATED)
    tree.append_subtree(Subtree("a", 0, 0, ROOT, (only,), (Leaf(1, {"em": 0.0}),), PROMPT))
    assert not only.status.failed
    assert tree.expandable() == [ROOT]


@pytest.mark.parametrize("name", {**SHAPES, **NUMBERS})
def test_what_does_not_fit_is_refused_and_changes_nothing(name: str) -> None:
    broken = EVERY[name]
    group = Group("q-17", question(0))
    group.append_subtree(chain("a"))
    with pytest.raises(TreeError) as refusal:
        group.append_subtree(broken.of("a"))
    assert str(refusal.value).startswith(f"Group q-17, tree {broken.says}")
    assert refusal.value.field == broken.field
    assert set(group.trees) == {0}, "no empty tree is left behind"
    assert set(group.trees[0].steps) == {1, 2}
    assert group.append_subtree(chain("a", index=1, parent=1)), "the index is still free"


def test_a_tree_that_knows_no_group_names_its_lease() -> None:
    with pytest.raises(TreeError, match=r"^Lease a, tree 0: subtree 1 came before subtree 0"):
        Tree().append_subtree(chain("a", index=1))


@pytest.mark.parametrize("value", [0.0, 1e-7, 1e-4])
def test_a_logprob_that_rounding_lifted_above_zero_is_kept_as_it_came(value: float) -> None:
    tree = Tree()
    tree.append_subtree(Subtree("a", 0, 0, ROOT, (replace(step(1, ROOT), logprobs=np.full(4, value, np.float32)),), (), PROMPT))
    assert tree.steps[1].logprobs.tolist() == pytest.approx([value] * 4)


def test_a_chain_of_ten_thousand_steps_is_a_tree() -> None:
    depth = 10_000
    steps = tuple(step(node, node - 1) for node in range(1, depth + 1))
    tree = Tree()
    tree.append_subtree(Subtree("a", 0, 0, ROOT, steps, (Leaf(depth, {"em": 1.0}),), PROMPT))
    assert len(tree.path(depth)) == depth


def test_an_error_of_a_tree_crosses_processes_whole() -> None:
    error = pickle.loads(pickle.dumps(TreeError("Group q, tree 0: wrong.", "steps")))
    assert (str(error), error.field) == ("Group q, tree 0: wrong.", "steps")


def test_trees_of_one_group_share_their_prompt() -> None:
    group = Group("g", question(0))
    group.append_subtree(chain("a", tree=0))
    group.append_subtree(chain("a", tree=1))
    assert group.unique_tokens == 7 + 2 * (7 + 4)


def test_the_chain_equivalent_counts_paths_fully_and_prefixes_once() -> None:
    group = Group("g", question(0))
    group.append_subtree(chain("a", tree=0, index=0))
    group.append_subtree(chain("a", tree=0, index=1, parent=1))
    group.append_subtree(chain("a", tree=1, index=0))  # the same tokens as the first chain: a prefix cache would serve it
    sampled, read = [4 + 4, 4 + 4 + 4, 4 + 4], [3, 3]
    assert group.chain_equivalent().tokens == 7 + sum(sampled) + sum(read)
    assert Budget.for_cost(group.chain_equivalent()).tool_calls == 2 + 3 + 2
    nodes, distinct = [4 + 4, 4 + 4, 4 + 4], [3, 3]
    assert group.needed().tokens == 7 + sum(nodes) + sum(distinct)
    assert Budget.for_cost(group.needed()).tool_calls == 2 + 2 + 2


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 50)), min_size=1, max_size=12))
def test_every_leaf_has_one_path_and_no_step_is_counted_twice(draws: list[tuple[int, int]]) -> None:
    tree = Tree()
    tree.append_subtree(chain("a"))
    for index, (_, pick) in enumerate(draws, start=1):
        places = tree.expandable()
        tree.append_subtree(chain("a", index=index, parent=places[pick % len(places)]))
    assert len(tree.leaves) == len(draws) + 1
    on_paths = {s.node for leaf in tree.leaves for s in tree.path(leaf)}
    assert on_paths == set(tree.steps)
    assert tree.unique_tokens == 7 + sum(s.length for s in tree.steps.values())


@given(st.lists(st.integers(0, 50), max_size=12))
def test_the_depth_of_a_step_is_the_length_of_its_path(picks: list[int]) -> None:
    group = Group("g", question(0))
    first = chain("a")
    group.append_subtree(first)
    assert group.depths(first) == [1, 2]
    tree = group.trees[0]
    for index, pick in enumerate(picks, start=1):
        places = tree.expandable()
        subtree = chain("a", index=index, parent=places[pick % len(places)])
        assert group.depths(subtree) == [0, 0], "it was not added yet"
        group.append_subtree(subtree)
        assert group.depths(subtree) == [len(tree.path(step.node)) for step in subtree.steps]
    assert group.depths(chain("a", tree=1)) == [0, 0]


@pytest.mark.parametrize(("m", "n", "rounds", "leaves"), [(2, 2, 1, 6), (4, 0, 1, 4), (4, 4, 2, 36), (3, 2, 0, 3)])
def test_a_group_has_m_times_nl_plus_one_leaves(m: int, n: int, rounds: int, leaves: int) -> None:
    plan = Plan(m, rounds, n, 4, 16, 128, 1.0)
    assert plan.leaves == leaves
    assert plan.grant.tool_calls == leaves * 4


def test_a_step_knows_its_length_in_tokens() -> None:
    assert step(1, 0, actions=5, observations=2).length == 7
    assert np.zeros(0, np.uint32).dtype == step(1, 0).action.dtype
