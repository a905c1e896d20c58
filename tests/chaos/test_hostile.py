"""The hostile sampler of the chaos runs does what it says, and the intake takes none of it."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from learner.intake.leases import circuit_breaker
from tests.chaos import hostile
from tests.chaos.hostile import NAME, Hostile
from tests.intake.builders import book
from tests.intake.process_harness import Sampler
from tests.intake.server_harness import serve_intake
from treegrpo.core.budget import Budget
from treegrpo.core.lease import LeaseKind


async def test_the_hostile_sampler_is_refused_and_others_go_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hostile, "TURN_SECONDS", 0.4)
    monkeypatch.setattr(hostile, "REST_SECONDS", 0.001)
    monkeypatch.setattr(circuit_breaker, "MOST_SECONDS", 0.02)
    made = book(questions=40, batch=8, max_lag=8)
    async with serve_intake(made, tmp_path) as door, Sampler.join(door.address, name="good") as good:
        bad = Hostile(door.address, random.Random(0))
        for turn in bad.turns:
            await hostile.once(turn)
        await good.want(2)
        for _ in range(4):
            await good.roll_out((await good.hear("lease")).id)
        for reason in ("failed", "returned"):
            assert door.sample("leases_ended_total", kind="train", reason=reason)
        assert all(door.sample("subtrees_refused_total", reason=reason) for reason in ("tree", "lease"))
        assert door.sample("peers_refused_total", reason="message")
        assert door.desk.breaker.put_aside(NAME)
        assert not made.set_aside
        assert not door.desk.broken.done()
        assert made.ledger.imbalance(LeaseKind.TRAIN) == Budget()
