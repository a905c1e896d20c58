"""The parts together in one process: run state, drain and its deadline, a dead engine."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from services.sampler.service import SamplerTimings
from tests.sampler.fakes import lease, plan
from tests.sampler.sampler_harness import running_sampler
from treegrpo.errors import DeadlineError, EngineError
from treegrpo.v1 import rollout_pb2
from treegrpo.wire.control import RunState


async def test_a_run_that_drains_ends_the_sampler(tmp_path: Path) -> None:
    async with running_sampler(lambda _prefix: "a!", tmp_path, RunState.DRAINING) as fixture:
        await fixture.running
        assert await fixture.learner.goodbyes.get() == "sampler-0"


async def test_a_paused_run_takes_leases_and_begins_nothing_until_it_drains(tmp_path: Path) -> None:
    async with running_sampler(lambda _prefix: "a!", tmp_path, RunState.PAUSED) as fixture:
        await fixture.learner.next("demand")
        await fixture.learner.grant(lease(plan(1, 1, 2)))
        await fixture.learner.say(drain={})
        request = await fixture.learner.requests.get()
        assert request.demand.leases == 0
        request = await fixture.learner.requests.get()
        if request.HasField("subtree"):
            assert len(request.subtree.leaves) == 1
            await fixture.learner.ack(request)
            request = await fixture.learner.next("lease_end")
        assert request.lease_end.forgone == 2
        await fixture.running


async def test_pausing_holds_back_every_turn(tmp_path: Path) -> None:
    async with running_sampler(lambda _prefix: "a!", tmp_path, RunState.PAUSED) as fixture:
        await fixture.learner.next("demand")
        await fixture.learner.grant(lease(plan(1, 0, 0)))
        fixture.learner.break_stream()
        await fixture.learner.hellos.get()
        assert (await fixture.learner.hellos.get()).leases == ["lease-1"]
        assert fixture.engine.prefixes == []


async def test_a_goodbye_that_takes_too_long_says_what_is_left(tmp_path: Path) -> None:
    async with running_sampler(lambda _prefix: "a!", tmp_path, timings=SamplerTimings(drain=0.3)) as fixture:
        await fixture.learner.next("demand")
        await fixture.learner.grant(lease(plan(1, 0, 0)))
        await fixture.learner.next("subtree")  # and does not ack it
        await fixture.learner.say(drain={})
        with pytest.raises(BaseExceptionGroup) as caught:
            await fixture.running
    assert caught.group_contains(DeadlineError, match=r"another sampler \(1 subtrees were not acked\)")


async def test_branches_that_do_not_finish_while_draining_are_returned(tmp_path: Path) -> None:
    stuck = asyncio.Event()

    async def script(_prefix: str) -> str:
        stuck.set()
        await asyncio.Event().wait()
        return ""

    async with running_sampler(script, tmp_path, timings=SamplerTimings(finish_branches=0.05)) as fixture:
        await fixture.learner.next("demand")
        await fixture.learner.grant(lease(plan(1, 0, 0)))
        await stuck.wait()
        await fixture.learner.say(drain={})
        assert (await fixture.learner.next("demand")).demand.leases == 0
        end = (await fixture.learner.next("lease_end")).lease_end
        assert end.reason == rollout_pb2.LEASE_END_REASON_RETURNED
        await fixture.running


async def test_a_dead_engine_ends_the_sampler(tmp_path: Path) -> None:
    async with running_sampler(lambda _prefix: "a!", tmp_path, timings=SamplerTimings(health_check=0.01)) as fixture:
        await fixture.learner.next("demand")
        fixture.engine.dead = "out of memory"
        with pytest.raises(BaseExceptionGroup) as caught:
            await fixture.running
    assert caught.group_contains(EngineError, match="out of memory")
