"""All targets, or a share of them: counts, what grew, what the servers complained of."""

from __future__ import annotations

import asyncio
import gc
import time
import tracemalloc
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from tests.fuzz.drive import Count, feed
from tests.fuzz.pure import TARGETS, Target
from tests.fuzz.servers import CASE_SECONDS, SERVED, Served
from tests.fuzz.stage import Server, Stage, stage

WARM = 0.2
"""Share of a server's cases after which its memory is looked at first."""
TRACED = 200
"""Cases that are repeated with every allocation traced, which is slow."""
ROOM_MIB = 8.0
"""It need not wait for less."""
QUIET_SECONDS = 8.0
"""What a server may still have on its hands: a client's acknowledgement is waited for 5 s."""


def fuzz_pure(share: float, seed: int, say: Callable[[Count], None]) -> None:
    for target in TARGETS:
        count = Count(target.name)
        feed(count, target.made, target.feed, max(20, int(target.cases * share)), seed, watch=target.watch)
        count.growth_mib, count.peak_mib = _memory(target, seed)
        say(count)


def _memory(target: Target, seed: int) -> tuple[float, float]:
    """What the same cases leave behind the second time, and the most that they need meanwhile, in MiB."""
    cases: list[Any] = []
    feed(Count(""), target.made, cases.append, TRACED, seed)
    held: list[int] = []
    tracemalloc.start()
    try:
        for _ in range(3):
            gc.collect()
            held.append(tracemalloc.get_traced_memory()[0])
            for case in cases:
                _quietly(target.feed, case)
        peak = tracemalloc.get_traced_memory()[1] - held[0]
        return max(0, held[2] - held[1]) / (1 << 20), peak / (1 << 20)
    finally:
        tracemalloc.stop()


def _quietly(call: Callable[[Any], None], case: Any) -> None:
    with suppress(Exception):  # `feed` has told of it
        call(case)


def fuzz_servers(share: float, seed: int, folder: Path, say: Callable[[Count], None]) -> None:
    with asyncio.Runner() as runner:
        where = stage(folder)
        there = runner.run(where.__aenter__())
        try:
            for served in SERVED:
                say(_served(runner, there, served, share, seed))
        finally:
            runner.run(where.__aexit__(None, None, None))


def _served(runner: asyncio.Runner, there: Stage, served: Served, share: float, seed: int) -> Count:
    count, server, cases = Count(served.name), there.servers[served.server], max(10, int(served.cases * share))
    door = served.open(there)
    give = runner.run(door.__aenter__())
    complained, stalled = len(server.complaints), server.stalls

    async def case(data: Any) -> None:
        async with asyncio.timeout(CASE_SECONDS):
            await give(data)

    def one(data: Any) -> None:
        runner.run(case(data))

    try:
        feed(count, served.made, one, max(1, int(WARM * cases)), seed + 1, watch=False)
        before = server.mib
        feed(count, served.made, one, cases - max(1, int(WARM * cases)), seed + 100_000, watch=False)
    finally:
        runner.run(door.__aexit__(None, None, None))
    count.growth_mib = max(0.0, runner.run(_settled(server, before)) - before)
    count.crashes += server.complaints[complained:]
    count.stalls += server.stalls - stalled
    if not server.alive:
        count.crashes.append(f"the {server.name} ended with {server.process.returncode}; see {server.log}")
    else:
        runner.run(_ask(served, there))
    return count


async def _ask(served: Served, there: Stage) -> None:
    await served.well(there)


async def _settled(server: Server, before: float) -> float:
    """Its memory when what is still on its hands is done."""
    deadline = time.monotonic() + QUIET_SECONDS
    while server.alive and server.mib > before + ROOM_MIB and time.monotonic() < deadline:  # noqa: ASYNC110
        await asyncio.sleep(0.5)
    return server.mib if server.alive else before
