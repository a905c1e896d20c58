"""Live view of a run: a panel in a terminal, plain lines in a pipe. The formatting functions are pure."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager, suppress
from pathlib import Path

from rich.panel import Panel
from rich.text import Text

from services.cli.reports.metrics_client import MetricSamples, open_metrics_client
from services.cli.reports.progress_reader import (
    FILE_NAME,
    EvalRecord,
    LedgerTotals,
    ProgressTail,
    Record,
    RunProgress,
    StepRecord,
    WaitingRecord,
)
from services.cli.reports.terminal import Terminal, cell, panel
from treegrpo.errors import DataError
from treegrpo.security.credentials import Credentials

REFRESH_SECONDS = 0.5
RATE_STEPS = 5
"""Steps that tokens per second are taken over."""
BARS = "▁▂▃▄▅▆▇█"


def short_number(number: float) -> str:
    """A number with three significant digits: 950, 12.3 k, 4.56 M."""
    for factor, unit in ((1e9, " G"), (1e6, " M"), (1e3, " k")):
        if number >= factor:
            return f"{number / factor:.3g}{unit}"
    return f"{number:.0f}"


def percent(share: float | None) -> str:
    return "none" if share is None else f"{100 * share:.1f} %"


def decimals(number: float | None, places: int) -> str:
    return "none" if number is None else f"{number:.{places}f}"


def sparkline(values: Sequence[float | None], width: int = 40) -> str:
    """A sparkline of the last ``width`` values, from their minimum to their maximum; None is left out."""
    shown = [value for value in values if value is not None][-width:]
    low, span = min(shown, default=0.0), max(shown, default=0.0) - min(shown, default=0.0)
    return "".join(BARS[int((value - low) / span * (len(BARS) - 1)) if span else 0] for value in shown)


def tokens_per_second(steps: Sequence[StepRecord]) -> float:
    """Computed tokens a second over the last few steps, training leases only; 0 before two steps."""
    recent = steps[-RATE_STEPS - 1 :]
    if len(recent) < 2 or recent[-1].time <= recent[0].time:
        return 0.0
    return (recent[-1].training.spent - recent[0].training.spent) / (recent[-1].time - recent[0].time)


def step_line(steps: Sequence[StepRecord], total: int) -> str:
    """The last of ``steps`` as one line."""
    step = steps[-1]
    return (
        f"step {step.step}/{total}  reward {decimals(step.reward_mean, 3)}  EM {percent(step.em)}  "
        f"lag {decimals(step.lag_mean, 1)} (max {decimals(step.lag_max, 0)})  {short_number(tokens_per_second(steps))} tok/s  "
        f"spent {short_number(step.training.spent)} of {short_number(step.training.granted)} tokens granted  "
        f"saving {percent(step.saving)} tokens, {percent(step.saving_tool_calls)} calls  samplers {step.samplers}"
    )


def eval_line(record: EvalRecord) -> str:
    """An evaluation as one line."""
    failed = f", {record.failed} failed" if record.failed else ""
    return (
        f"held-out after step {record.step}: EM {percent(record.em)}, reward {record.reward:.3f} "
        f"({record.questions} questions{failed})"
    )


def waiting_line(record: WaitingRecord) -> str:
    """A long wait, as one line."""
    return f"waiting for {record.what}, since {record.seconds:.0f} s"


def exact_match_line(ems: Sequence[float], newest: int = 4) -> str:
    """Held-out exact match: the first value and the newest few."""
    shown = [percent(em) for em in (ems if len(ems) <= newest + 1 else [ems[0], *ems[-newest:]])]
    return " → ".join(shown if len(ems) <= newest + 1 else [shown[0], "…", *shown[1:]])


def budget_line(totals: LedgerTotals) -> str:
    """The balance of the ledger in tokens."""
    lost = f", forfeited {short_number(totals.forfeited)}" if totals.forfeited else ""
    return (
        f"granted {short_number(totals.granted)} = spent {short_number(totals.spent)}, refunded {short_number(totals.refunded)}, "
        f"outstanding {short_number(totals.outstanding)}{lost}"
    )


def ledger_totals_from_metrics(samples: MetricSamples) -> LedgerTotals:
    """The training ledger in tokens, from the intake's /metrics."""
    totals = {name: int(samples.get(f"treegrpo_budget_{name}_total/tokens/train", 0)) for name in LedgerTotals.model_fields}
    return LedgerTotals(**{**totals, "outstanding": int(samples.get("treegrpo_budget_outstanding/tokens/train", 0))})


def run_panel(progress: RunProgress, samples: MetricSamples, total: int, title: str, paused: str = "") -> Panel:
    """The panel of a run; ``paused`` is the sentence for a run that is paused."""
    steps, last = progress.steps, progress.steps[-1] if progress.steps else None
    rows: list[tuple[str, str | Text]] = [
        ("step", f"{last.step if last else 0}/{total}" + ("" if last else "  (waiting for the first batch)"))
    ]
    if last is not None:
        rows += [
            ("reward", f"{decimals(last.reward_mean, 3)}  {sparkline([step.reward_mean for step in steps])}"),
            ("EM", f"{percent(last.em)}  {sparkline([step.em for step in steps])}"),
            ("lag", f"{decimals(last.lag_mean, 1)} versions (max {decimals(last.lag_max, 0)})"),
            ("sampling", f"{short_number(tokens_per_second(steps))} tok/s"),
            ("saving", f"{percent(last.saving)} of the tokens, {percent(last.saving_tool_calls)} of the tool calls of chains"),
        ]
    if progress.evals:
        rows.append(("held-out", exact_match_line([record.em for record in progress.evals])))
    totals = ledger_totals_from_metrics(samples) if samples else last.training if last else LedgerTotals()
    rows.append(("budget", budget_line(totals)))
    samplers = samples.get("treegrpo_samplers_connected", last.samplers if last else 0)
    leases = samples.get("treegrpo_leases_outstanding/train", 0)
    rows.append(("samplers", f"{samplers:.0f}, {leases:.0f} training leases out"))
    if now := paused or (waiting_line(progress.waiting) if progress.waiting else ""):
        rows.append(("now", cell(now, "bold yellow")))
    return panel(title, rows)


Refresh = Callable[[list[Record]], Awaitable[None]]


class LiveView:
    """Prints the lines of the command, and the progress of the run."""

    def __init__(self, terminal: Terminal) -> None:
        self._terminal = terminal
        self._paused = ""

    def print_line(self, line: str) -> None:
        self._terminal.print_line(line)

    def show_paused(self, sentence: str) -> None:
        """Show from now on that the run is paused; empty: it no longer is."""
        if sentence != self._paused:
            self.print_line(sentence or "The run is no longer paused.")
        self._paused = sentence

    @asynccontextmanager
    async def follow_run(self, run_dir: Path, metrics: str, total: int, access: Credentials) -> AsyncGenerator[None]:
        """Show the run in ``run_dir`` for the time of the block; ``metrics`` is the intake's address.

        What a continued run did before is not printed again. Lines that are no records are reported once; a progress file that
        cannot be read ends the view with a sentence, not the run.
        """
        tail, progress, warned = ProgressTail(run_dir / FILE_NAME), RunProgress(), False
        try:
            for record in tail.read_new_records():
                progress.add_record(record)
        except DataError as error:
            self._report_unreadable(error)
            yield
            return
        progress.waiting = None
        view = (
            self._refreshing_panel(progress, metrics, total, run_dir, access)
            if self._terminal.is_terminal
            else self._printing_lines(progress, total)
        )
        async with view as refresh:
            done = asyncio.Event()

            async def loop() -> None:
                nonlocal warned
                while True:
                    try:
                        await refresh(tail.read_new_records())
                        if tail.skipped_lines and not warned:
                            self.print_line(tail.skipped_lines)
                            warned = True
                    except DataError as error:
                        return self._report_unreadable(error)
                    if done.is_set():
                        return None
                    with suppress(TimeoutError):
                        await asyncio.wait_for(done.wait(), REFRESH_SECONDS)

            async with asyncio.TaskGroup() as tasks:
                tasks.create_task(loop(), name="view")
                try:
                    yield
                finally:
                    done.set()

    def _report_unreadable(self, error: DataError) -> None:
        self.print_line(f"The progress can no longer be shown: {error}")

    @asynccontextmanager
    async def _printing_lines(self, progress: RunProgress, total: int) -> AsyncGenerator[Refresh]:
        async def refresh(records: list[Record]) -> None:
            for record in records:
                progress.add_record(record)
                match record:
                    case StepRecord():
                        self.print_line(step_line(progress.steps, total))
                    case EvalRecord():
                        self.print_line(eval_line(record))
                    case WaitingRecord():
                        self.print_line(waiting_line(record))

        yield refresh

    @asynccontextmanager
    async def _refreshing_panel(
        self, progress: RunProgress, metrics: str, total: int, run_dir: Path, access: Credentials
    ) -> AsyncGenerator[Refresh]:
        async with open_metrics_client(access) as read:
            with self._terminal.live_display() as live:

                async def refresh(records: list[Record]) -> None:
                    for record in records:
                        progress.add_record(record)
                    live.update(run_panel(progress, await read(metrics), total, str(run_dir), self._paused), refresh=True)

                yield refresh
