"""On which SGLang server a request goes, when, and beside how many others."""

from __future__ import annotations

import asyncio

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.sampler.engines.sglang.aimd_limit import HIGH, LOW, Pressure
from services.sampler.engines.sglang.prefill_dedup import Prefills
from services.sampler.engines.sglang.prefix_router import BLOCK, Router
from tests.engines import builders
from treegrpo.core.step import TokenIds
from treegrpo.errors import EngineError

# ---- routing


def test_a_prefix_goes_where_the_longest_part_of_it_went() -> None:
    router = Router[str]()
    tree, other = builders.prompt(0, 10 * BLOCK), builders.prompt(1, 10 * BLOCK)
    router.remember(tree, "a")
    router.remember(other, "b")
    equal = {"a": 0.5, "b": 0.5}
    assert router.choose(np.concatenate((tree, other[:40])), equal) == "a"
    assert router.choose(np.concatenate((other[: 5 * BLOCK], tree)), equal) == "b"
    assert router.choose(tree, {"a": 0.9, "b": 0.0}) == "a"


def test_a_branch_that_spilled_over_stays_where_it_went_and_the_tree_does_not_follow() -> None:
    router = Router[str]()
    tree = builders.prompt(0, 10 * BLOCK)
    branch = np.concatenate((tree, builders.prompt(1, 3 * BLOCK)))
    router.remember(tree, "a")
    assert router.choose(branch, {"b": 0.0}) == "b"  # a has no room
    router.remember(branch, "b")
    assert router.choose(np.concatenate((branch, builders.prompt(2, BLOCK))), {"a": 0.0, "b": 0.9}) == "b"
    assert router.choose(np.concatenate((tree, builders.prompt(3, BLOCK))), {"a": 0.1, "b": 0.9}) == "a"


def test_what_nobody_knows_goes_to_the_emptiest() -> None:
    router = Router[str]()
    assert router.choose(builders.prompt(0, 100), {"a": 0.5, "b": 0.2, "c": 0.3}) == "b"
    assert router.choose(builders.prompt(0, 100), {}) is None


# ---- pressure


def test_the_limit_grows_while_it_holds_work_back_and_memory_is_free() -> None:
    pressure = Pressure(64)
    start = pressure.limit
    pressure.look(LOW - 0.1, start - 1)
    assert pressure.limit == start  # nobody waits for more
    for _ in range(20):
        pressure.look(LOW - 0.1, pressure.limit)
    assert pressure.limit == 64


def test_the_limit_shrinks_under_pressure_and_stays_between_the_marks() -> None:
    pressure = Pressure(64)
    for _ in range(20):
        pressure.look(0.0, pressure.limit)
    pressure.look((LOW + HIGH) / 2, 64)
    assert pressure.limit == 64
    pressure.look(HIGH + 0.01, 64)
    assert pressure.limit == 48
    pressure.retracted(1)
    pressure.look(0.5, 40)
    assert pressure.limit == 30
    for _ in range(50):
        pressure.look(1.0, pressure.limit)
    assert pressure.limit == 1


@given(st.lists(st.tuples(st.floats(0, 1.2), st.integers(0, 80), st.integers(0, 3)), max_size=60), st.integers(1, 80))
def test_the_limit_is_at_least_one_and_never_above_the_cap(looks: list[tuple[float, int, int]], cap: int) -> None:
    pressure = Pressure(cap)
    for usage, running, retracted in looks:
        pressure.retracted(retracted)
        pressure.look(usage, running)
        assert 1 <= pressure.limit <= cap


# ---- prefills


async def settled() -> None:
    """Let every task run until all wait for something."""
    for _ in range(20):
        await asyncio.sleep(0)


async def test_siblings_that_come_together_wait_until_the_first_has_computed_what_they_share() -> None:
    prefills, order = Prefills(), list[str]()
    shared = builders.prompt(0, 4 * BLOCK)

    async def ask(name: str, ids: TokenIds) -> None:
        async with prefills.turn(ids) as turn:
            order.append(f"{name} asks{', awaited' if turn.awaited else ''}")
            await go.wait()
            order.append(f"{name} computed")
            prefills.computed(turn)
            await done.wait()

    done, go = asyncio.Event(), asyncio.Event()
    prefixes = {"a": shared, "b": np.concatenate((shared, builders.prompt(1, BLOCK))), "c": builders.prompt(2, 4 * BLOCK)}
    async with asyncio.TaskGroup() as tasks:
        for name, ids in prefixes.items():
            tasks.create_task(ask(name, ids))
        await settled()
        assert order == ["a asks, awaited", "c asks"]
        go.set()
        await settled()
        assert order.index("b asks") > order.index("a computed")
        done.set()


async def test_who_comes_too_late_to_be_told_waits_for_a_moment_only() -> None:
    prefills, shared = Prefills(), builders.prompt(0, 4 * BLOCK)
    async with prefills.turn(shared) as first:
        assert not first.awaited
        async with prefills.turn(shared) as second:
            assert second.keys == []


async def test_who_fails_to_compute_leaves_it_to_the_next_and_what_is_computed_is_waited_for_by_nobody() -> None:
    prefills, shared = Prefills(), builders.prompt(0, 4 * BLOCK)
    with pytest.raises(EngineError):
        async with prefills.turn(shared):
            raise EngineError("it is gone")
    async with prefills.turn(shared) as first:
        assert len(first.keys) == 4
        prefills.computed(first)
        async with prefills.turn(np.concatenate((shared, builders.prompt(3, 2)))) as second:
            assert second.keys == []
