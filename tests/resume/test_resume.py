"""A run whose processes are all killed and started again ends as one that nobody disturbed.

In any case with the same groups, each trained once. And with the same weights, bit for bit, where what is sampled does not
depend on time: docs/reliability.md has the conditions, which are `REPRODUCIBLE`.
"""

from __future__ import annotations

import hashlib
import random
from pathlib import Path

import pytest

from tests.chaos.audit import RunAudit
from tests.resume.run_fixture import RunFixture, trained_groups

pytestmark = [pytest.mark.whole_run, pytest.mark.xdist_group("resume")]  # both tests need the run that nobody disturbs
STEPS, BATCH = 5, 2
KEYS = {
    "train.steps": str(STEPS),
    "train.batch": str(BATCH),
    "train.lr": "1e-3",
    "train.warmup_ratio": "0",
    "rollout.max_action_tokens": "24",
    "eval.questions": "1",
    "train.checkpoint_every": "1",
}
REPRODUCIBLE = {"train.max_lag": "0", "engine.max_running": "1", "engine.cache_tokens": "0"}
SEED = 8


def weights(run: RunFixture) -> str:
    return hashlib.sha256((run.run_dir / "checkpoints" / "final" / "model.safetensors").read_bytes()).hexdigest()


def in_order(found: RunAudit) -> None:
    assert (found.lost, found.duplicated, found.unbalanced, found.unreported) == ([], [], [], 0)
    assert [line["step"] for line in found.chain] == [*range(1, STEPS + 1)]
    assert len(set(trained_groups(found))) == len(trained_groups(found)) == STEPS * BATCH


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[str], str]:
    """Ids of the trained groups and the digest of the final weights of a run under `REPRODUCIBLE` conditions."""
    import asyncio

    async def run_to_end() -> tuple[list[str], str]:
        async with RunFixture(tmp_path_factory.mktemp("undisturbed") / "run", 1, {**KEYS, **REPRODUCIBLE}) as run:
            await run.start_parts()
            found = await run.wait_for_completion()
            in_order(found)
            assert any("applied" in line["outcomes"] for line in found.chain[2:])  # or all weights would be the first ones
            return trained_groups(found), weights(run)

    return asyncio.run(run_to_end())


@pytest.mark.timeout(400)
async def test_killed_at_any_moment_a_run_trains_the_same_groups_each_once(
    tmp_path: Path, undisturbed: tuple[list[str], str]
) -> None:
    async with RunFixture(tmp_path / "run", 2, {**KEYS, "train.checkpoint_every": "2"}) as run:
        moments = run.moments(random.Random(SEED))
        for _ in range(3):
            await run.start_parts()
            await run.wait_for_moment(next(moments))
            await run.kill_parts()
        await run.start_parts()
        found = await run.wait_for_completion()
    in_order(found)
    assert set(trained_groups(found)) == set(undisturbed[0])


@pytest.mark.timeout(300)
async def test_a_killed_run_with_one_sampler_ends_with_the_same_weights(
    tmp_path: Path, undisturbed: tuple[list[str], str]
) -> None:
    async with RunFixture(tmp_path / "run", 1, {**KEYS, **REPRODUCIBLE}) as run:
        for moment in (lambda: run.recorded(1), lambda: run.journaled(500)):
            await run.start_parts()
            await run.wait_for_moment(moment())
            await run.kill_parts()
        await run.start_parts()
        found = await run.wait_for_completion()
        in_order(found)
        assert (trained_groups(found), weights(run)) == undisturbed
