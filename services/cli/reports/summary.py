"""What a run says at its end."""

from __future__ import annotations

import os
import shlex
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

from services.cli.reports.live_view import count, percent
from services.cli.reports.plot import FILE_NAME, plot
from services.cli.reports.progress_reader import Account, Progress, read_progress
from services.cli.reports.run_history import newest_checkpoint
from treegrpo.errors import DiskError


def em_line(progress: Progress) -> str:
    """Held-out exact match before and after, in percent."""
    ems = [f"{100 * record.em:.1f}" for record in progress.evals]
    return f"held-out EM: {' → '.join([ems[0], ems[-1]] if len(ems) > 1 else ems) or 'not evaluated'}"


def budget_summary(progress: Progress) -> str:
    """What training cost, and what chains to the same leaves would have."""
    last = progress.steps[-1]
    calls = last.ledger.get("train", {}).get("tool_calls", Account()).spent
    return (
        f"rollout budget: {count(last.training.spent)} tokens, {percent(last.recomputed)} of them again under new weights, "
        f"and {count(calls)} tool calls; against chains to the same leaves trees save {percent(last.saving)} of the tokens and "
        f"{percent(last.saving_tool_calls)} of the calls"
    )


def program() -> str:
    """What to type for this command here: its name where the shell finds it, else where it lies."""
    script = Path(sys.executable).with_name("treegrpo")
    if not script.exists() or shutil.which("treegrpo") is not None:
        return "treegrpo"
    try:
        return os.path.relpath(script)
    except OSError:  # the current directory is gone
        return str(script)


def command(*words: str) -> str:
    """A command line of ours, to be typed here."""
    return shlex.join([program(), *words])


def summary(run_dir: Path, steps: int, toml: Path | None, again: Sequence[str]) -> list[str]:
    """The lines that end a run; draws the plot.

    Args:
        run_dir: of the run.
        steps: it was to make.
        toml: its configuration file.
        again: command and arguments it was started with.

    Raises:
        RunFileError: the progress file cannot be read.
    """
    progress = read_progress(run_dir)
    if not progress.steps:
        return [f"No step was made; the logs are in {run_dir / 'logs'}.", f"go on: {command(*again)}"]
    picture = run_dir / FILE_NAME
    try:
        plot(progress, picture, str(run_dir))
        drawn = f"plot: {picture}"
    except DiskError as error:  # the run has ended well without
        drawn = f"no plot: {error}"
    lines = [em_line(progress), budget_summary(progress), drawn]
    model = newest_checkpoint(run_dir)
    if model is not None:
        lines.append(f"checkpoint: {model} (Hugging Face format)")
    if progress.steps[-1].step < steps:
        lines.append(f"go on: {command(*again)}")
    elif model is not None:
        lines.append(f"next: {command('eval', *([str(toml)] if toml else []), '--model.path', str(model))}")
    return lines
