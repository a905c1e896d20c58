"""GeoHop from end to end with SGLang: a few steps of what `make demo ENGINE=sglang` runs, with a fault on the way."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

from services.cli.reports.progress_reader import read_progress
from tests.chaos.audit import audit_run
from tests.chaos.run_records import JournalArchive
from tests.cli.small_run import GEOHOP, SmallRun
from tests.cli.test_up import Up, up  # noqa: F401  # pyright: ignore[reportUnusedImport]  # up is a fixture
from tests.sglang.server_harness import PYTHON

OWN = ("data.train", "data.heldout", "retriever.corpus", "model.path", "rollout.max_turns", "rollout.max_action_tokens")


@pytest.mark.timeout(1200)
async def test_geohop_on_sglang_loses_nothing_when_the_server_is_killed(
    tmp_path: Path,
    up: Up,  # noqa: F811
) -> None:
    small_run = SmallRun(tmp_path)
    for key in (*OWN, "rollout.max_context"):
        del small_run.keys[key]
    changes = {
        "train__steps": "3",
        "train__batch": "4",
        "train__checkpoint_every": "3",
        "eval__every": "3",
        "eval__questions": "24",
        "engine__kind": "sglang",
        "engine__python": str(PYTHON),
    }
    run = await up(str(GEOHOP / "geohop.toml"), *small_run.flags(**changes))
    run.seconds = 1100.0
    archive = JournalArchive(small_run.run_dir / "journal", tmp_path / "archive")
    for step in (1, 2):
        await run.wait_for_line(f"step {step}/")
        archive.link_new_segments()
        if step == 1:
            os.kill(run.pid_of("sglang.launch_server"), signal.SIGKILL)
    assert await run.wait_for_end() == 0, "\n".join(run.lines)
    archive.link_new_segments()
    progress = read_progress(small_run.run_dir)
    assert [step.step for step in progress.steps] == [1, 2, 3]
    assert [record.step for record in progress.evals] == [0, 3]
    assert [record.failed for record in progress.evals] == [0, 0]
    found = audit_run(small_run.run_dir, archive, ended=True)
    assert found.clean, found
    assert "it is restarted" in (small_run.run_dir / "logs" / "sampler-0.log").read_text(encoding="utf-8").lower()
    assert (small_run.run_dir / "logs" / "sampler-0-sglang.log").is_file()
