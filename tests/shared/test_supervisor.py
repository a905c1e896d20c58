from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator

import pytest

from tests.manual_clock import ManualClock
from treegrpo.runtime.supervisor import Ended, RestartPolicy, Supervisor
from treegrpo.timing.backoff import Backoff

pytestmark = pytest.mark.pure

POLICY = RestartPolicy(Backoff((1.0, 2.0), retries=2), stable_seconds=60.0)


class Restarts:
    """A process that ends as ``ends`` says, and what its supervisor says of it."""

    def __init__(self, *ends: Ended | None, policy: RestartPolicy = POLICY) -> None:
        self._ends: Iterator[Ended | None] = iter(ends)
        self.announced: list[tuple[str, float]] = []
        self.clock = ManualClock()
        self.supervisor = Supervisor(policy, lambda why, delay: self.announced.append((why, delay)), self.clock)

    async def run_once(self) -> Ended | None:
        return next(self._ends)

    def run_once_blocking(self) -> Ended | None:
        return next(self._ends)


async def test_a_process_is_restarted_until_its_work_is_done() -> None:
    process = Restarts(Ended("first"), Ended("second"), None)
    assert await process.supervisor.supervise(process.run_once) is None
    assert process.announced == [("first", 1.0), ("second", 2.0)]
    assert process.clock.delays == [1.0, 2.0]


async def test_a_process_that_ends_too_often_in_a_row_is_given_up() -> None:
    process = Restarts(*(Ended(str(number)) for number in range(3)))
    assert await process.supervisor.supervise(process.run_once, asyncio.Event()) == Ended("2")
    assert process.supervisor.starts == 3


async def test_a_process_that_ran_long_enough_starts_a_new_row() -> None:
    process = Restarts(Ended("1"), Ended("2"), Ended("3", stable_seconds=61.0), Ended("4"), None)
    assert await process.supervisor.supervise(process.run_once) is None
    assert [delay for _, delay in process.announced] == [1.0, 2.0, 1.0, 2.0]


async def test_a_stop_ends_the_wait_for_a_restart() -> None:
    stop, policy = asyncio.Event(), RestartPolicy(Backoff((3600.0,)))
    supervisor = Supervisor(policy, lambda _why, _delay: stop.set())

    async def end() -> Ended:
        return Ended("at once")

    async with asyncio.timeout(10):
        assert await supervisor.supervise(end, stop) is None
        assert await supervisor.supervise(end, stop) is None, "nothing is started after the stop"


async def test_an_error_of_a_run_ends_the_supervision() -> None:
    async def fail() -> Ended:
        raise RuntimeError("no such key")

    with pytest.raises(RuntimeError, match="no such key"):
        await Restarts().supervisor.supervise(fail)


def test_a_thread_supervises_in_the_same_way() -> None:
    process, stop = Restarts(Ended("1"), Ended("2"), Ended("3")), threading.Event()
    assert process.supervisor.supervise_blocking(process.run_once_blocking, stop) == Ended("3")
    assert process.clock.delays == [1.0, 2.0]
    stop.set()
    assert process.supervisor.supervise_blocking(process.run_once_blocking, stop) is None
