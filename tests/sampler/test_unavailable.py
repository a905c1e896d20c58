"""A whole sampler without its tools or weights: what it requests, reports and returns, and that it can always end."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest

from services.sampler.expansion.availability import CallTimings
from services.sampler.learner_link.rollout_client import StreamTimings
from services.sampler.service import SamplerTimings
from tests.sampler.expansion_harness import FAST
from tests.sampler.fakes import FakeEnvironment, deep, lease, plan
from tests.sampler.sampler_harness import SamplerFixture, running_sampler
from treegrpo.core.lease import LeaseEndReason
from treegrpo.core.step import PolicyVersion
from treegrpo.errors import EngineAwayError, ToolAwayError
from treegrpo.wire.codec import lease_end_from_pb

GONE = ToolAwayError("retriever", "http://r:1/retrieve", "does not answer (ConnectError)", certain=True)
ONE = lease(plan(1, 0, 0))
TIMINGS, STREAM = SamplerTimings(health_check=0.005, stall=0.0), StreamTimings(heartbeat=0.005)
sampler = partial(running_sampler, timings=TIMINGS, stream=STREAM)


@asynccontextmanager
async def without_tools(root: Path, calls: CallTimings = FAST) -> AsyncGenerator[SamplerFixture]:
    """A sampler that has a lease and waits for its tool."""
    environment = FakeEnvironment()
    environment.away = GONE
    async with sampler(deep(1), root, environment=environment, calls=calls) as fixture:
        assert (await fixture.learner.next("demand")).demand.leases > 0
        await fixture.learner.grant(ONE)
        assert (await fixture.learner.next("demand")).demand.leases == 0, "no more leases are asked for"
        yield fixture


async def heartbeat_seconds(fixture: SamplerFixture, beginning: str) -> float:
    """The seconds of the first heartbeat that waits for something that begins so; for nothing if it is empty."""
    while True:
        beat = await fixture.learner.beats.get()
        if beat.waits_for.startswith(beginning) and bool(beginning) == bool(beat.waits_for):
            return beat.waited_seconds


async def test_the_sampler_says_what_it_waits_for_and_goes_on_when_it_is_back(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    async with without_tools(tmp_path) as fixture:
        sentence = "the retriever at http://r:1/retrieve, which does not answer (ConnectError)"
        assert await heartbeat_seconds(fixture, sentence) > 0
        stalled = partial(fixture.metrics.registry.get_sample_value, "treegrpo_sampler_stalled_seconds", {"part": "retriever"})
        while stalled() is None:  # it is looked at now and then, and a heartbeat may come before
            await heartbeat_seconds(fixture, sentence)
        fixture.environment.away = None
        assert (await fixture.learner.next("demand")).demand.leases > 0, "it asks again"
        assert (await fixture.learner.next("subtree")).subtree.leaves
        assert lease_end_from_pb((await fixture.learner.next("lease_end")).lease_end).reason is LeaseEndReason.COMPLETE
        await heartbeat_seconds(fixture, "")
    assert caplog.text.count("waiting for the retriever at") == 1
    assert caplog.text.count("branches that need it wait") == 1


async def test_leases_are_returned_and_requested_again_when_the_tool_is_back(tmp_path: Path) -> None:
    async with without_tools(tmp_path, replace(FAST, wait_limit=0.05)) as fixture:
        end = lease_end_from_pb((await fixture.learner.next("lease_end")).lease_end)
        assert end.reason is LeaseEndReason.RETURNED
        assert "the retriever at http://r:1/retrieve does not answer" in end.error
        assert end.unaccounted.decoded == 2
        await heartbeat_seconds(fixture, "the retriever")
        assert fixture.learner.requests.empty(), "not a word of new leases"
        fixture.environment.away = None
        assert (await fixture.learner.next("demand")).demand.leases > 0
        await fixture.learner.grant(replace(ONE, id="lease-2"))
        assert (await fixture.learner.next("subtree")).subtree.leaves


async def test_the_staleness_bound_ends_the_waiting(tmp_path: Path) -> None:
    async with without_tools(tmp_path) as fixture:
        await fixture.learner.say(stop_expanding={"lease": ONE.id})
        assert lease_end_from_pb((await fixture.learner.next("lease_end")).lease_end).reason is LeaseEndReason.RETURNED


async def test_sigterm_ends_the_waiting(tmp_path: Path) -> None:
    async with without_tools(tmp_path) as fixture:
        os.kill(os.getpid(), signal.SIGTERM)
        assert lease_end_from_pb((await fixture.learner.next("lease_end")).lease_end).reason is LeaseEndReason.RETURNED
        await asyncio.wait_for(fixture.running, TIMINGS.finish_branches)
        assert await fixture.learner.goodbyes.get() == "sampler-0"


async def test_sigterm_ends_the_wait_for_weights(tmp_path: Path) -> None:
    async with sampler(deep(1), tmp_path) as fixture:
        await fixture.learner.next("demand")
        await fixture.learner.grant(replace(ONE, min_version=PolicyVersion(1, 9)))
        assert await heartbeat_seconds(fixture, "policy version 1.9 from the learner") >= 0
        os.kill(os.getpid(), signal.SIGTERM)
        await fixture.learner.next("demand")
        end = lease_end_from_pb((await fixture.learner.next("lease_end")).lease_end)
        assert end.reason is LeaseEndReason.RETURNED
        assert "policy version 1.9" in end.error
        await asyncio.wait_for(fixture.running, TIMINGS.finish_branches)


async def test_a_stream_that_breaks_meanwhile_does_not_bring_back_the_demand(tmp_path: Path) -> None:
    async with without_tools(tmp_path) as fixture:
        fixture.learner.break_stream()
        await fixture.learner.hellos.get()
        assert (await fixture.learner.hellos.get()).leases == [ONE.id]
        assert (await fixture.learner.next("demand")).demand.leases == 0


async def test_an_engine_that_is_away_does_not_end_the_sampler(tmp_path: Path) -> None:
    async with sampler(deep(1), tmp_path) as fixture:
        assert (await fixture.learner.next("demand")).demand.leases > 0
        fixture.engine.away = EngineAwayError("engine", "http://e:1", "answers with status 503", certain=True)
        assert (await fixture.learner.next("demand")).demand.leases == 0
        await heartbeat_seconds(fixture, "the engine at http://e:1, which answers with status 503")
        fixture.engine.away = None
        assert (await fixture.learner.next("demand")).demand.leases > 0
        await heartbeat_seconds(fixture, "")


async def test_a_broker_that_is_away_is_named_when_nothing_goes_on(tmp_path: Path) -> None:
    async with sampler(deep(1), tmp_path) as fixture:
        await heartbeat_seconds(fixture, "")
        fixture.control.lost = ("b:1883", time.monotonic())
        await heartbeat_seconds(fixture, "the MQTT broker at b:1883")
