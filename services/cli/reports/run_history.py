"""The state of a run directory before a start: whether it holds a run, its last step, whether it is finished."""

from __future__ import annotations

import re
from pathlib import Path

from learner.intake.persistence.recovery import has_recorded_events
from learner.intake.persistence.untrained_run import check_resumable
from services.cli.reports.progress_reader import read_progress
from treegrpo.config.schema import Config

FINAL = "final"
CHECKPOINT = re.compile(r"step-(\d+)")


def checkpoints(run_dir: Path) -> list[tuple[int, Path]]:
    """The checkpoints of a run with their steps, oldest first."""
    found = [(CHECKPOINT.fullmatch(path.name), path) for path in (run_dir / "checkpoints").glob("step-*")]
    return sorted((int(match[1]), path) for match, path in found if match)


def newest_checkpoint(run_dir: Path) -> Path | None:
    """The finished run's model, else the last checkpoint, else None."""
    final, steps = run_dir / "checkpoints" / FINAL, checkpoints(run_dir)
    return final if final.is_dir() else steps[-1][1] if steps else None


def steps_done(run_dir: Path) -> int | None:
    """The step from which a run continues, None if there is no run. Raises JournalError: its journal cannot be read."""
    if steps := checkpoints(run_dir):
        return steps[-1][0]
    return 0 if has_recorded_events(run_dir) else None


def is_trained(config: Config) -> bool:
    """Whether there is a checkpoint of the last step."""
    steps = checkpoints(config.run.dir)
    return bool(steps) and steps[-1][0] >= config.train.steps


def describe_start(config: Config) -> str:
    """A line about a start: of a new run, or continuing one. Raises JournalError, ConfigError and DataError."""
    done = steps_done(config.run.dir)
    if done is None:
        return f"Starting the run {config.run.name} in {config.run.dir}"
    if changed := check_resumable(config):
        return f"Starting the run in {config.run.dir} anew, since nothing was trained yet: {changed}"
    return f"Continuing the run in {config.run.dir} after step {done} of {config.train.steps}"


def describe_finished_run(config: Config) -> str:
    """A sentence about a run that is trained and evaluated; empty for any other run. Raises DataError."""
    if not is_trained(config):
        return ""
    done, evals = checkpoints(config.run.dir)[-1][0], read_progress(config.run.dir).evals
    if not evals or evals[-1].step < done:
        return ""
    return (
        f"The run in {config.run.dir} is finished: step {done} of {config.train.steps} is done, and its model is in "
        f"{newest_checkpoint(config.run.dir)}. Raise train.steps to continue it, or choose another run.dir for a new run."
    )
