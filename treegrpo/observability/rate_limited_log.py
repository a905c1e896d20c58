"""Rate-limited logging: no peer can fill the log, whatever it sends and however often.

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
"""A refusal that goes on is logged again after this, with how often there was one."""
WINDOW_SECONDS = 60.0
LINES = 60
"""Lines in a window, whoever they are about."""


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
        """How many lines were not allowed in the window before this one; 0 when asked again."""
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
        """``peer`` without what changes from one connection to the next; ``reason`` is one of few."""
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
    """Lets a line of a library's code pass once in AGAIN_SECONDS."""

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
    """Log each line of ``libraries``, which peers can make them write, once in AGAIN_SECONDS from now on in this process."""
    for handler in logging.getLogger().handlers:
        handler.addFilter(_LibraryLogFilter(libraries, clock))
