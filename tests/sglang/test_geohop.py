"""GeoHop from end to end with SGLang: the run that `make demo ENGINE=sglang` makes, a few steps of it."""

from __future__ import annotations

from pathlib import Path

import pytest

from services.cli.progress import read_progress
from tests.cli.test_up import Up, up  # noqa: F401  # pyright: ignore[reportUnusedImport]  # up is a fixture
from tests.cli.workbench import GEOHOP, Workbench
from tests.sglang.servers import PYTHON

OWN = ("data.train", "data.heldout", "retriever.corpus", "model.path", "rollout.max_turns", "rollout.max_action_tokens")


@pytest.mark.timeout(1200)
async def test_geohop_trains_on_sglang(tmp_path: Path, up: Up) -> None:  # noqa: F811
    bench = Workbench(tmp_path)
    for key in (*OWN, "rollout.max_context"):
        del bench.keys[key]
    changes = {
        "train__steps": "3",
        "train__batch": "4",
        "train__checkpoint_every": "3",
        "eval__every": "3",
        "eval__questions": "24",
        "engine__kind": "sglang",
        "engine__python": str(PYTHON),
    }
    run = await up(str(GEOHOP / "geohop.toml"), *bench.flags(**changes))
    assert await run.end() == 0, "\n".join(run.lines)
    progress = read_progress(bench.run_dir)
    assert [step.step for step in progress.steps] == [1, 2, 3]
    assert [record.step for record in progress.evals] == [0, 3]
    assert (bench.run_dir / "logs" / "sampler-0-sglang.log").is_file()
