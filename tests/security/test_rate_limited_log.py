"""Rate-limited logs: refusals of peers, lines of libraries, lines of any kind."""

from __future__ import annotations

import logging
from asyncio import sslproto
from collections.abc import Generator

import pytest

from tests.manual_clock import ManualClock
from treegrpo.observability.rate_limited_log import (
    AGAIN_SECONDS,
    LINES,
    REMEMBERED,
    WINDOW_SECONDS,
    LineBudget,
    RateLimitedLog,
    rate_limit_library_logs,
)

pytestmark = pytest.mark.pure

log = logging.getLogger("of.the.test")


def test_a_refusal_is_logged_once_a_peer_and_reason_and_hour(caplog: pytest.LogCaptureFixture) -> None:
    clock = ManualClock(1000.0)
    limited = RateLimitedLog(log, clock.monotonic)
    for _ in range(5):
        limited.log_refusal("a", "hello", "it is no name")
    limited.log_refusal("a", "role", "it may not")
    limited.log_refusal("b", "hello", "it is no name")
    clock.advance(AGAIN_SECONDS)
    limited.log_refusal("a", "hello", "it is no name")
    assert [record.getMessage() for record in caplog.records] == [
        "refused a: it is no name",
        "refused a: it may not",
        "refused b: it is no name",
        "refused a: it is no name (4 more since the last line)",
    ]


def test_many_strangers_do_not_fill_the_log(caplog: pytest.LogCaptureFixture) -> None:
    clock = ManualClock(1000.0)
    limited = RateLimitedLog(log, clock.monotonic)
    for number in range(3 * REMEMBERED):
        limited.log_refusal(f"peer {number}", "hello", "it is no name")
    assert len(caplog.records) == LINES
    clock.advance(WINDOW_SECONDS + 1)
    limited.log_refusal("one more", "hello", "it is no name")
    assert len(caplog.records) == LINES + 1
    assert len(limited._logged) <= REMEMBERED  # pyright: ignore[reportPrivateUsage]


@pytest.fixture
def handler() -> Generator[logging.Handler]:
    made = logging.NullHandler()
    logging.getLogger().addHandler(made)
    yield made
    logging.getLogger().removeHandler(made)


def test_a_line_of_a_library_is_logged_once_an_hour(handler: logging.Handler) -> None:
    clock = ManualClock()
    rate_limit_library_logs("library", clock=clock.monotonic)
    (quiet,) = handler.filters
    assert isinstance(quiet, logging.Filter)

    def passes(name: str, line: int) -> logging.LogRecord | None:
        record = logging.LogRecord(name, logging.WARNING, "file.py", line, "about %s", ("x",), None)
        return record if quiet.filter(record) else None

    assert passes("library.part", 7)
    assert not passes("library.part", 7)
    assert passes("library.part", 8)
    assert passes("ours", 7)
    assert passes("ours", 7)
    clock.advance(AGAIN_SECONDS)
    again = passes("library.part", 7)
    assert again is not None
    assert again.getMessage() == "about x (1 more like it since)"


def test_a_line_budget_counts_what_it_drops() -> None:
    clock = ManualClock()
    budget = LineBudget(clock.monotonic)
    assert [budget.allow_line() for _ in range(LINES + 2)] == [True] * LINES + [False] * 2
    assert budget.take_dropped() == 0, "the window is not over"
    clock.advance(WINDOW_SECONDS + 1)
    assert budget.allow_line()
    assert [budget.take_dropped(), budget.take_dropped()] == [2, 0]


def test_a_connection_costs_little_before_it_has_shown_anything() -> None:
    assert sslproto.SSLProtocol.max_size == 32 << 10
