"""Log lines of every process: as text, or with LOG_FORMAT=json in the environment as one JSON object a line.

    {"time": "2026-05-01T10:00:00.123Z", "level": "INFO", "logger": "learner.intake.service", "message": "…"}

`exception` holds a traceback, where there is one. The variable is no configuration key, since it has to be known before the
configuration is read: what is wrong with that is said in the same format.
"""

from __future__ import annotations

import json
import logging
import os
import sys
from datetime import UTC, datetime
from types import TracebackType

VARIABLE = "LOG_FORMAT"


def as_json() -> bool:
    """Whether lines are JSON."""
    return os.environ.get(VARIABLE, "text") == "json"


def to_stderr(level: int = logging.INFO, who: str = "") -> None:
    """Log to standard error from now on, each message with ``who`` before it; a second call changes nothing."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(
        JsonLines(who) if as_json() else logging.Formatter(f"%(asctime)s %(levelname)s %(name)s: {who}%(message)s")
    )
    logging.basicConfig(level=level, handlers=[handler])
    if as_json():  # so that nothing else is said on the side
        logging.captureWarnings(True)
        sys.excepthook = _log_uncaught


class JsonLines(logging.Formatter):
    """A record as one line of JSON."""

    def __init__(self, who: str = "") -> None:
        super().__init__()
        self._who = who

    def format(self, record: logging.LogRecord) -> str:
        row = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z"),
            "level": record.levelname,
            "logger": record.name,
            "message": self._who + record.getMessage(),
        }
        if record.exc_info:
            row["exception"] = self.formatException(record.exc_info)
        return json.dumps(row, ensure_ascii=False)


def _log_uncaught(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    logging.getLogger(__name__).critical("the process ends: %s", error, exc_info=(kind, error, trace))
