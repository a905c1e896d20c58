"""A tool that stays away, with a real intake and a real broker: no question is blamed, nothing is lost, and the run goes on."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from pathlib import Path

from services.sampler.expansion.availability import CallTimings
from services.sampler.expansion.expander import Expander
from services.sampler.learner_link.channel import connect_learner
from services.sampler.learner_link.rollout_client import RolloutClient
from services.sampler.learner_link.weight_store import WeightStore
from services.sampler.lease_worker import SamplerIdentity
from services.sampler.service import Sampler
from tests.engines.builders import save_model
from tests.intake.process_harness import IntakeProcess
from tests.sampler.fakes import FakeEngine, FakeEnvironment, FakeText, deep
from tests.sampler.sampler_harness import ROLLOUT
from treegrpo.errors import ToolAwayError
from treegrpo.observability.metrics import SamplerMetrics
from treegrpo.security.credentials import OPEN
from treegrpo.timing.backoff import Backoff
from treegrpo.wire.control import ControlPlane, Member
from treegrpo.wire.trainer_protocol import Done, Publish, Take, Taken, unpack_group

IMPATIENT = CallTimings(wait_limit=0.01, probe_backoff=Backoff((0.005,), jitter=0.5))


@asynccontextmanager
async def sampler(intake: IntakeProcess, environment: FakeEnvironment, root: Path) -> AsyncGenerator[None]:
    metrics, engine = SamplerMetrics(), FakeEngine(deep(1))
    member = Member("s1", "sampler", 1)
    async with ControlPlane.connect(intake.broker, intake.name, member) as control:
        channel = await connect_learner(intake.listen, OPEN)
        expander = Expander(engine, environment, FakeText(), retries=0, metrics=metrics, timings=IMPATIENT)
        store, client = WeightStore(channel, root, metrics), RolloutClient(channel, intake.listen, metrics)
        parts = Sampler(SamplerIdentity("s1", 1, "fake", 16), engine, expander, store, client, control, metrics)
        running = asyncio.create_task(parts.serve_until_drained())
        try:
            yield
        finally:
            running.cancel()
            await asyncio.gather(running, return_exceptions=True)
            await channel.close()


async def counted(intake: IntakeProcess, name: str, least: int) -> dict[str, float]:
    """The intake's metrics when one of them is large enough; the test's time limit ends it."""
    while (samples := await intake.samples()).get(name, 0) < least:  # noqa: ASYNC110
        await asyncio.sleep(0.02)
    return samples


async def test_no_question_is_blamed_for_an_outage_however_long(intake: IntakeProcess, tmp_path: Path) -> None:
    """It lasts for more leases in a row than the intake would bear without a leaf, if they had failed."""
    environment = FakeEnvironment()
    environment.away = ToolAwayError("tool", "nowhere", "does not answer", certain=True)
    probes = iter(range(1_000_000))

    async def probe() -> None:
        if environment.away is not None and next(probes) % 4:  # now and then it answers a probe, and no more than that
            raise environment.away

    environment.probe = probe
    root = tmp_path / "weights"
    root.mkdir()
    async with intake.serving(*ROLLOUT), intake.trainer() as trainer, sampler(intake, environment, root):
        weights = save_model(intake.run_dir / "weights" / "1.0", seed=0)
        await asyncio.to_thread(trainer.ask, Publish("1.0", str(weights), 0), Done)
        await counted(intake, "treegrpo_leases_ended_total/train/returned", 70)
        environment.away = None
        while not (taken := await asyncio.to_thread(trainer.ask, Take(0, 2), Taken)).groups:
            pass
        samples = await intake.samples()
    assert [len(list(unpack_group(group).leaves())) for group in taken.groups] == [6, 6]
    assert samples["treegrpo_leases_ended_total/train/failed"] == 0
    assert not [name for name, count in samples.items() if name.startswith("treegrpo_groups_set_aside_total") and count]
    granted, spent, refunded, forfeited, outstanding = (
        samples.get(f"treegrpo_budget_{part}/train/tokens", 0)
        for part in ("granted_total", "spent_total", "refunded_total", "forfeited_total", "outstanding")
    )
    assert granted == spent + refunded + forfeited + outstanding
    assert forfeited == 0
