"""What a run says at its end."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from services.cli.plot import FILE_NAME, plot
from services.cli.progress import Progress, read_progress
from services.cli.view import count, percent

FINAL = "final"


def newest_checkpoint(run_dir: Path) -> Path | None:
    """The finished run's model, else the last checkpoint, else None."""
    checkpoints = run_dir / "checkpoints"
    final = checkpoints / FINAL
    return final if final.is_dir() else max(checkpoints.glob("step-*"), default=None)


def em_line(progress: Progress) -> str:
    """Held-out exact match before and after, in percent."""
    ems = [f"{100 * record.em:.1f}" for record in progress.evals]
    return f"held-out EM: {' → '.join([ems[0], ems[-1]] if len(ems) > 1 else ems) or 'not evaluated'}"


def budget_summary(progress: Progress) -> str:
    """What training cost, and what chains to the same leaves would have."""
    last = progress.steps[-1]
    return (
        f"rollout budget: {count(last.training.spent)} tokens spent, {percent(last.saving)} saved against "
        f"{count(last.chain_tokens)} for chains to the same leaves"
    )


def resume_command(command: str, arguments: Sequence[str]) -> str:
    """The command that goes on with this run."""
    return " ".join(["treegrpo", command, *arguments, *([] if "--run.resume" in arguments else ["--resume"])])


def summary(run_dir: Path, toml: Path | None) -> list[str]:
    """The lines that end a run; draws the plot. Raises DataError when the progress file is broken."""
    progress = read_progress(run_dir)
    if not progress.steps:
        return ["No step was made."]
    picture = run_dir / FILE_NAME
    plot(progress, picture, str(run_dir))
    model = newest_checkpoint(run_dir)
    lines = [em_line(progress), budget_summary(progress), f"plot: {picture}"]
    if model is not None:
        lines += [
            f"checkpoint: {model} (Hugging Face format)",
            f"next: treegrpo eval {toml or ''} --model.path {model}".replace("  ", " "),
        ]
    return lines
