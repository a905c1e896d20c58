"""The shape of what grows: trees, rounds, draws, ids, independence of trees."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from services.environments.base import Forking
from services.sampler.expansion.expander import Expander, LeaseControl, draw_nodes
from tests.sampler.fakes import FakeEngine, FakeEnvironment, FakeText, Script, deep, lease, plan, turns
from treegrpo.core.lease import Lease, LeaseEnd, LeaseEndReason
from treegrpo.core.step import ROOT, StepStatus, Subtree
from treegrpo.core.tree import Group

pytestmark = pytest.mark.pure


async def expand(
    given_lease: Lease,
    script: Script,
    *,
    environment: FakeEnvironment | None = None,
    emit: Callable[[Subtree], Any] | None = None,
) -> tuple[list[Subtree], LeaseEnd, FakeEngine]:
    engine, subtrees = FakeEngine(script), list[Subtree]()
    expander = Expander(engine, environment or FakeEnvironment(), FakeText(), retries=0)
    end = await expander.expand_lease(given_lease, emit or subtrees.append, LeaseControl())
    return subtrees, end, engine


def group_of(given_lease: Lease, subtrees: list[Subtree]) -> Group:
    group = Group(given_lease.id, given_lease.question)
    assert all(group.append_subtree(subtree) for subtree in subtrees)
    return group


@pytest.mark.parametrize("shape", [(1, 0, 0), (4, 0, 0), (2, 1, 2), (1, 3, 1), (2, 2, 3), (3, 2, 2)])
async def test_a_group_has_m_times_n_times_l_plus_one_leaves(shape: tuple[int, int, int]) -> None:
    one = lease(plan(*shape))
    subtrees, end, _ = await expand(one, deep(2))
    group = group_of(one, subtrees)
    assert end == LeaseEnd(one.id, LeaseEndReason.COMPLETE)
    assert len(list(group.leaves())) == one.plan.leaves
    for tree in group.trees.values():
        assert tree.indices == set(range(1 + one.plan.rounds * one.plan.expansions))
    for subtree in subtrees:
        assert [step.node for step in subtree.steps] == [1 + subtree.index * 5 + k for k in range(len(subtree.steps))]
        assert (len(subtree.prompt) > 0) == (subtree.index == 0)


async def test_an_expansion_of_the_root_is_a_whole_new_chain() -> None:
    one = lease(plan(1, 1, 40))
    subtrees, _, _ = await expand(one, deep(2))
    from_root = [s for s in subtrees if s.parent == ROOT]
    assert len(from_root) > 1
    assert all(len(s.steps) == 3 for s in from_root)
    assert all(len(s.steps) < 3 for s in subtrees if s.parent != ROOT)


async def test_nodes_are_drawn_from_the_root_and_the_inner_nodes_only() -> None:
    one = lease(plan(1, 3, 60))
    subtrees, _, _ = await expand(one, deep(2))
    inner_of_chain = [1, 2]
    first_round = Counter(s.parent for s in subtrees if 0 < s.index <= 60)
    assert set(first_round) == {ROOT, *inner_of_chain}
    group = group_of(one, subtrees)
    leaves = set(group.trees[0].leaves)
    assert not leaves & {s.parent for s in subtrees}


def test_draws_are_uniform() -> None:
    nodes = [0, 1, 2, 6]
    counts = Counter(node for seed in range(500) for node in draw_nodes(nodes, 8, (seed, 0, 0)))
    expected = 500 * 8 / len(nodes)
    chi_squared = sum((counts[node] - expected) ** 2 / expected for node in nodes)
    assert chi_squared < 16.3  # three degrees of freedom, p = 0.001


@given(st.integers(0, 2**64 - 1), st.integers(0, 3), st.integers(0, 3))
@settings(max_examples=25)
def test_draws_follow_from_seed_tree_and_round(seed: int, tree: int, number: int) -> None:
    nodes = list(range(50))
    same = draw_nodes(nodes, 30, (seed, tree, number))
    assert same == draw_nodes(nodes, 30, (seed, tree, number))
    assert same != draw_nodes(nodes, 30, (seed, tree, number + 1))
    assert same != draw_nodes(nodes, 30, (seed, tree + 1, number))
    assert len(set(same)) < len(same)  # with replacement


async def test_the_same_seed_grows_the_same_trees() -> None:
    def parents(subtrees: list[Subtree]) -> dict[tuple[int, int], int]:
        return {(s.tree, s.index): s.parent for s in subtrees}

    runs = [(await expand(lease(plan(3, 2, 4), seed=seed), deep(3)))[0] for seed in (5, 5, 6)]
    assert parents(runs[0]) == parents(runs[1])
    assert parents(runs[0]) != parents(runs[2])


@pytest.mark.parametrize("forking", ["fork", "replay"])
async def test_every_kind_of_forking_grows_the_same_trees(forking: Forking) -> None:
    def script(prefix: str) -> str:
        return f"{'s' if turns(prefix) < 2 else 'a'}!"

    def contents(subtrees: list[Subtree]) -> list[Any]:
        return sorted(
            (s.tree, s.index, s.parent, [(p.node, p.action.tolist(), p.observation.tolist()) for p in s.steps],
             [(leaf.node, leaf.rewards, leaf.metrics) for leaf in s.leaves])
            for s in subtrees
        )  # fmt: skip

    one = lease(plan(2, 2, 3))
    expected, _, _ = await expand(one, script)
    found, end, _ = await expand(one, script, environment=FakeEnvironment(forking))
    assert end.reason is LeaseEndReason.COMPLETE
    assert contents(found) == contents(expected)


async def test_a_replay_pays_for_the_tool_calls_it_repeats() -> None:
    one = lease(plan(1, 1, 12))
    environment = FakeEnvironment("replay")
    subtrees, _, _ = await expand(one, deep(3), environment=environment)
    assert sum(s.cost.tool_calls for s in subtrees) == environment.calls
    below_second = next(s for s in subtrees if s.parent == 2)
    assert below_second.steps[0].cost.tool_calls == 3  # two repeated, one of its own


async def test_a_slow_branch_does_not_hold_up_another_tree() -> None:
    """Trap 12: the other tree goes through all its rounds while one branch of the first still runs."""
    stuck, freed = asyncio.Event(), asyncio.Event()
    emitted: list[Subtree] = []
    other_done = asyncio.Event()
    shape = plan(2, 2, 2)
    calls = 0

    async def script(prefix: str) -> str:
        nonlocal calls
        calls += 1
        if calls == 1:
            stuck.set()
            await freed.wait()
        return "s!" if turns(prefix) < 1 else "a!"

    def emit(subtree: Subtree) -> None:
        emitted.append(subtree)
        if sum(s.tree == 1 for s in emitted) == 1 + shape.rounds * shape.expansions:
            other_done.set()

    expanding = asyncio.create_task(expand(lease(shape), script, emit=emit))
    await stuck.wait()
    await other_done.wait()
    assert {s.tree for s in emitted} == {1}
    freed.set()
    _, end, _ = await expanding
    assert end.reason is LeaseEndReason.COMPLETE
    assert len(emitted) == shape.leaves


async def test_branches_of_a_round_run_together_and_each_is_sent_when_it_is_done() -> None:
    together, freed = asyncio.Event(), asyncio.Event()
    running = 0
    first_sent = asyncio.Event()
    emitted: list[int] = []

    async def script(prefix: str) -> str:
        nonlocal running
        if not emitted:
            return "a!"
        running += 1
        if running == 3:
            together.set()
        await together.wait()
        if running == 3 and not first_sent.is_set():
            running += 1
            return "a!"
        await freed.wait()
        return "a!"

    def emit(subtree: Subtree) -> None:
        emitted.append(subtree.index)
        if len(emitted) == 2:
            first_sent.set()

    expanding = asyncio.create_task(expand(lease(plan(1, 1, 3)), script, emit=emit))
    await first_sent.wait()
    assert len(emitted) == 2
    freed.set()
    await expanding
    assert sorted(emitted) == [0, 1, 2, 3]


async def test_a_round_begins_when_the_branches_of_the_round_before_are_done() -> None:
    subtrees, _, _ = await expand(lease(plan(1, 3, 2)), deep(1))
    rounds = [(s.index + 1) // 2 for s in subtrees]
    assert rounds == sorted(rounds)
    deeper = [s for s in subtrees if s.index > 2 and s.parent not in (ROOT, 1)]
    assert all(any(s.parent == p.node for earlier in subtrees for p in earlier.steps) for s in deeper)


async def test_a_chain_without_inner_nodes_is_expanded_from_the_root() -> None:
    one = lease(plan(1, 2, 2))
    subtrees, _, _ = await expand(one, lambda _prefix: "a!")
    assert [s.parent for s in subtrees] == [ROOT] * 5
    assert all(step.status is StepStatus.OK for s in subtrees for step in s.steps)


async def test_an_awaitable_emit_is_awaited() -> None:
    arrived: list[int] = []

    async def emit(subtree: Subtree) -> None:
        await asyncio.sleep(0)
        arrived.append(subtree.index)

    await expand(lease(plan(1, 1, 2)), deep(1), emit=emit)
    assert sorted(arrived) == [0, 1, 2]


def part_of(subtrees: list[Subtree], chosen: int) -> tuple[Subtree, ...]:
    """Some of the subtrees of a group, in the order they came, each with the one it hangs below."""
    kept: list[Subtree] = []
    for number, subtree in enumerate(subtrees):
        nodes = {step.node for other in kept if other.tree == subtree.tree for step in other.steps}
        chain = subtree.index == 0 or any(other.tree == subtree.tree for other in kept)
        if chosen >> number & 1 and chain and (subtree.parent == ROOT or subtree.parent in nodes):
            kept.append(subtree)
    return tuple(kept)


@pytest.mark.parametrize("forking", ["stateless", "fork", "replay"])
@given(chosen=st.integers(0, 2**14 - 1))
@settings(max_examples=25, deadline=None)
async def test_a_lease_that_goes_on_makes_what_is_missing_and_nothing_else(forking: Forking, chosen: int) -> None:
    one = lease(plan(2, 2, 3))
    whole, _, _ = await expand(one, deep(2), environment=FakeEnvironment(forking))
    accepted = part_of(whole, chosen)
    environment = FakeEnvironment(forking)
    again = replace(one, id="lease-2", accepted=accepted)
    made, end, _ = await expand(again, deep(2), environment=environment)
    assert end == LeaseEnd("lease-2", LeaseEndReason.COMPLETE)
    assert len(made) == one.plan.leaves - len(accepted)
    group = group_of(one, [*accepted, *made])
    assert len(list(group.leaves())) == one.plan.leaves
    assert {(s.tree, s.index): s.parent for s in [*accepted, *made]} == {(s.tree, s.index): s.parent for s in whole}
    assert all(leaf.metrics["actions"] == 3.0 for s in made for leaf in s.leaves), "states are those of the path"
    assert sum(s.cost.tool_calls for s in made) == environment.calls


async def test_a_lease_of_a_whole_group_ends_at_once() -> None:
    one = lease(plan(2, 1, 2))
    whole, _, _ = await expand(one, deep(1))
    made, end, engine = await expand(replace(one, accepted=tuple(whole)), deep(1))
    assert (made, engine.prefixes, end.reason, end.forgone) == ([], [], LeaseEndReason.COMPLETE, 0)


async def test_a_state_that_another_sampler_reached_is_made_once() -> None:
    one = lease(plan(1, 1, 12))
    whole, _, _ = await expand(one, deep(3))
    environment = FakeEnvironment()
    made, _, _ = await expand(replace(one, accepted=(whole[0],)), deep(3), environment=environment)
    own = sum(step.tool != "" for s in made for step in s.steps)
    again = {1: 1, 2: 2, 3: 3}
    assert environment.calls - own == sum(again[parent] for parent in {s.parent for s in made} - {ROOT})


async def test_only_the_prefix_is_paid_for_again() -> None:
    one = lease(plan(1, 1, 1), seed=1)
    whole, _, _ = await expand(one, deep(2))
    assert whole[1].parent != ROOT
    (made,), end, engine = await expand(replace(one, accepted=(whole[0],)), deep(2))
    assert made.steps[0].cost.decoded == len(made.steps[0].action)
    path = [part for step in whole[0].steps[: made.parent] for part in (*step.action, *step.observation)]
    assert engine.prefixes[0] == [*whole[0].prompt, *path], "token in, token out, whoever sampled it"
    assert end.unaccounted.tokens == 0
