"""The run as it goes: a live panel in a terminal, plain lines in a pipe. The functions that format are pure."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager, suppress
from pathlib import Path

from rich.panel import Panel
from rich.text import Text

from services.cli.reports.metrics_client import Scrape, pages
from services.cli.reports.progress_reader import FILE_NAME, Account, EvalRecord, Progress, Record, StepRecord, Tail, WaitingRecord
from services.cli.reports.terminal import Terminal, cell, panel
from treegrpo.errors import DataError
from treegrpo.security.credentials import Credentials

REFRESH_SECONDS = 0.5
RATE_STEPS = 5
"""Steps that tokens per second are taken over."""
SPARKS = "▁▂▃▄▅▆▇█"


def count(number: float) -> str:
    """A number short enough to read: 950, 12.3 k, 4.56 M."""
    for factor, unit in ((1e9, " G"), (1e6, " M"), (1e3, " k")):
        if number >= factor:
            return f"{number / factor:.3g}{unit}"
    return f"{number:.0f}"


def percent(share: float | None) -> str:
    return "none" if share is None else f"{100 * share:.1f} %"


def decimals(number: float | None, places: int) -> str:
    return "none" if number is None else f"{number:.{places}f}"


def spark(values: Sequence[float | None], width: int = 40) -> str:
    """The last ``width`` values there are as bars between their least and their greatest."""
    shown = [value for value in values if value is not None][-width:]
    low, span = min(shown, default=0.0), max(shown, default=0.0) - min(shown, default=0.0)
    return "".join(SPARKS[int((value - low) / span * (len(SPARKS) - 1)) if span else 0] for value in shown)


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
        f"lag {decimals(step.lag_mean, 1)} (max {decimals(step.lag_max, 0)})  {count(tokens_per_second(steps))} tok/s  "
        f"spent {count(step.training.spent)} of {count(step.training.granted)} tokens granted  "
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
    """What nothing moves for, as one line."""
    return f"waiting for {record.what}, since {record.seconds:.0f} s"


def ems_line(ems: Sequence[float], newest: int = 4) -> str:
    """Held-out exact match: the first and the newest few."""
    shown = [percent(em) for em in (ems if len(ems) <= newest + 1 else [ems[0], *ems[-newest:]])]
    return " → ".join(shown if len(ems) <= newest + 1 else [shown[0], "…", *shown[1:]])


def budget_line(account: Account) -> str:
    """The ledger's balance in tokens."""
    lost = f", forfeited {count(account.forfeited)}" if account.forfeited else ""
    return (
        f"granted {count(account.granted)} = spent {count(account.spent)}, refunded {count(account.refunded)}, "
        f"outstanding {count(account.outstanding)}{lost}"
    )


def account_of(scrape: Scrape) -> Account:
    """The training ledger in tokens as the intake's /metrics tell it."""
    totals = {name: int(scrape.get(f"treegrpo_budget_{name}_total/tokens/train", 0)) for name in Account.model_fields}
    return Account(**{**totals, "outstanding": int(scrape.get("treegrpo_budget_outstanding/tokens/train", 0))})


def overview(progress: Progress, scrape: Scrape, total: int, title: str, paused: str = "") -> Panel:
    """Everything at a glance; ``paused`` is the sentence for a run that is."""
    steps, last = progress.steps, progress.steps[-1] if progress.steps else None
    rows: list[tuple[str, str | Text]] = [
        ("step", f"{last.step if last else 0}/{total}" + ("" if last else "  (waiting for the first batch)"))
    ]
    if last is not None:
        rows += [
            ("reward", f"{decimals(last.reward_mean, 3)}  {spark([step.reward_mean for step in steps])}"),
            ("EM", f"{percent(last.em)}  {spark([step.em for step in steps])}"),
            ("lag", f"{decimals(last.lag_mean, 1)} versions (max {decimals(last.lag_max, 0)})"),
            ("sampling", f"{count(tokens_per_second(steps))} tok/s"),
            ("saving", f"{percent(last.saving)} of the tokens, {percent(last.saving_tool_calls)} of the tool calls of chains"),
        ]
    if progress.evals:
        rows.append(("held-out", ems_line([record.em for record in progress.evals])))
    rows.append(("budget", budget_line(account_of(scrape) if scrape else last.training if last else Account())))
    samplers = scrape.get("treegrpo_samplers_connected", last.samplers if last else 0)
    leases = scrape.get("treegrpo_leases_outstanding/train", 0)
    rows.append(("samplers", f"{samplers:.0f}, {leases:.0f} training leases out"))
    if now := paused or (waiting_line(progress.waiting) if progress.waiting else ""):
        rows.append(("now", cell(now, "bold yellow")))
    return panel(title, rows)


Refresh = Callable[[list[Record]], Awaitable[None]]


class Screen:
    """Where the command's lines go, and the run's as they come."""

    def __init__(self, terminal: Terminal) -> None:
        self._terminal = terminal
        self._paused = ""

    def say(self, line: str) -> None:
        self._terminal.say(line)

    def paused(self, sentence: str) -> None:
        """Show from now on that the run is paused; empty: it no longer is."""
        if sentence != self._paused:
            self.say(sentence or "The run is no longer paused.")
        self._paused = sentence

    @asynccontextmanager
    async def follow(self, run_dir: Path, metrics: str, total: int, access: Credentials) -> AsyncGenerator[None]:
        """Show the run in ``run_dir`` for the time of the block; ``metrics`` is the intake's address.

        What a run that goes on did before is known, not told again. Lines that are no records are told of once; a progress
        file that cannot be read ends the showing with a sentence, not the run.
        """
        tail, progress, complained = Tail(run_dir / FILE_NAME), Progress(), False
        try:
            for record in tail.new():
                progress.add(record)
        except DataError as error:
            self._cannot_show(error)
            yield
            return
        progress.waiting = None
        show = (
            self._panel(progress, metrics, total, run_dir, access) if self._terminal.is_terminal else self._lines(progress, total)
        )
        async with show as refresh:
            done = asyncio.Event()

            async def loop() -> None:
                nonlocal complained
                while True:
                    try:
                        await refresh(tail.new())
                        if tail.complaint and not complained:
                            self.say(tail.complaint)
                            complained = True
                    except DataError as error:
                        return self._cannot_show(error)
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

    def _cannot_show(self, error: DataError) -> None:
        self.say(f"The progress can no longer be shown: {error}")

    @asynccontextmanager
    async def _lines(self, progress: Progress, total: int) -> AsyncGenerator[Refresh]:
        async def refresh(records: list[Record]) -> None:
            for record in records:
                progress.add(record)
                match record:
                    case StepRecord():
                        self.say(step_line(progress.steps, total))
                    case EvalRecord():
                        self.say(eval_line(record))
                    case WaitingRecord():
                        self.say(waiting_line(record))

        yield refresh

    @asynccontextmanager
    async def _panel(
        self, progress: Progress, metrics: str, total: int, run_dir: Path, access: Credentials
    ) -> AsyncGenerator[Refresh]:
        async with pages(access) as read:
            with self._terminal.live() as live:

                async def refresh(records: list[Record]) -> None:
                    for record in records:
                        progress.add(record)
                    live.update(overview(progress, await read(metrics), total, str(run_dir), self._paused), refresh=True)

                yield refresh
