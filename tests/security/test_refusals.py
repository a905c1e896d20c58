"""What a log has of those who are refused."""

from __future__ import annotations

import logging
from asyncio import sslproto
from collections.abc import Generator

import pytest

from treegrpo.observability import rate_limited_log
from treegrpo.observability.rate_limited_log import (
    AGAIN_SECONDS,
    LINES,
    REMEMBERED,
    WINDOW_SECONDS,
    RateLimitedLog,
    rate_limit_library_logs,
)

log = logging.getLogger("of.the.test")


class Clock:
    now = 1000.0

    def __call__(self) -> float:
        return self.now


def test_a_refusal_is_said_once_for_a_peer_and_reason_and_again_after_an_hour(caplog: pytest.LogCaptureFixture) -> None:
    clock = Clock()
    book = RateLimitedLog(log, clock)
    for _ in range(5):
        book.log_refusal("a", "hello", "it is no name")
    book.log_refusal("a", "role", "it may not")
    book.log_refusal("b", "hello", "it is no name")
    clock.now += AGAIN_SECONDS
    book.log_refusal("a", "hello", "it is no name")
    assert [record.getMessage() for record in caplog.records] == [
        "refused a: it is no name",
        "refused a: it may not",
        "refused b: it is no name",
        "refused a: it is no name (4 more since it was said last)",
    ]


def test_many_strangers_do_not_fill_the_log_either(caplog: pytest.LogCaptureFixture) -> None:
    clock = Clock()
    book = RateLimitedLog(log, clock)
    for number in range(3 * REMEMBERED):
        book.log_refusal(f"peer {number}", "hello", "it is no name")
    assert len(caplog.records) == LINES
    clock.now += WINDOW_SECONDS + 1
    book.log_refusal("one more", "hello", "it is no name")
    assert len(caplog.records) == LINES + 1
    assert len(book._said) <= REMEMBERED  # pyright: ignore[reportPrivateUsage]


@pytest.fixture
def handler() -> Generator[logging.Handler]:
    made = logging.NullHandler()
    logging.getLogger().addHandler(made)
    yield made
    logging.getLogger().removeHandler(made)


def test_what_a_library_complains_about_is_said_now_and_then(handler: logging.Handler, monkeypatch: pytest.MonkeyPatch) -> None:
    rate_limit_library_logs("library")
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
    monkeypatch.setattr(rate_limited_log, "AGAIN_SECONDS", 0.0)
    again = passes("library.part", 7)
    assert again is not None
    assert again.getMessage() == "about x (1 more like it since)"


def test_a_connection_costs_little_before_it_has_shown_anything() -> None:
    assert sslproto.SSLProtocol.max_size == 32 << 10
