"""A whole sampler in this process, connected to a `FakeLearner`."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

from services.sampler.expansion.availability import CallTimings
from services.sampler.expansion.expander import Expander
from services.sampler.learner_link.rollout_client import RolloutClient, StreamTimings
from services.sampler.learner_link.weight_store import WeightStore
from services.sampler.lease_worker import SamplerIdentity
from services.sampler.service import Sampler, SamplerTimings
from tests.sampler.expansion_harness import FAST
from tests.sampler.fake_learner import FakeLearner, serving
from tests.sampler.fakes import FakeEngine, FakeEnvironment, FakeText, Script
from treegrpo.observability.metrics import SamplerMetrics
from treegrpo.wire.control import ControlPlane, Member, RunState

ROLLOUT = ("--rollout.max_action_tokens", "12", "--rollout.max_context", "256", "--rollout.max_turns", "2")
"""Flags of a run with short episodes."""


@dataclass
class SamplerFixture:
    """A sampler and everything around it."""

    learner: FakeLearner
    engine: FakeEngine
    environment: FakeEnvironment
    metrics: SamplerMetrics
    control: ControlPlane
    running: asyncio.Task[None]


@asynccontextmanager
async def running_sampler(
    script: Script,
    root: Path,
    state: RunState = RunState.RUNNING,
    environment: FakeEnvironment | None = None,
    *,
    timings: SamplerTimings | None = None,
    stream: StreamTimings | None = None,
    calls: CallTimings = FAST,
) -> AsyncGenerator[SamplerFixture]:
    """A sampler at work; the test ends it. Its control plane says ``state`` and hears of no change."""
    learner, engine, metrics = FakeLearner(), FakeEngine(script), SamplerMetrics()
    environment = environment or FakeEnvironment()
    control = ControlPlane("127.0.0.1:1", "test", Member("sampler-0", "sampler", 7))
    control.state, control.lost = state, None
    async with serving(learner) as channel:
        expander = Expander(engine, environment, FakeText(), retries=0, metrics=metrics, timings=calls)
        client, store = RolloutClient(channel, "test", metrics, stream), WeightStore(channel, root, metrics)
        identity = SamplerIdentity("sampler-0", 7, "fake", 16)
        sampler = Sampler(identity, engine, expander, store, client, control, metrics, timings)
        running = asyncio.create_task(sampler.serve_until_drained())
        try:
            yield SamplerFixture(learner, engine, environment, metrics, control, running)
        finally:
            running.cancel()
            await asyncio.gather(running, return_exceptions=True)
