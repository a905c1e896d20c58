"""``python -m tests.chaos [--seed N] [--faults N] …``: inject faults into a run, and audit what it has recorded.

Ends with code 1 if anything was lost, counted twice or out of balance, if something hung, or if memory or reward went
out of bounds. The last line is JSON.
"""

from __future__ import annotations

import argparse
import asyncio
import logging
import shutil
import sys
import tempfile
from contextlib import AsyncExitStack
from pathlib import Path

from rich.console import Console

from tests.chaos.chaos_run import ChaosRun
from tests.chaos.driver import FaultDriver, FaultOutcome
from tests.chaos.faults import schedule
from tests.chaos.part_restarter import PartRestarter
from tests.chaos.report import ChaosReport


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.chaos", description="Inject faults into a run, then audit it.")
    parser.add_argument("--seed", type=int, default=0, help="of the schedule and of the run")
    parser.add_argument("--faults", type=int, default=60)
    parser.add_argument("--samplers", type=int, default=3)
    parser.add_argument("--steps", type=int, default=30, help="train at least so many; two more than the faults took otherwise")
    parser.add_argument("--batch", type=int, default=8, help="groups of a step")
    parser.add_argument("--questions", type=int, default=32, help="held-out questions of an evaluation")
    parser.add_argument("--dir", type=Path, help="a new directory for the run, which is kept; else only that of a bad run is")
    return parser.parse_args()


async def run_chaos(options: argparse.Namespace, run_dir: Path) -> ChaosReport:
    """One run."""
    names = [f"sampler-{number}" for number in range(options.samplers)]
    run = ChaosRun(run_dir, options.seed, names, steps=100_000, batch=options.batch, questions=options.questions)
    async with AsyncExitStack() as stack:
        for proxy in run.proxies.values():
            await stack.enter_async_context(proxy.serving())
        tasks = await stack.enter_async_context(asyncio.TaskGroup())
        restarter = await stack.enter_async_context(PartRestarter(run, tasks))
        driver = FaultDriver(run, restarter)
        watching = tasks.create_task(driver.watch_memory(), name="watch")
        await driver.start_parts()
        hung: list[str] = []
        for number, fault in enumerate(schedule(options.seed, options.faults, names, list(run.proxies)), 1):
            outcome = await driver.inject_fault(fault)
            print_line(f"{number}/{options.faults} {outcome_line(outcome)}")
            if outcome.recovery is None:
                hung.append(f"after fault {number} the run did not go on: {outcome.said}")
                break
        else:
            hung += await driver.drain_run()
            hung += await driver.train_to_end(max(options.steps, driver.audit(ended=False).step + 2))
        watching.cancel()
        found = driver.audit(ended=not hung)
        return ChaosReport(
            options.seed, driver.outcomes, found, restarter.restarts, hung, restarter.memory_leaks(), restarter.growth
        )


def outcome_line(outcome: FaultOutcome) -> str:
    found = "; ".join(outcome.findings)
    how = "not recovered" if outcome.recovery is None else f"recovered after {outcome.recovery:.1f} s"
    return f"{outcome.fault.what}: {outcome.fault.whom}, {how}{found and ', audit: '}{found}"


def print_line(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def main() -> int:
    options = arguments()
    logging.basicConfig(level=logging.ERROR)
    run_dir: Path = options.dir or Path(tempfile.mkdtemp(prefix="treegrpo-chaos-"))
    report = asyncio.run(run_chaos(options, run_dir))
    if report.passed and not options.dir:
        shutil.rmtree(run_dir)
    else:
        print_line(f"The run is kept in {run_dir}.")
    report.print_report(Console(stderr=True, width=None if sys.stderr.isatty() else 120))
    return 0 if report.passed else 1


if __name__ == "__main__":
    sys.exit(main())
