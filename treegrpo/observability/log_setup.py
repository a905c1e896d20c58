"""Logging setup of every process: lines of text, or with LOG_FORMAT=json in the environment one JSON object a line.

    {"time": "2026-05-01T10:00:00.123Z", "level": "INFO", "logger": "learner.intake.service", "message": "…"}

A record is one line; the lines of a traceback are indented, in JSON they are one string, `exception`. Whatever a message
quotes, nothing in it begins a line or reaches a terminal as a control character, and it is cut off after MESSAGE_CHARACTERS.

The variable is no configuration key, since it has to be known before the configuration is read: what is wrong with that is
said in the same format.
"""

from __future__ import annotations

import logging
import os
import sys
import threading
from datetime import UTC, datetime
from types import TracebackType

from treegrpo.observability.printable_text import clipped, printable, printable_json
from treegrpo.observability.standard_streams import lossy_file

VARIABLE = "LOG_FORMAT"
MESSAGE_CHARACTERS = 8192
TRACEBACK_CHARACTERS = 32768
INDENT = "    "
FORMAT = "%(asctime)s %(levelname)s %(name)s: "
BRIEF = "%(levelname)s "


def is_json_format() -> bool:
    """Whether lines are JSON."""
    return os.environ.get(VARIABLE, "text") == "json"


def log_to_stderr(level: int = logging.INFO, who: str = "", form: str = FORMAT) -> None:
    """Log to standard error, with ``who`` before each message; a second call changes nothing.

    In a process of ours all else that Python itself would say there goes to the log too: warnings, and what crashes.
    """
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonFormatter(who) if is_json_format() else TextFormatter(form, who))
    logging.basicConfig(level=level, handlers=[handler])
    if is_json_format() or lossy_file(sys.stderr) is not None:
        logging.captureWarnings(True)
        sys.excepthook = _log_uncaught
        threading.excepthook = _log_thread


class TextFormatter(logging.Formatter):
    """A record as one line of text, its traceback indented below."""

    def __init__(self, form: str = FORMAT, who: str = "") -> None:
        """``form`` is the format of a line before the message, ``who`` follows it."""
        super().__init__(form)
        self._who = who

    def format(self, record: logging.LogRecord) -> str:
        record.asctime = self.formatTime(record)
        head = printable(self._fmt % record.__dict__ if self._fmt else "")
        lines = [head + printable(clipped(self._who + record.getMessage(), MESSAGE_CHARACTERS))]
        if record.exc_info:
            trace = clipped(self.formatException(record.exc_info), TRACEBACK_CHARACTERS)
            lines += [INDENT + printable(line) for line in trace.split("\n")]
        return "\n".join(lines)


class JsonFormatter(logging.Formatter):
    """A record as one line of JSON."""

    def __init__(self, who: str = "") -> None:
        super().__init__()
        self._who = who

    def format(self, record: logging.LogRecord) -> str:
        row = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z"),
            "level": record.levelname,
            "logger": record.name,
            "message": clipped(self._who + record.getMessage(), MESSAGE_CHARACTERS),
        }
        if record.exc_info:
            row["exception"] = clipped(self.formatException(record.exc_info), TRACEBACK_CHARACTERS)
        return printable_json(row)


def _log_uncaught(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    logging.getLogger(__name__).critical("the process ends: %s", error, exc_info=(kind, error, trace))


def _log_thread(args: threading.ExceptHookArgs) -> None:
    error = args.exc_value
    if error is not None and not isinstance(error, SystemExit):
        name = args.thread.name if args.thread else "a thread"
        logging.getLogger(__name__).error("%s has crashed: %s", name, error, exc_info=error)
