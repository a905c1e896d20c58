"""What holds a lease back: its budget, the word to stop, a pause, a cancellation."""

from __future__ import annotations

import asyncio
import dataclasses

import pytest

from services.sampler.expansion.expander import Expander, LeaseControl
from tests.sampler.fakes import FakeEngine, FakeEnvironment, FakeText, deep, lease, plan, turns
from treegrpo.core.budget import Budget, Cost
from treegrpo.core.lease import Lease, LeaseEnd, LeaseEndReason
from treegrpo.core.step import Subtree

CHAIN = plan(1, 0, 0)


async def expand(given: Lease, engine: FakeEngine, control: LeaseControl | None = None) -> tuple[list[Subtree], LeaseEnd]:
    subtrees: list[Subtree] = []
    expander = Expander(engine, FakeEnvironment(), FakeText(), retries=0)
    return subtrees, await expander.expand_lease(given, subtrees.append, control or LeaseControl())


async def test_expansions_stop_when_the_grant_would_not_cover_another_step() -> None:
    one = lease(plan(1, 4, 1), grant=Budget(40, 100))
    subtrees, end = await expand(one, FakeEngine(lambda _prefix: "ok a!"))
    assert end.reason is LeaseEndReason.BUDGET
    assert 1 < len(subtrees) < one.plan.leaves
    assert end.forgone == one.plan.leaves - len(subtrees)
    assert sum((s.cost for s in subtrees), Cost()).tokens <= 40


async def test_expansions_that_start_together_do_not_count_on_the_same_rest() -> None:
    """A step may cost 5 prefix and 16 action tokens: 45 of 52 left after the chain cover two, not six."""
    subtrees, end = await expand(lease(plan(1, 1, 6), grant=Budget(52, 100)), FakeEngine(lambda _prefix: "ok a!"))
    assert [s.index for s in subtrees] == [0, 1, 2]
    assert (end.reason, end.forgone) == (LeaseEndReason.BUDGET, 4)


async def test_tool_calls_are_a_budget_too() -> None:
    subtrees, end = await expand(lease(plan(1, 3, 1), grant=Budget(10_000, 1)), FakeEngine(deep(1)))
    assert len(subtrees) == 1
    assert end.reason is LeaseEndReason.BUDGET


async def test_which_branches_a_grant_covers_does_not_depend_on_timing() -> None:
    """Turns are answered in the order in which they come, and in another: nothing else may tell the two apart."""

    async def made(late: int) -> list[tuple[int, int]]:
        begun = 0

        async def script(prefix: str) -> str:
            nonlocal begun
            begun += 1
            if begun % 2 == late:
                for _ in range(50):
                    await asyncio.sleep(0)
            return deep(1)(prefix)  # type: ignore[return-value]

        subtrees, end = await expand(lease(plan(2, 4, 1), grant=Budget(150, 100)), FakeEngine(script))
        assert end.reason is LeaseEndReason.BUDGET
        return sorted((s.tree, s.index) for s in subtrees)

    assert await made(late=0) == await made(late=1)


async def test_a_continued_group_has_the_branches_of_an_uninterrupted_one() -> None:
    whole = lease(plan(2, 4, 1), grant=Budget(150, 100))
    subtrees, end = await expand(whole, FakeEngine(deep(1)))
    assert end.reason is LeaseEndReason.BUDGET
    assert 2 < len(subtrees) < whole.plan.leaves
    for cut in range(len(subtrees)):
        accepted = tuple(subtrees[:cut])
        spent = Budget.for_cost(Cost.total([subtree.cost for subtree in accepted]))
        rest = dataclasses.replace(whole, accepted=accepted, grant=whole.grant - spent)
        more, _ = await expand(rest, FakeEngine(deep(1)))
        assert {(s.tree, s.index) for s in (*accepted, *more)} == {(s.tree, s.index) for s in subtrees}


async def test_stop_expanding_finishes_what_runs_and_begins_nothing() -> None:
    control, one = LeaseControl(), lease(plan(2, 3, 2))

    def script(prefix: str) -> str:
        if turns(prefix) == 1:
            control.stop_expanding()
        return deep(2)(prefix)  # type: ignore[return-value]

    subtrees, end = await expand(one, FakeEngine(script), control=control)
    assert [(s.tree, s.index, len(s.leaves)) for s in subtrees] == [(0, 0, 1), (1, 0, 1)]
    assert (end.reason, end.forgone) == (LeaseEndReason.STOPPED, 12)


async def test_a_lease_that_is_stopped_before_it_began_does_nothing() -> None:
    control = LeaseControl()
    control.stop_expanding()
    subtrees, end = await expand(lease(plan(2, 1, 2)), FakeEngine(deep(1)), control=control)
    assert not subtrees
    assert (end.reason, end.forgone) == (LeaseEndReason.STOPPED, 4)


async def test_a_paused_run_begins_no_turn_until_it_runs_again() -> None:
    running, paused = asyncio.Event(), asyncio.Event()
    running.set()

    def script(prefix: str) -> str:
        if turns(prefix) == 1:
            running.clear()
            paused.set()
        return deep(3)(prefix)  # type: ignore[return-value]

    engine = FakeEngine(script)
    expanding = asyncio.create_task(expand(lease(CHAIN), engine, control=LeaseControl(running)))
    await paused.wait()
    for _ in range(20):
        await asyncio.sleep(0)
    assert len(engine.prefixes) == 2
    running.set()
    (chain,), _ = await expanding
    assert len(chain.steps) == 4


async def test_an_evaluation_is_one_greedy_chain() -> None:
    engine = FakeEngine(deep(1))
    subtrees, end = await expand(lease(plan(2, 2, 2).as_eval()), engine)
    assert [s.index for s in subtrees] == [0]
    assert {sampling.temperature for sampling in engine.samplings} == {0.0}
    assert end.reason is LeaseEndReason.COMPLETE


async def test_cancelling_a_lease_ends_its_generations() -> None:
    running, ended = asyncio.Event(), asyncio.Event()

    async def script(_prefix: str) -> str:
        running.set()
        try:
            await asyncio.Event().wait()
        finally:
            ended.set()
        return ""

    expanding = asyncio.create_task(expand(lease(CHAIN), FakeEngine(script)))
    await running.wait()
    expanding.cancel()
    with pytest.raises(asyncio.CancelledError):
        await expanding
    assert ended.is_set()
