"""Fuzzes all targets, or a share of their cases: counts, memory growth, errors of the servers."""

from __future__ import annotations

import asyncio
import gc
import time
import tracemalloc
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from tests.fuzz.case_runner import CaseCounts, run_cases
from tests.fuzz.pure_targets import PURE_TARGETS, PureTarget
from tests.fuzz.server_processes import FuzzedServers, ServerProcess, fuzzed_servers
from tests.fuzz.server_targets import CASE_SECONDS, SERVER_TARGETS, ServerTarget

WARM = 0.2
"""Share of a server's cases after which its memory is looked at first."""
TRACED = 200
"""Cases that are repeated with every allocation traced, which is slow."""
TOLERATED_MIB = 8.0
"""Growth that is not waited for."""
QUIET_SECONDS = 8.0
"""For work that a server has not finished: it waits for a client's acknowledgement for 5 s."""


def fuzz_pure(share: float, seed: int, report: Callable[[CaseCounts], None]) -> None:
    for target in PURE_TARGETS:
        count = CaseCounts(target.name)
        run_cases(count, target.made, target.feed, max(20, int(target.cases * share)), seed, watch=target.watch)
        count.growth_mib, count.peak_mib = _memory(target, seed)
        report(count)


def _memory(target: PureTarget, seed: int) -> tuple[float, float]:
    """What the same cases leave behind the second time, and the most that they need meanwhile, in MiB."""
    cases: list[Any] = []
    run_cases(CaseCounts(""), target.made, cases.append, TRACED, seed)
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
    with suppress(Exception):  # `run_cases` has reported it
        call(case)


def fuzz_servers(share: float, seed: int, folder: Path, report: Callable[[CaseCounts], None]) -> None:
    with asyncio.Runner() as runner:
        context = fuzzed_servers(folder)
        servers = runner.run(context.__aenter__())
        try:
            for target in SERVER_TARGETS:
                report(_fuzz_server(runner, servers, target, share, seed))
        finally:
            runner.run(context.__aexit__(None, None, None))


def _fuzz_server(runner: asyncio.Runner, servers: FuzzedServers, target: ServerTarget, share: float, seed: int) -> CaseCounts:
    count, server, cases = CaseCounts(target.name), servers.servers[target.server], max(10, int(target.cases * share))
    context = target.connect(servers)
    send = runner.run(context.__aenter__())
    errors, stalls = len(server.unexpected_errors), server.stalls

    async def case(data: Any) -> None:
        async with asyncio.timeout(CASE_SECONDS):
            await send(data)

    def run_case(data: Any) -> None:
        runner.run(case(data))

    try:
        run_cases(count, target.made, run_case, max(1, int(WARM * cases)), seed + 1, watch=False)
        before = server.mib
        run_cases(count, target.made, run_case, cases - max(1, int(WARM * cases)), seed + 100_000, watch=False)
    finally:
        runner.run(context.__aexit__(None, None, None))
    count.growth_mib = max(0.0, runner.run(_wait_for_memory(server, before)) - before)
    count.crashes += server.unexpected_errors[errors:]
    count.stalls += server.stalls - stalls
    if not server.alive:
        count.crashes.append(f"the {server.name} ended with {server.process.returncode}; see {server.log}")
    else:
        runner.run(_probe(target, servers))
    return count


async def _probe(target: ServerTarget, servers: FuzzedServers) -> None:
    await target.probe(servers)


async def _wait_for_memory(server: ServerProcess, before: float) -> float:
    """Its memory after it has finished its work."""
    deadline = time.monotonic() + QUIET_SECONDS
    while server.alive and server.mib > before + TOLERATED_MIB and time.monotonic() < deadline:  # noqa: ASYNC110
        await asyncio.sleep(0.5)
    return server.mib if server.alive else before
