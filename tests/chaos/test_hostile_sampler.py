"""The intake refuses the messages of the chaos runs' hostile sampler, and serves others meanwhile."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from learner.intake.leases.circuit_breaker import BreakerLimits
from tests.chaos.hostile_sampler import NAME, HostileSampler
from tests.intake.builders import make_table
from tests.intake.process_harness import SamplerPeer
from tests.intake.server_harness import serve_intake
from treegrpo.core.budget import Budget
from treegrpo.core.lease import LeaseKind
from treegrpo.timing.backoff import Backoff


async def test_the_hostile_sampler_is_refused_and_others_go_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    limits = BreakerLimits(Backoff((0.02,)))
    table = make_table(questions=40, batch=8, max_lag=8)
    async with (
        serve_intake(table, tmp_path, breaker_limits=limits) as intake,
        SamplerPeer.join(intake.address, name="good") as good,
    ):
        bad = HostileSampler(intake.address, random.Random(0), attack_seconds=0.4, pause_seconds=0.001)
        for attack in bad.attacks:
            await bad.run_attack(attack)
        await good.set_demand(2)
        for _ in range(4):
            await good.roll_out((await good.receive("lease")).id)
        for reason in ("failed", "returned"):
            assert intake.sample("leases_ended_total", kind="train", reason=reason)
        assert all(intake.sample("subtrees_refused_total", reason=reason) for reason in ("tree", "lease"))
        assert intake.sample("peers_refused_total", reason="message")
        assert intake.coordinator.breaker.is_put_aside(NAME)
        assert not table.set_aside_counts
        assert not intake.coordinator.failure.done()
        assert table.ledger.imbalance(LeaseKind.TRAIN) == Budget()
