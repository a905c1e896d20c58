"""A share of `make fuzz` for every day: the same targets, fewer cases."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Generator
from pathlib import Path

import pytest

from tests.fuzz.case_runner import CaseCounts, run_cases
from tests.fuzz.fuzz_runs import fuzz_servers
from tests.fuzz.loop_watchdog import STALL_SECONDS, LoopWatchdog, watched
from tests.fuzz.mutations import build, parse
from tests.fuzz.pure_targets import PURE_TARGETS, PureTarget
from tests.fuzz.sample_messages import ASKED, REQUESTS, RESPONSES
from tests.fuzz.server_targets import SERVER_TARGETS

SHARE = 0.01


@pytest.fixture(autouse=True)
def _quiet() -> Generator[None]:  # pyright: ignore[reportUnusedFunction]
    """A refusal is a line in the log."""
    logging.disable(logging.CRITICAL)
    yield
    logging.disable(logging.NOTSET)


@pytest.mark.parametrize("target", PURE_TARGETS, ids=lambda target: target.name)
def test_mutated_messages_are_refused_as_they_should_be(target: PureTarget) -> None:
    count = CaseCounts(target.name)
    run_cases(count, target.made, target.feed, int(target.cases * SHARE), watch=target.watch)
    assert not count.crashes, count.crashes[0]
    assert (count.cases, count.hangs, count.stalls) == (int(target.cases * SHARE), 0, 0)


def test_servers_outlive_what_is_sent_to_them(tmp_path: Path) -> None:
    """Real processes: broker, retriever and intake."""
    counts: list[CaseCounts] = []
    fuzz_servers(SHARE, 0, tmp_path, counts.append)
    assert not [crash for count in counts for crash in count.crashes]
    assert (len(counts), sum(count.hangs + count.stalls for count in counts)) == (6, 0)


def test_the_cases_of_all_targets_are_as_many_as_is_said() -> None:
    assert sum(target.cases for target in (*PURE_TARGETS, *SERVER_TARGETS)) == 100_000


def test_a_callback_that_keeps_the_event_loop_is_told_of() -> None:
    def busy() -> None:
        until = time.thread_time() + 1.1 * STALL_SECONDS
        while time.thread_time() < until:
            pass

    async def run() -> None:
        asyncio.get_running_loop().call_soon(busy)
        await asyncio.sleep(0)

    reported: list[str] = []
    with watched(reported.append) as dog:
        asyncio.run(run())
    asyncio.run(run())
    assert dog.stalls == reported
    assert len(reported) == 1
    assert "busy" in reported[0]
    assert dog.longest > STALL_SECONDS


async def test_work_that_holds_up_the_event_loop_is_seen() -> None:
    dog = LoopWatchdog()
    async with dog.beating():
        began = time.process_time()
        while time.process_time() < began + STALL_SECONDS + 0.05:
            pass
    assert dog.longest > STALL_SECONDS
    assert len(dog.stalls) == 1


def test_a_crash_is_found_and_shrinks_to_what_matters() -> None:
    def broken(data: bytes) -> None:
        if len(data) > 100:
            raise KeyError(len(data))

    count = CaseCounts("broken")
    run_cases(count, PURE_TARGETS[0].made, broken, 100)
    assert len(count.crashes) == 1
    assert "KeyError: " in count.crashes[0]


@pytest.mark.parametrize("message", [*REQUESTS, *RESPONSES, *ASKED], ids=lambda message: type(message).__name__)
def test_taking_a_message_apart_and_together_changes_nothing(message: object) -> None:
    data: bytes = message.SerializeToString()  # type: ignore[attr-defined]
    assert build(parse(data, type(message).DESCRIPTOR)) == data  # type: ignore[attr-defined]
