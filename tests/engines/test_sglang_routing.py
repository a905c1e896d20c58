"""Routing by prefix, the AIMD limit, and prefill deduplication."""

from __future__ import annotations

import asyncio

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.sampler.engines.sglang.prefix_router import PrefixRouter
from services.sampler.engines.sglang.server.aimd_limit import HIGH_USAGE, LOW_USAGE, AimdLimit
from services.sampler.engines.sglang.server.prefill_dedup import PrefillDedup
from services.sampler.engines.sglang.server.prefix_blocks import BLOCK
from tests.engines import builders
from treegrpo.core.step import TokenIds
from treegrpo.errors import EngineError

pytestmark = pytest.mark.pure

# ---- routing


def test_a_prefix_goes_where_the_longest_part_of_it_went() -> None:
    router = PrefixRouter[str]()
    tree, other = builders.prompt(0, 10 * BLOCK), builders.prompt(1, 10 * BLOCK)
    router.record_prefix(tree, "a")
    router.record_prefix(other, "b")
    equal = {"a": 0.5, "b": 0.5}
    assert router.choose_server(np.concatenate((tree, other[:40])), equal) == "a"
    assert router.choose_server(np.concatenate((other[: 5 * BLOCK], tree)), equal) == "b"
    assert router.choose_server(tree, {"a": 0.9, "b": 0.0}) == "a"


def test_a_spilled_branch_stays_where_it_went_without_its_tree() -> None:
    router = PrefixRouter[str]()
    tree = builders.prompt(0, 10 * BLOCK)
    branch = np.concatenate((tree, builders.prompt(1, 3 * BLOCK)))
    router.record_prefix(tree, "a")
    assert router.choose_server(branch, {"b": 0.0}) == "b"  # a has no room
    router.record_prefix(branch, "b")
    assert router.choose_server(np.concatenate((branch, builders.prompt(2, BLOCK))), {"a": 0.0, "b": 0.9}) == "b"
    assert router.choose_server(np.concatenate((tree, builders.prompt(3, BLOCK))), {"a": 0.1, "b": 0.9}) == "a"


def test_an_unknown_prefix_goes_to_the_least_used_server() -> None:
    router = PrefixRouter[str]()
    assert router.choose_server(builders.prompt(0, 100), {"a": 0.5, "b": 0.2, "c": 0.3}) == "b"
    assert router.choose_server(builders.prompt(0, 100), {}) is None


# ---- AIMD limit


def test_the_limit_grows_while_it_holds_work_back_and_memory_is_free() -> None:
    limit = AimdLimit(64)
    start = limit.current
    limit.adjust_limit(LOW_USAGE - 0.1, start - 1)
    assert limit.current == start  # nobody waits for more
    for _ in range(20):
        limit.adjust_limit(LOW_USAGE - 0.1, limit.current)
    assert limit.current == 64


def test_the_limit_shrinks_above_the_mark_and_stays_between_the_marks() -> None:
    limit = AimdLimit(64)
    for _ in range(20):
        limit.adjust_limit(0.0, limit.current)
    limit.adjust_limit((LOW_USAGE + HIGH_USAGE) / 2, 64)
    assert limit.current == 64
    limit.adjust_limit(HIGH_USAGE + 0.01, 64)
    assert limit.current == 48
    limit.count_retractions(1)
    limit.adjust_limit(0.5, 40)
    assert limit.current == 30
    for _ in range(50):
        limit.adjust_limit(1.0, limit.current)
    assert limit.current == 1


@given(st.lists(st.tuples(st.floats(0, 1.2), st.integers(0, 80), st.integers(0, 3)), max_size=60), st.integers(1, 80))
def test_the_limit_is_at_least_one_and_never_above_the_cap(looks: list[tuple[float, int, int]], cap: int) -> None:
    limit = AimdLimit(cap)
    for usage, running, retracted in looks:
        limit.count_retractions(retracted)
        limit.adjust_limit(usage, running)
        assert 1 <= limit.current <= cap


# ---- prefill deduplication


async def settled() -> None:
    """Let every task run until all wait for something."""
    for _ in range(20):
        await asyncio.sleep(0)


async def test_siblings_wait_until_the_first_has_computed_the_shared_prefix() -> None:
    dedup, order = PrefillDedup(), list[str]()
    shared = builders.prompt(0, 4 * BLOCK)

    async def ask(name: str, ids: TokenIds) -> None:
        async with dedup.reserve_prefill(ids) as prefill:
            order.append(f"{name} asks{', awaited' if prefill.awaited else ''}")
            await go.wait()
            order.append(f"{name} computed")
            dedup.mark_computed(prefill)
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


async def test_a_late_request_waits_for_a_moment_only() -> None:
    dedup, shared = PrefillDedup(), builders.prompt(0, 4 * BLOCK)
    async with dedup.reserve_prefill(shared) as first:
        assert not first.awaited
        async with dedup.reserve_prefill(shared) as second:
            assert second.keys == []


async def test_a_failed_prefill_is_left_to_the_next_request() -> None:
    dedup, shared = PrefillDedup(), builders.prompt(0, 4 * BLOCK)
    with pytest.raises(EngineError):
        async with dedup.reserve_prefill(shared):
            raise EngineError("it is gone")
    async with dedup.reserve_prefill(shared) as first:
        assert len(first.keys) == 4
        dedup.mark_computed(first)
        async with dedup.reserve_prefill(np.concatenate((shared, builders.prompt(3, 2)))) as second:
            assert second.keys == []
