"""Plots a run: reward, exact match, budget, saving and version lag over the steps."""

from __future__ import annotations

import math
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

from services.cli.reports.progress_reader import RunProgress
from treegrpo.errors import DataError, DiskError
from treegrpo.observability.printable_text import clipped, printable

if TYPE_CHECKING:
    from matplotlib.axes import Axes

FILE_NAME = "progress.png"
TITLE_CHARACTERS = 160
COLOURS = {
    "reward": "#4c72b0",
    "train": "#8da0cb",
    "heldout": "#c44e52",
    "spent": "#55a868",
    "calls": "#ccb974",
    "chains": "#b0b0b0",
    "lag": "#8172b3",
}


def plot_progress(progress: RunProgress, path: Path, title: str) -> None:
    """Write the plot to ``path`` (PNG); ``title`` is shown literally.

    Raises:
        DataError: there is no step yet.
        DiskError: the plot cannot be written.
    """
    if not progress.steps:
        raise DataError(f"There is nothing to plot for {path.parent} yet; wait for its first step.")
    import matplotlib as mpl
    from matplotlib.figure import Figure

    drawings = (_reward, _em, _budget, _saving, _lag, _signal)
    with mpl.rc_context(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing")  # of a title in a script that the font lacks
        mpl.rcdefaults()  # a matplotlibrc of the user, or of the current directory, could ask for TeX
        figure = Figure(figsize=(13, 7), layout="constrained")
        for place, draw in zip(figure.subplots(2, 3).flat, drawings, strict=True):
            draw(place, progress)
            place.set_xlabel("step")
            place.grid(alpha=0.3)
            place.spines[["top", "right"]].set_visible(False)
        figure.suptitle(printable(clipped(title, TITLE_CHARACTERS)), parse_math=False)
        try:
            figure.savefig(path, dpi=110, format="png")
        except OSError as error:
            raise DiskError(error.errno or 0, f"{path} cannot be written ({error.strerror}); free space there.") from error


def _reward(axes: Axes, progress: RunProgress) -> None:
    axes.plot(_steps(progress), _figures(progress, "reward_mean"), color=COLOURS["reward"])
    axes.set_title("reward, mean of the step's leaves")


def _em(axes: Axes, progress: RunProgress) -> None:
    axes.plot(_steps(progress), _figures(progress, "em", 100), color=COLOURS["train"], label="training, sampled")
    points: dict[str, Any] = {"color": COLOURS["heldout"], "marker": "o", "label": "held-out, greedy"}
    axes.plot([record.step for record in progress.evals], [100 * record.em for record in progress.evals], **points)
    for record in progress.evals:
        axes.annotate(f"{100 * record.em:.1f}", (record.step, 100 * record.em), (0, -15), textcoords="offset points", ha="center")
    axes.set_ylim(0, 105)
    axes.set_title("exact match, %")
    axes.legend(loc="lower right", frameon=False)


def _budget(axes: Axes, progress: RunProgress) -> None:
    spent = [step.training.spent / 1e6 for step in progress.steps]
    chains = [step.chain_tokens / 1e6 for step in progress.steps]
    trees = [chain * (1 - step.saving) for chain, step in zip(chains, progress.steps, strict=True)]
    axes.plot(_steps(progress), chains, color=COLOURS["chains"], label="chains would need")
    axes.plot(_steps(progress), trees, color=COLOURS["spent"], label="trees need")
    axes.plot(_steps(progress), spent, color=COLOURS["spent"], linestyle=":", label="spent, recomputation included")
    axes.set_ylim(bottom=0)
    axes.set_title("rollout budget, million tokens")
    axes.legend(loc="upper left", frameon=False)


def _saving(axes: Axes, progress: RunProgress) -> None:
    axes.plot(
        _steps(progress), [100 * step.saving_tool_calls for step in progress.steps], color=COLOURS["calls"], label="tool calls"
    )
    axes.plot(_steps(progress), [100 * step.saving for step in progress.steps], color=COLOURS["spent"], label="tokens")
    axes.set_ylim(bottom=min(0.0, *(100 * step.saving for step in progress.steps)))
    axes.set_title("saved against chains to the same leaves, %")
    axes.legend(loc="lower right", frameon=False)


def _lag(axes: Axes, progress: RunProgress) -> None:
    axes.plot(_steps(progress), _figures(progress, "lag_max"), color=COLOURS["chains"], label="max")
    axes.plot(_steps(progress), _figures(progress, "lag_mean"), color=COLOURS["lag"], label="mean")
    axes.set_ylim(bottom=0)
    axes.set_title("version lag of trained tokens")
    axes.legend(loc="lower right", frameon=False)


def _signal(axes: Axes, progress: RunProgress) -> None:
    axes.plot(_steps(progress), _figures(progress, "zero_signal_ratio", 100), color=COLOURS["chains"])
    axes.set_ylim(0, 105)
    axes.set_title("groups without signal, %")


def _figures(progress: RunProgress, name: str, factor: float = 1) -> list[float]:
    """A figure of every step, NaN where it has none: a gap in the line."""
    values = (getattr(step, name) for step in progress.steps)
    return [math.nan if value is None else factor * value for value in values]


def _steps(progress: RunProgress) -> list[int]:
    return [step.step for step in progress.steps]
