"""A whole sampler whose tools or weights are away: what it asks for, says and gives back, and that it can always end."""

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

from services.sampler import service
from services.sampler.expansion import availability, stall_monitor
from services.sampler.learner_link import rollout_client
from tests.sampler.fakes import FakeEnvironment, deep, lease, plan
from tests.sampler.test_sampler import Bench, sampler
from treegrpo.core.lease import LeaseEndReason
from treegrpo.core.step import PolicyVersion
from treegrpo.errors import EngineAwayError, ToolAwayError
from treegrpo.wire.codec import lease_end_from_pb

GONE = ToolAwayError("retriever", "http://r:1/retrieve", "does not answer (ConnectError)", certain=True)
ONE = lease(plan(1, 0, 0))


@pytest.fixture(autouse=True)
def _at_once(monkeypatch: pytest.MonkeyPatch) -> None:  # pyright: ignore[reportUnusedFunction]
    monkeypatch.setattr(availability, "PROBE_SECONDS", (0.001,))
    monkeypatch.setattr(rollout_client, "HEARTBEAT_SECONDS", 0.005)
    monkeypatch.setattr(stall_monitor, "QUIET_SECONDS", 0.0)
    monkeypatch.setattr(service, "TICK_SECONDS", 0.005)


@asynccontextmanager
async def without_tools(root: Path) -> AsyncGenerator[Bench]:
    """A sampler that has a lease and waits for its tool."""
    environment = FakeEnvironment()
    environment.away = GONE
    async with sampler(deep(1), root, environment=environment) as bench:
        assert (await bench.learner.next("demand")).demand.leases > 0
        await bench.learner.grant(ONE)
        assert (await bench.learner.next("demand")).demand.leases == 0, "no more leases are asked for"
        yield bench


async def said(bench: Bench, beginning: str) -> float:
    """The seconds of the first heartbeat that waits for something that begins so; for nothing if it is empty."""
    while True:
        beat = await bench.learner.beats.get()
        if beat.waits_for.startswith(beginning) and bool(beginning) == bool(beat.waits_for):
            return beat.waited_seconds


async def test_the_sampler_says_what_it_waits_for_and_goes_on_when_it_is_back(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    async with without_tools(tmp_path) as bench:
        sentence = "the retriever at http://r:1/retrieve, which does not answer (ConnectError)"
        assert await said(bench, sentence) > 0
        stalled = partial(bench.metrics.registry.get_sample_value, "treegrpo_sampler_stalled_seconds", {"part": "retriever"})
        while stalled() is None:  # it is looked at now and then, and a heartbeat may come before
            await said(bench, sentence)
        bench.environment.away = None
        assert (await bench.learner.next("demand")).demand.leases > 0, "it asks again"
        assert (await bench.learner.next("subtree")).subtree.leaves
        assert lease_end_from_pb((await bench.learner.next("lease_end")).lease_end).reason is LeaseEndReason.COMPLETE
        await said(bench, "")
    assert caplog.text.count("waiting for the retriever at") == 1
    assert caplog.text.count("is away") + caplog.text.count("what needs it waits") == 1


async def test_leases_are_given_back_and_asked_for_again_only_when_the_tool_is_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(availability, "PATIENCE_SECONDS", 0.05)
    async with without_tools(tmp_path) as bench:
        end = lease_end_from_pb((await bench.learner.next("lease_end")).lease_end)
        assert end.reason is LeaseEndReason.RETURNED
        assert "the retriever at http://r:1/retrieve does not answer" in end.error
        assert end.unaccounted.decoded == 2
        await said(bench, "the retriever")
        assert bench.learner.requests.empty(), "not a word of new leases"
        bench.environment.away = None
        assert (await bench.learner.next("demand")).demand.leases > 0
        await bench.learner.grant(replace(ONE, id="lease-2"))
        assert (await bench.learner.next("subtree")).subtree.leaves


async def test_the_staleness_bound_ends_the_waiting(tmp_path: Path) -> None:
    async with without_tools(tmp_path) as bench:
        await bench.learner.say(stop_expanding={"lease": ONE.id})
        assert lease_end_from_pb((await bench.learner.next("lease_end")).lease_end).reason is LeaseEndReason.RETURNED


async def test_sigterm_ends_the_waiting(tmp_path: Path) -> None:
    async with without_tools(tmp_path) as bench:
        os.kill(os.getpid(), signal.SIGTERM)
        assert lease_end_from_pb((await bench.learner.next("lease_end")).lease_end).reason is LeaseEndReason.RETURNED
        await asyncio.wait_for(bench.running, service.FINISH_SECONDS)
        assert await bench.learner.goodbyes.get() == "sampler-0"


async def test_sigterm_ends_the_wait_for_weights(tmp_path: Path) -> None:
    async with sampler(deep(1), tmp_path) as bench:
        await bench.learner.next("demand")
        await bench.learner.grant(replace(ONE, min_version=PolicyVersion(1, 9)))
        assert await said(bench, "policy version 1.9 from the learner") >= 0
        os.kill(os.getpid(), signal.SIGTERM)
        await bench.learner.next("demand")
        end = lease_end_from_pb((await bench.learner.next("lease_end")).lease_end)
        assert end.reason is LeaseEndReason.RETURNED
        assert "policy version 1.9" in end.error
        await asyncio.wait_for(bench.running, service.FINISH_SECONDS)


async def test_a_stream_that_breaks_meanwhile_does_not_bring_back_the_demand(tmp_path: Path) -> None:
    async with without_tools(tmp_path) as bench:
        bench.learner.break_stream()
        await bench.learner.hellos.get()
        assert (await bench.learner.hellos.get()).leases == [ONE.id]
        assert (await bench.learner.next("demand")).demand.leases == 0


async def test_an_engine_that_is_away_does_not_end_the_sampler(tmp_path: Path) -> None:
    async with sampler(deep(1), tmp_path) as bench:
        assert (await bench.learner.next("demand")).demand.leases > 0
        bench.engine.away = EngineAwayError("engine", "http://e:1", "answers with status 503", certain=True)
        assert (await bench.learner.next("demand")).demand.leases == 0
        await said(bench, "the engine at http://e:1, which answers with status 503")
        bench.engine.away = None
        assert (await bench.learner.next("demand")).demand.leases > 0
        await said(bench, "")


async def test_a_broker_that_is_away_is_named_when_nothing_goes_on(tmp_path: Path) -> None:
    async with sampler(deep(1), tmp_path) as bench:
        await said(bench, "")
        bench.control.lost = ("b:1883", time.monotonic())
        await said(bench, "the MQTT broker at b:1883")
