from __future__ import annotations

from pathlib import Path

import pytest

from learner.intake.wal.framing import encode_frame, encode_record
from learner.intake.wal.segments import segment_path
from services.cli.checks.run_checks import check_run_dir
from services.cli.reports.run_history import describe_finished_run, describe_start, newest_checkpoint, steps_done
from tests.cli.progress_rows import eval_row, step_row, write
from tests.cli.small_run import SmallRun
from treegrpo.config.fingerprint import record_fingerprint
from treegrpo.config.loader import load_config
from treegrpo.errors import ConfigError


def checkpoint(run_dir: Path, *names: str) -> None:
    for name in names:
        (run_dir / "checkpoints" / name).mkdir(parents=True)


def test_the_newest_checkpoint_stands_in_for_the_final_model(tmp_path: Path) -> None:
    assert newest_checkpoint(tmp_path) is None
    checkpoint(tmp_path, "step-999999", "step-1000000", "step-2000000.damaged")
    assert newest_checkpoint(tmp_path) == tmp_path / "checkpoints" / "step-1000000"
    checkpoint(tmp_path, "final")
    assert newest_checkpoint(tmp_path) == tmp_path / "checkpoints" / "final"


def test_a_directory_holds_a_run_once_something_is_recorded(tmp_path: Path) -> None:
    small_run = SmallRun(tmp_path)
    config = load_config(None, small_run.flags())
    (small_run.run_dir / "logs").mkdir(parents=True)
    assert (steps_done(small_run.run_dir), describe_start(config)) == (None, f"Starting the run test in {small_run.run_dir}")
    (small_run.run_dir / "journal").mkdir()
    segment = segment_path(small_run.run_dir / "journal", 1)
    segment.write_bytes(header := encode_frame([encode_record({"format": 1, "segment": 1, "after": 0})]))
    assert steps_done(small_run.run_dir) is None, "a start that failed has left nothing to go on with"
    segment.write_bytes(header + encode_frame([encode_record({"event": "granted"})]))
    assert (steps_done(small_run.run_dir), describe_start(config)) == (
        0,
        f"Continuing the run in {small_run.run_dir} after step 0 of 2",
    )
    checkpoint(small_run.run_dir, "step-000001")
    assert describe_start(config) == f"Continuing the run in {small_run.run_dir} after step 1 of 2"


def test_only_the_run_that_began_there_goes_on_in_a_directory(tmp_path: Path) -> None:
    small_run = SmallRun(tmp_path)
    other = load_config(None, small_run.flags(rollout__trees="5"))
    small_run.run_dir.mkdir()
    record_fingerprint(load_config(None, small_run.flags()), begun=False)
    check_run_dir(other)
    checkpoint(small_run.run_dir, "step-000001")
    with pytest.raises(ConfigError, match=r"rollout\.trees was 2 and is 5"):
        check_run_dir(other)
    assert check_run_dir(load_config(None, small_run.flags(train__lr="1e-3"))) == f"{small_run.run_dir} (continues after step 1)"
    with pytest.raises(ConfigError, match="is a file"):
        check_run_dir(load_config(None, small_run.flags(run__dir=str(small_run.train))))


def test_a_run_is_finished_when_its_last_step_is_kept_and_evaluated(tmp_path: Path) -> None:
    small_run = SmallRun(tmp_path)
    config = load_config(None, small_run.flags())
    checkpoint(small_run.run_dir, "step-000001", "final")
    write(small_run.run_dir, eval_row(0, 0.1), step_row(1), step_row(2))
    assert not describe_finished_run(config)
    checkpoint(small_run.run_dir, "step-000002")
    assert not describe_finished_run(config)
    write(small_run.run_dir, eval_row(2, 0.3))
    assert "is finished: step 2 of 2 is done" in describe_finished_run(config)
    assert "Raise train.steps to continue it, or choose another run.dir" in describe_finished_run(config)
    assert not describe_finished_run(load_config(None, small_run.flags(train__steps="3")))
