"""What is refused is said once, not once a packet: a log is no place where a stranger may write as much as he likes."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass

REMEMBERED = 1024
"""Peers and reasons remembered."""
AGAIN_SECONDS = 3600.0
"""A refusal that goes on is said again after this, with how often there was one."""
WINDOW_SECONDS = 60.0
LINES = 60
"""Lines in a window, whoever they are about."""


@dataclass(slots=True)
class _Said:
    at: float
    since: int = 0
    """Refusals since then."""


class RateLimitedLog:
    """Says a refusal once for each peer and reason."""

    def __init__(self, log: logging.Logger, clock: Callable[[], float] = time.monotonic) -> None:
        self._log = log
        self._clock = clock
        self._said: dict[tuple[str, str], _Said] = {}
        self._window = 0.0
        self._lines = 0

    def log_refusal(self, peer: str, reason: str, sentence: str) -> None:
        """``peer`` without what changes from one connection to the next; ``reason`` is one of few."""
        now, key = self._clock(), (peer, reason)
        said = self._said.get(key)
        if said is not None and now - said.at < AGAIN_SECONDS:
            said.since += 1
            return
        if now - self._window > WINDOW_SECONDS:
            self._window, self._lines = now, 0
        self._lines += 1
        if self._lines > LINES:
            return
        more = f" ({said.since} more since it was said last)" if said is not None and said.since else ""
        self._log.warning("refused %s: %s%s", peer, sentence, more)
        self._said.pop(key, None)
        self._said[key] = _Said(now)
        while len(self._said) > REMEMBERED:
            del self._said[next(iter(self._said))]


class _LibraryLogFilter(logging.Filter):
    """Lets a line of a library's code pass once in AGAIN_SECONDS."""

    def __init__(self, libraries: tuple[str, ...]) -> None:
        super().__init__()
        self._libraries = libraries
        self._said: dict[tuple[str, int, str], _Said] = {}

    def filter(self, record: logging.LogRecord) -> bool:
        if record.name.partition(".")[0] not in self._libraries:
            return True
        error = record.exc_info[0] if record.exc_info else None  # what it is about, if many errors are said by one line
        now, key = time.monotonic(), (record.pathname, record.lineno, error.__name__ if error else "")
        said = self._said.setdefault(key, _Said(-AGAIN_SECONDS))
        if now - said.at < AGAIN_SECONDS:
            said.since += 1
            return False
        if said.since:
            record.msg, record.args = f"{record.getMessage()} ({said.since} more like it since)", ()
        self._said[key] = _Said(now)
        return True


def rate_limit_library_logs(*libraries: str) -> None:
    """Have what ``libraries`` complain about, which peers can make them do, in the log of this process now and then only."""
    for handler in logging.getLogger().handlers:
        handler.addFilter(_LibraryLogFilter(libraries))
