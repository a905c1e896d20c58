from __future__ import annotations

from pathlib import Path

import pytest

from services.cli.reports.plot import plot_progress
from services.cli.reports.progress_reader import RunProgress, read_progress
from services.cli.reports.summary import command_name, exact_match_summary, summary_lines
from tests.cli.progress_rows import eval_row, evaluation, step_row, write
from treegrpo.errors import DataError

TOML = Path("geohop.toml")


def finished_run(folder: Path) -> Path:
    write(folder, eval_row(0, 0.312), step_row(1), step_row(2), eval_row(2, 0.635))
    (folder / "checkpoints" / "step-000002").mkdir(parents=True)
    return folder


def test_the_summary_says_before_and_after_and_what_to_do_next(tmp_path: Path) -> None:
    model = finished_run(tmp_path) / "checkpoints" / "final"
    model.mkdir()
    lines = summary_lines(tmp_path, 2, TOML, ("up", "geohop.toml"))
    assert lines[0] == "held-out EM: 31.2 → 63.5"
    assert lines[2:] == [
        f"plot: {tmp_path / 'progress.png'}",
        f"checkpoint: {model} (Hugging Face format)",
        f"next: {command_name()} eval geohop.toml --model.path {model}",
    ]


def test_a_run_that_was_cut_short_says_how_to_go_on(tmp_path: Path) -> None:
    lines = summary_lines(finished_run(tmp_path), 10, TOML, ("up", "geohop.toml", "--train.steps", "10"))
    assert lines[-1] == f"continue: {command_name()} up geohop.toml --train.steps 10"


def test_a_run_without_a_step_says_where_the_logs_are(tmp_path: Path) -> None:
    assert summary_lines(tmp_path, 2, TOML, ("up",)) == [
        f"No step was made; the logs are in {tmp_path / 'logs'}.",
        f"continue: {command_name()} up",
    ]


def test_one_evaluation_has_no_arrow() -> None:
    progress = RunProgress()
    assert exact_match_summary(progress) == "held-out EM: not evaluated"
    progress.add_record(evaluation(0, 0.5))
    assert exact_match_summary(progress) == "held-out EM: 50.0"


def test_the_plot_is_a_picture(tmp_path: Path) -> None:
    picture = tmp_path / "progress.png"
    plot_progress(read_progress(finished_run(tmp_path)), picture, "a run")
    data = picture.read_bytes()
    assert data.startswith(b"\x89PNG")
    width, height = int.from_bytes(data[16:20]), int.from_bytes(data[20:24])
    assert width > 1000
    assert height > 500


def test_the_plot_has_a_gap_where_a_step_measured_nothing(tmp_path: Path) -> None:
    measured = ("reward_mean", "em", "lag_mean", "lag_max", "zero_signal_ratio")
    write(tmp_path, step_row(1), {name: value for name, value in step_row(2).items() if name not in measured}, step_row(3))
    plot_progress(read_progress(tmp_path), tmp_path / "progress.png", "a run")
    assert (tmp_path / "progress.png").stat().st_size > 10_000


def test_there_is_no_plot_before_the_first_step(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="nothing to plot"):
        plot_progress(RunProgress(), tmp_path / "progress.png", "a run")
