"""A run that has trained nothing may be told to be another; one that has trained may not."""

from __future__ import annotations

from pathlib import Path

import pytest

from learner.intake.persistence.untrained_run import archive_untrained_run, check_resumable, is_untrained
from services.cli.checks.run_checks import check_run_dir
from services.cli.reports.run_history import describe_start
from tests.cli.small_run import SmallRun
from treegrpo.config.fingerprint import check_fingerprint, record_fingerprint
from treegrpo.config.loader import load_config
from treegrpo.config.schema import Config
from treegrpo.errors import ConfigError, RunFileError

LEFT = (
    "checkpoints/step-000000/progress.json",
    "checkpoints/final/config.json",
    "journal/00000001.log",
    "weights/0.0/config.json",
)


def begun(small_run: SmallRun, *left: str) -> Config:
    """A run that has begun and left these files."""
    for name in (*LEFT, *left, "progress.jsonl", "paused"):
        (path := small_run.run_dir / name).parent.mkdir(parents=True, exist_ok=True)
        path.write_text("")
    config = load_config(None, small_run.flags())
    record_fingerprint(config, begun=False)
    return config


def other(small_run: SmallRun) -> Config:
    return load_config(None, small_run.flags(rollout__max_context="512"))


def names(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def test_an_untrained_run_is_archived_when_its_config_changes(tmp_path: Path) -> None:
    begun(small_run := SmallRun(tmp_path))
    assert "rollout.max_context was 256 and is 512" in check_run_dir(other(small_run))
    assert "anew, since nothing was trained yet: rollout.max_context was 256 and is 512" in describe_start(other(small_run))
    for _ in range(2):  # the second time as after a crash in between
        assert archive_untrained_run(other(small_run))
    record_fingerprint(other(small_run), begun=False)
    check_fingerprint(other(small_run))
    assert not archive_untrained_run(other(small_run))
    there = {name for name in names(small_run.run_dir) if "/untrained/" not in name}
    assert there == {"progress.jsonl.untrained", "paused", "run.json", "weights/0.0/config.json"}


def test_a_recorded_step_counts_without_its_checkpoint(tmp_path: Path) -> None:
    """Its disk may not be there now."""
    begun(small_run := SmallRun(tmp_path))
    (small_run.run_dir / "progress.jsonl").write_text('{"kind": "step", "step": 1}\n')
    with pytest.raises(ConfigError, match="cannot resume with other settings"):
        archive_untrained_run(other(small_run))


def test_a_file_that_cannot_be_archived_is_named(tmp_path: Path) -> None:
    begun(small_run := SmallRun(tmp_path))
    (small_run.run_dir / "journal" / "untrained").touch()
    with pytest.raises(RunFileError, match=r"journal/untrained cannot be used \(File exists\); move that file away"):
        archive_untrained_run(other(small_run))


def test_an_unchanged_run_keeps_its_files(tmp_path: Path) -> None:
    config = begun(small_run := SmallRun(tmp_path))
    before = names(small_run.run_dir)
    assert (archive_untrained_run(config), check_resumable(config), is_untrained(small_run.run_dir)) == (False, "", True)
    assert names(small_run.run_dir) == before


@pytest.mark.parametrize("left", ["checkpoints/step-000002/x", "checkpoints/step-000002.damaged/x", "weights/1.7/x"])
def test_a_trained_run_may_not_change(tmp_path: Path, left: str) -> None:
    begun(small_run := SmallRun(tmp_path), left)
    before = names(small_run.run_dir)
    for refuses in (archive_untrained_run, check_resumable, check_run_dir):
        with pytest.raises(
            ConfigError, match=r"cannot resume with other settings: rollout\.max_context was 256 and is 512\. Set them back"
        ):
            refuses(other(small_run))
    assert names(small_run.run_dir) == before
