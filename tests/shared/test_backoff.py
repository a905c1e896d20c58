from __future__ import annotations

import threading

import pytest

from tests.manual_clock import ManualClock
from treegrpo.timing.backoff import Backoff

pytestmark = pytest.mark.pure


def low(least: float, _most: float) -> float:
    return least


def test_the_last_delay_is_repeated() -> None:
    retries = Backoff((0.1, 1.0, 5.0)).schedule(ManualClock())
    assert [retries.next_delay() for _ in range(5)] == [0.1, 1.0, 5.0, 5.0, 5.0]


def test_exponential_delays_double_up_to_the_longest() -> None:
    assert Backoff.exponential(0.1, 5.0).delays == pytest.approx((0.1, 0.2, 0.4, 0.8, 1.6, 3.2, 5.0))
    assert Backoff.exponential(0.0, 5.0).delays == (0.0,)
    assert Backoff.exponential(5.0, 5.0).delays == (5.0,)


def test_a_backoff_without_delays_is_refused() -> None:
    with pytest.raises(ValueError, match="needs a delay"):
        Backoff(())


def test_no_retry_after_the_last_one_until_a_success() -> None:
    retries = Backoff((0.1,), retries=2).schedule(ManualClock())
    assert [retries.next_delay() for _ in range(4)] == [0.1, 0.1, None, None]
    retries.reset()
    assert retries.next_delay() == 0.1


def test_the_last_delay_ends_at_the_deadline() -> None:
    clock, stop = ManualClock(), threading.Event()
    retries = Backoff((4.0,), seconds=10.0).schedule(clock)
    while retries.wait_event(stop):
        pass
    assert clock.delays == [4.0, 4.0, 2.0]
    assert (retries.elapsed, retries.remaining, retries.failures) == (10.0, 0.0, 3)


def test_jitter_shortens_a_delay() -> None:
    retries = Backoff((1.0, 2.0), jitter=0.5).schedule(ManualClock(), low)
    assert [retries.next_delay() for _ in range(3)] == [0.5, 1.0, 1.0]


def test_a_stop_ends_the_retries() -> None:
    clock, stop = ManualClock(), threading.Event()
    retries = Backoff((1.0,)).schedule(clock)
    stop.set()
    assert not retries.wait_event(stop)
    assert not clock.delays


def test_log_lines_come_at_ever_longer_intervals() -> None:
    clock = ManualClock()
    retries = Backoff((1.0,)).schedule(clock)
    logged: list[float] = []
    for _ in range(100):
        if retries.log_is_due():
            logged.append(clock.now)
        clock.advance(1.0)
    assert logged == [0.0, 10.0, 20.0, 40.0, 80.0]
