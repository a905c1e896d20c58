"""A run directory that an earlier version has left goes on under this one: same groups, each once, and the books balance."""

from __future__ import annotations

import json
import tarfile
from pathlib import Path

import pytest

from tests.resume.run_fixture import RunFixture, trained_groups

pytestmark = [pytest.mark.whole_run]
EARLIER = Path(__file__).parent / "data" / "run_before_packages.tar.xz"
"""Recorded with commit f581c1c, the last one before files, classes and packages got the names they have: a run of `SmallRun`
with the keys below, a random model of 17,000 parameters, and two samplers, killed with SIGKILL after its third step.
`journal/reserve`, which holds nothing, was left out, and the paths in run.json were made relative."""
STEPS, CHECKPOINT, RECORDED, BATCH = 6, 2, 3, 2


@pytest.mark.timeout(300)
async def test_a_run_of_the_version_before_the_packages_goes_on(tmp_path: Path) -> None:
    keys = {
        "model.path": str(tmp_path / "run" / "model"),
        "train.steps": str(STEPS),
        "train.batch": str(BATCH),
        "train.lr": "1e-3",
        "train.warmup_ratio": "0",
        "train.checkpoint_every": str(CHECKPOINT),
        "rollout.max_action_tokens": "24",
        "eval.questions": "1",
    }
    async with RunFixture(tmp_path / "run", 2, keys) as run:
        with tarfile.open(EARLIER) as archive:
            archive.extractall(tmp_path / "run", filter="data")
        before = [json.loads(line) for line in (run.run_dir / "progress.jsonl").read_text().splitlines()]
        assert [line["step"] for line in before if line["kind"] == "step"] == [*range(1, RECORDED + 1)]
        await run.start_parts()
        found = await run.wait_for_completion()
    assert (found.lost, found.duplicated, found.unbalanced, found.unreported) == ([], [], [], 0)
    assert [line["step"] for line in found.chain] == [*range(1, STEPS + 1)]
    assert len(set(trained_groups(found))) == len(trained_groups(found)) == STEPS * BATCH
    # What stood before the checkpoint was not done again.
    kept = [line["group_ids"] for line in before if line["kind"] == "step" and line["step"] <= CHECKPOINT]
    assert [line["group_ids"] for line in found.chain[:CHECKPOINT]] == kept
