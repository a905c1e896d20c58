from __future__ import annotations

import io
from pathlib import Path

import pytest
from prometheus_client import generate_latest
from rich.console import Console

from services.cli.reports.live_view import (
    LiveView,
    budget_line,
    eval_line,
    exact_match_line,
    ledger_totals_from_metrics,
    run_panel,
    short_number,
    sparkline,
    step_line,
    tokens_per_second,
)
from services.cli.reports.metrics_client import parse_metrics
from services.cli.reports.progress_reader import LedgerTotals, RunProgress, StepRecord
from services.cli.reports.terminal import Terminal
from tests.cli.progress_rows import eval_row, evaluation, step, step_row, write
from treegrpo.observability.metrics import IntakeMetrics
from treegrpo.security.credentials import OPEN


@pytest.mark.parametrize(("number", "text"), [(0, "0"), (950, "950"), (1234, "1.23 k"), (4_560_000, "4.56 M"), (2e9, "2 G")])
def test_numbers_are_short(number: float, text: str) -> None:
    assert short_number(number) == text


def test_a_step_is_one_line() -> None:
    steps = [step(1, spent=1000, time=10.0), step(2, spent=5000, time=12.0)]
    assert step_line(steps, 100) == (
        "step 2/100  reward 0.125  EM 25.0 %  lag 0.5 (max 1)  2 k tok/s  "
        "spent 5 k of 45 k tokens granted  saving 50.0 % tokens, 25.0 % calls  samplers 2"
    )


def test_what_a_step_did_not_measure_is_said_to_be_none() -> None:
    row = {name: value for name, value in step_row(2).items() if name not in ("reward_mean", "em", "lag_mean", "lag_max")}
    steps = [step(1), StepRecord.model_validate(row)]
    assert "reward none  EM none  lag none (max none)" in step_line(steps, 100)
    console = Console(file=io.StringIO(), width=100)
    console.print(run_panel(RunProgress(steps), {}, 100, "runs/demo"))


def test_an_evaluation_is_one_line_that_tells_of_failures() -> None:
    assert eval_line(evaluation(20, 0.3125)) == "held-out after step 20: EM 31.2 %, reward 0.100 (20 questions)"
    assert eval_line(evaluation(0, 0.5, failed=2)).endswith("(20 questions, 2 failed)")


def test_the_budget_line_balances() -> None:
    assert budget_line(LedgerTotals(granted=9000, spent=4000, refunded=2000, forfeited=1000, outstanding=2000)) == (
        "granted 9 k = spent 4 k, refunded 2 k, outstanding 2 k, forfeited 1 k"
    )


def test_tokens_per_second_need_two_steps() -> None:
    assert tokens_per_second([step(1)]) == 0.0
    assert tokens_per_second([step(1, spent=0, time=0.0), step(2, spent=300, time=3.0)]) == 100.0


def test_only_the_first_and_the_newest_evaluations_are_shown() -> None:
    assert exact_match_line([0.1, 0.2]) == "10.0 % → 20.0 %"
    assert exact_match_line([0.1, 0.2, 0.3, 0.4], newest=2) == "10.0 % → … → 30.0 % → 40.0 %"


def test_sparks_span_from_least_to_greatest() -> None:
    assert sparkline([0.0, 0.5, 1.0]) == "▁▄█"
    assert sparkline([1.0, 1.0]) == "▁▁"
    assert sparkline([0.0, None, 0.5, 1.0]) == "▁▄█"
    assert sparkline([]) == ""


def test_the_ledger_is_read_from_the_metrics_page() -> None:
    metrics = IntakeMetrics()
    metrics.granted.labels("train", "tokens").inc(100)
    metrics.spent.labels("train", "tokens").inc(60)
    metrics.granted.labels("eval", "tokens").inc(7)
    metrics.outstanding.labels("train", "tokens").set(40)
    account = ledger_totals_from_metrics(parse_metrics(generate_latest(metrics.registry).decode()))
    assert account == LedgerTotals(granted=100, spent=60, outstanding=40)


def test_the_panel_shows_a_run_from_its_first_moment_on() -> None:
    empty, full = RunProgress(), RunProgress()
    for record in (evaluation(0, 0.3), step(1), step(2)):
        full.add_record(record)
    console = Console(file=io.StringIO(), width=120)
    with console.capture() as capture:
        console.print(run_panel(empty, {}, 100, "runs/demo"))
        console.print(
            run_panel(full, {"treegrpo_samplers_connected": 3.0, "treegrpo_leases_outstanding/train": 5.0}, 100, "runs/demo")
        )
    text = capture.get()
    for part in ("0/100", "waiting for the first batch", "2/100", "30.0 %", "50.0 %", "3, 5 training leases out"):
        assert part in text


async def test_in_a_pipe_every_record_is_a_line_also_the_last(tmp_path: Path) -> None:
    out = io.StringIO()
    view = LiveView(Terminal(file=out))
    async with view.follow_run(tmp_path, "127.0.0.1:1", 10, OPEN):
        write(tmp_path, eval_row(0, 0.3), step_row(1), step_row(2))
    assert [line.split("  ")[0] for line in out.getvalue().splitlines()[1:]] == ["step 1/10", "step 2/10"]


async def test_what_a_run_did_before_it_went_on_is_not_told_again(tmp_path: Path) -> None:
    write(tmp_path, step_row(1), step_row(2))
    out = io.StringIO()
    async with LiveView(Terminal(file=out)).follow_run(tmp_path, "127.0.0.1:1", 10, OPEN):
        write(tmp_path, step_row(3))
    assert [line.split("  ")[0] for line in out.getvalue().splitlines()] == ["step 3/10"]


@pytest.mark.parametrize("terminal", [True, False])
async def test_a_pause_and_what_is_waited_for_are_shown(tmp_path: Path, terminal: bool) -> None:
    out = io.StringIO()
    view = LiveView(Terminal(file=out, force_terminal=terminal, width=120))
    async with view.follow_run(tmp_path, "127.0.0.1:1", 10, OPEN):
        write(tmp_path, step_row(1), {"kind": "waiting", "for": "2 of 8 groups", "seconds": 125.0})
    assert "waiting for 2 of 8 groups, since 125 s" in out.getvalue()
    write(tmp_path, step_row(2))
    out.truncate(0)
    async with view.follow_run(tmp_path, "127.0.0.1:1", 10, OPEN):
        for sentence in ("It is paused.", "It is paused.", "", ""):
            view.show_paused(sentence)
    assert out.getvalue().count("It is paused.") == 1
    assert out.getvalue().count("no longer paused") == 1
    assert "waiting for" not in out.getvalue()


async def test_a_line_that_is_no_record_is_told_of_once_and_costs_nothing_else(tmp_path: Path) -> None:
    out = io.StringIO()
    async with LiveView(Terminal(file=out)).follow_run(tmp_path, "127.0.0.1:1", 10, OPEN):
        (tmp_path / "progress.jsonl").write_text("nonsense\n")
        write(tmp_path, step_row(1), step_row(2))
    assert out.getvalue().count("line 1 is not a record") == 1
    assert "step 1/10" in out.getvalue()
    assert "step 2/10" in out.getvalue()


async def test_a_broken_progress_file_ends_the_view_and_not_the_run(tmp_path: Path) -> None:
    (tmp_path / "progress.jsonl").mkdir()
    out = io.StringIO()
    async with LiveView(Terminal(file=out)).follow_run(tmp_path, "127.0.0.1:1", 10, OPEN):
        pass
    assert "no longer be shown" in out.getvalue()
    assert "Is a directory" in out.getvalue()


async def test_in_a_terminal_the_panel_is_drawn_without_metrics_too(tmp_path: Path) -> None:
    write(tmp_path, step_row(3))
    out = io.StringIO()
    async with LiveView(Terminal(file=out, force_terminal=True, width=120)).follow_run(tmp_path, "127.0.0.1:1", 10, OPEN):
        pass
    assert "3/10" in out.getvalue()
