"""``python -m tests.chaos [--seed N] [--faults N] …``: disturb a run in every way, and audit what it has written down.

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

from tests.chaos.driver import Driver, Outcome
from tests.chaos.faults import schedule
from tests.chaos.keeper import Keeper
from tests.chaos.report import Verdict
from tests.chaos.stage import Stage


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.chaos", description="Disturb a run in every way, then audit it.")
    parser.add_argument("--seed", type=int, default=0, help="of the schedule and of the run")
    parser.add_argument("--faults", type=int, default=60)
    parser.add_argument("--samplers", type=int, default=3)
    parser.add_argument("--steps", type=int, default=30, help="train at least so many; two more than the faults took otherwise")
    parser.add_argument("--batch", type=int, default=8, help="groups of a step")
    parser.add_argument("--questions", type=int, default=32, help="held-out questions of an evaluation")
    parser.add_argument("--dir", type=Path, help="a new directory for the run, which is kept; else only that of a bad run is")
    return parser.parse_args()


async def chaos(options: argparse.Namespace, run_dir: Path) -> Verdict:
    """One run."""
    names = [f"sampler-{number}" for number in range(options.samplers)]
    stage = Stage(run_dir, options.seed, names, steps=100_000, batch=options.batch, questions=options.questions)
    async with AsyncExitStack() as stack:
        for proxy in stage.proxies.values():
            await stack.enter_async_context(proxy.serving())
        tasks = await stack.enter_async_context(asyncio.TaskGroup())
        keeper = await stack.enter_async_context(Keeper(stage, tasks))
        driver = Driver(stage, keeper)
        watching = tasks.create_task(driver.watch(), name="watch")
        await driver.start()
        hung: list[str] = []
        for number, fault in enumerate(schedule(options.seed, options.faults, names, list(stage.proxies)), 1):
            outcome = await driver.do(fault)
            say(f"{number}/{options.faults} {summary(outcome)}")
            if outcome.recovery is None:
                hung.append(f"after fault {number} the run did not go on: {outcome.said}")
                break
        else:
            hung += await driver.drain()
            hung += await driver.complete(max(options.steps, driver.audit(ended=False).step + 2))
        watching.cancel()
        found = driver.audit(ended=not hung)
        return Verdict(options.seed, driver.outcomes, found, keeper.restarts, hung, keeper.grown(), keeper.growth)


def summary(outcome: Outcome) -> str:
    found = "; ".join(outcome.findings)
    how = "not recovered" if outcome.recovery is None else f"recovered after {outcome.recovery:.1f} s"
    return f"{outcome.fault.what}: {outcome.fault.whom}, {how}{found and ', audit: '}{found}"


def say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def main() -> int:
    options = arguments()
    logging.basicConfig(level=logging.ERROR)
    run_dir: Path = options.dir or Path(tempfile.mkdtemp(prefix="treegrpo-chaos-"))
    verdict = asyncio.run(chaos(options, run_dir))
    if verdict.good and not options.dir:
        shutil.rmtree(run_dir)
    else:
        say(f"The run is kept in {run_dir}.")
    verdict.show(Console(stderr=True, width=None if sys.stderr.isatty() else 120))
    return 0 if verdict.good else 1


if __name__ == "__main__":
    sys.exit(main())
