"""The summary lines at the end of a run."""

from __future__ import annotations

import os
import shlex
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

from services.cli.reports.live_view import percent, short_number
from services.cli.reports.plot import FILE_NAME, plot_progress
from services.cli.reports.progress_reader import LedgerTotals, RunProgress, read_progress
from services.cli.reports.run_history import newest_checkpoint
from treegrpo.errors import DiskError


def exact_match_summary(progress: RunProgress) -> str:
    """Held-out exact match before and after, in percent."""
    ems = [f"{100 * record.em:.1f}" for record in progress.evals]
    return f"held-out EM: {' → '.join([ems[0], ems[-1]] if len(ems) > 1 else ems) or 'not evaluated'}"


def budget_summary(progress: RunProgress) -> str:
    """The cost of training, against chains to the same leaves."""
    last = progress.steps[-1]
    calls = last.ledger.get("train", {}).get("tool_calls", LedgerTotals()).spent
    return (
        f"rollout budget: {short_number(last.training.spent)} tokens, {percent(last.recomputed)} of them recomputed after "
        f"weight updates, and {short_number(calls)} tool calls; against chains to the same leaves trees save "
        f"{percent(last.saving)} of the tokens and {percent(last.saving_tool_calls)} of the calls"
    )


def command_name() -> str:
    """The command as the user can type it here: its name if it is on the PATH, else its path."""
    script = Path(sys.executable).with_name("treegrpo")
    if not script.exists() or shutil.which("treegrpo") is not None:
        return "treegrpo"
    try:
        return os.path.relpath(script)
    except OSError:  # the current directory is gone
        return str(script)


def command_line(*words: str) -> str:
    """A `treegrpo` command line that can be typed here."""
    return shlex.join([command_name(), *words])


def summary_lines(run_dir: Path, steps: int, toml: Path | None, again: Sequence[str]) -> list[str]:
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
        return [f"No step was made; the logs are in {run_dir / 'logs'}.", f"continue: {command_line(*again)}"]
    picture = run_dir / FILE_NAME
    try:
        plot_progress(progress, picture, str(run_dir))
        drawn = f"plot: {picture}"
    except DiskError as error:  # the run has ended well without
        drawn = f"no plot: {error}"
    lines = [exact_match_summary(progress), budget_summary(progress), drawn]
    model = newest_checkpoint(run_dir)
    if model is not None:
        lines.append(f"checkpoint: {model} (Hugging Face format)")
    if progress.steps[-1].step < steps:
        lines.append(f"continue: {command_line(*again)}")
    elif model is not None:
        lines.append(f"next: {command_line('eval', *([str(toml)] if toml else []), '--model.path', str(model))}")
    return lines
