"""Rate-limited logging: no peer can fill the log.

RateLimitedLog           refusals of peers: once for each peer and reason in AGAIN_SECONDS
rate_limit_library_logs  lines of libraries: once for each line of their code in AGAIN_SECONDS
LineBudget               lines of any kind: LINES in WINDOW_SECONDS
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass

REMEMBERED = 1024
"""Peers and reasons remembered."""
AGAIN_SECONDS = 3600.0
"""A repeated refusal is logged again after this, with its count."""
WINDOW_SECONDS = 60.0
LINES = 60
"""Lines in a window, of all peers together."""


class LineBudget:
    """Counts log lines: LINES in WINDOW_SECONDS are allowed."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._window_began = clock() - 2 * WINDOW_SECONDS
        self._lines = 0
        self._dropped_lines = 0

    def allow_line(self) -> bool:
        """Whether one more line may be logged."""
        now = self._clock()
        if now - self._window_began > WINDOW_SECONDS:
            self._window_began, self._dropped_lines, self._lines = now, max(0, self._lines - LINES), 0
        self._lines += 1
        return self._lines <= LINES

    def take_dropped(self) -> int:
        """How many lines were dropped in the previous window; 0 at the next call."""
        dropped, self._dropped_lines = self._dropped_lines, 0
        return dropped


@dataclass(slots=True)
class _LastLogged:
    at: float
    suppressed: int = 0
    """Lines since then that were not logged."""


class RateLimitedLog:
    """Logs a refusal once for each peer and reason."""

    def __init__(self, log: logging.Logger, clock: Callable[[], float] = time.monotonic) -> None:
        self._log = log
        self._clock = clock
        self._logged: dict[tuple[str, str], _LastLogged] = {}
        self._budget = LineBudget(clock)

    def log_refusal(self, peer: str, reason: str, sentence: str) -> None:
        """``peer``: without parts that change between connections, such as the port; ``reason``: few values."""
        now, key = self._clock(), (peer, reason)
        last = self._logged.get(key)
        if last is not None and now - last.at < AGAIN_SECONDS:
            last.suppressed += 1
            return
        if not self._budget.allow_line():
            return
        more = f" ({last.suppressed} more since the last line)" if last is not None and last.suppressed else ""
        self._log.warning("refused %s: %s%s", peer, sentence, more)
        self._logged.pop(key, None)
        self._logged[key] = _LastLogged(now)
        while len(self._logged) > REMEMBERED:
            del self._logged[next(iter(self._logged))]


class _LibraryLogFilter(logging.Filter):
    """Log filter that passes each logging call of a library once in AGAIN_SECONDS."""

    def __init__(self, libraries: tuple[str, ...], clock: Callable[[], float]) -> None:
        super().__init__()
        self._libraries = libraries
        self._clock = clock
        self._logged: dict[tuple[str, int, str], _LastLogged] = {}

    def filter(self, record: logging.LogRecord) -> bool:
        if record.name.partition(".")[0] not in self._libraries:
            return True
        error = record.exc_info[0] if record.exc_info else None  # what it is about, if many errors are logged by one line
        now, key = self._clock(), (record.pathname, record.lineno, error.__name__ if error else "")
        last = self._logged.setdefault(key, _LastLogged(now - AGAIN_SECONDS))
        if now - last.at < AGAIN_SECONDS:
            last.suppressed += 1
            return False
        if last.suppressed:
            record.msg, record.args = f"{record.getMessage()} ({last.suppressed} more like it since)", ()
        self._logged[key] = _LastLogged(now)
        return True


def rate_limit_library_logs(*libraries: str, clock: Callable[[], float] = time.monotonic) -> None:
    """Rate-limit the log of ``libraries``, which peers can trigger: each logging call once in AGAIN_SECONDS."""
    for handler in logging.getLogger().handlers:
        handler.addFilter(_LibraryLogFilter(libraries, clock))
