"""The parts together in one process: run state, goodbye and its deadline, a dead engine."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from services.sampler import service
from services.sampler.expansion.expander import Expander
from services.sampler.learner_link.rollout_client import LearnerClient
from services.sampler.learner_link.weight_sync import WeightStore
from services.sampler.lease_worker import Identity
from services.sampler.service import Sampler
from tests.sampler.fake_learner import FakeLearner, serving
from tests.sampler.fakes import FakeEngine, FakeEnvironment, FakeText, Script, lease, plan
from treegrpo.errors import DeadlineError, EngineError
from treegrpo.observability.metrics import SamplerMetrics
from treegrpo.v1 import rollout_pb2
from treegrpo.wire.control import ControlPlane, Member, RunState


@dataclass
class Bench:
    learner: FakeLearner
    engine: FakeEngine
    environment: FakeEnvironment
    metrics: SamplerMetrics
    control: ControlPlane
    running: asyncio.Task[None]


@asynccontextmanager
async def sampler(
    script: Script, root: Path, state: RunState = RunState.RUNNING, environment: FakeEnvironment | None = None
) -> AsyncGenerator[Bench]:
    """A sampler at work; the test ends it. Its control plane says ``state`` and hears of no change."""
    learner, engine, metrics = FakeLearner(), FakeEngine(script), SamplerMetrics()
    environment = environment or FakeEnvironment()
    control = ControlPlane("127.0.0.1:1", "test", Member("sampler-0", "sampler", 7))
    control.state, control.lost = state, None
    async with serving(learner) as channel:
        expander = Expander(engine, environment, FakeText(), retries=0, metrics=metrics)
        me, store = Identity("sampler-0", 7, "fake", 16), WeightStore(channel, root, metrics)
        whole = Sampler(me, engine, expander, store, LearnerClient(channel, "test", metrics), control, metrics)
        running = asyncio.create_task(whole.run())
        try:
            yield Bench(learner, engine, environment, metrics, control, running)
        finally:
            running.cancel()
            await asyncio.gather(running, return_exceptions=True)


async def test_a_run_that_drains_ends_the_sampler(tmp_path: Path) -> None:
    async with sampler(lambda _prefix: "a!", tmp_path, RunState.DRAINING) as bench:
        await bench.running
        assert await bench.learner.goodbyes.get() == "sampler-0"


async def test_a_paused_run_takes_leases_and_begins_nothing_until_it_drains(tmp_path: Path) -> None:
    async with sampler(lambda _prefix: "a!", tmp_path, RunState.PAUSED) as bench:
        await bench.learner.next("demand")
        await bench.learner.grant(lease(plan(1, 1, 2)))
        await bench.learner.say(drain={})
        request = await bench.learner.requests.get()
        assert request.demand.leases == 0
        request = await bench.learner.requests.get()
        if request.HasField("subtree"):
            assert len(request.subtree.leaves) == 1
            await bench.learner.ack(request)
            request = await bench.learner.next("lease_end")
        assert request.lease_end.forgone == 2
        await bench.running


async def test_pausing_holds_back_every_turn(tmp_path: Path) -> None:
    async with sampler(lambda _prefix: "a!", tmp_path, RunState.PAUSED) as bench:
        await bench.learner.next("demand")
        await bench.learner.grant(lease(plan(1, 0, 0)))
        bench.learner.break_stream()
        await bench.learner.hellos.get()
        assert (await bench.learner.hellos.get()).leases == ["lease-1"]
        assert bench.engine.prefixes == []


async def test_a_goodbye_that_takes_too_long_says_what_is_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(service, "DRAIN_SECONDS", 0.3)
    async with sampler(lambda _prefix: "a!", tmp_path) as bench:
        await bench.learner.next("demand")
        await bench.learner.grant(lease(plan(1, 0, 0)))
        await bench.learner.next("subtree")  # and does not ack it
        await bench.learner.say(drain={})
        with pytest.raises(BaseExceptionGroup) as caught:
            await bench.running
    assert caught.group_contains(DeadlineError, match=r"another sampler \(1 subtrees were not acked\)")


async def test_what_does_not_come_to_its_end_while_draining_is_returned(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(service, "FINISH_SECONDS", 0.05)
    stuck = asyncio.Event()

    async def script(_prefix: str) -> str:
        stuck.set()
        await asyncio.Event().wait()
        return ""

    async with sampler(script, tmp_path) as bench:
        await bench.learner.next("demand")
        await bench.learner.grant(lease(plan(1, 0, 0)))
        await stuck.wait()
        await bench.learner.say(drain={})
        assert (await bench.learner.next("demand")).demand.leases == 0
        end = (await bench.learner.next("lease_end")).lease_end
        assert end.reason == rollout_pb2.LEASE_END_REASON_RETURNED
        await bench.running


async def test_a_dead_engine_ends_the_sampler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(service, "TICK_SECONDS", 0.01)
    async with sampler(lambda _prefix: "a!", tmp_path) as bench:
        await bench.learner.next("demand")
        bench.engine.dead = "out of memory"
        with pytest.raises(BaseExceptionGroup) as caught:
            await bench.running
    assert caught.group_contains(EngineError, match="out of memory")
