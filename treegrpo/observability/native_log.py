"""Native log filter: what native code (gRPC) writes to standard error becomes log lines: escaped, truncated, rate-limited.

    gRPC ─► descriptor 2 ─► pipe ─► LINES a minute ─► the log

With GRPC_VERBOSITY gRPC writes a line for each failed handshake, with the unescaped server name that the client has sent: half
a megabyte in five seconds, without a certificate. A public server leaves it at NONE, or uses this filter.
"""

from __future__ import annotations

import atexit
import logging
import os
import sys
import threading

from treegrpo.observability.rate_limited_log import LineBudget
from treegrpo.observability.standard_streams import lossy_file

log = logging.getLogger(__name__)
LINE_BYTES = 1000
CHUNK = 65536
FLUSH_SECONDS = 2.0


def filter_native_log() -> None:
    """Redirect native code's standard error to the log. Call it after `log_setup.log_to_stderr`."""
    file = lossy_file(sys.stderr)
    if file is None:
        return
    file.number = os.dup(2)  # Python's own words go on to where they went
    os.set_inheritable(file.number, False)
    reading, writing = os.pipe()
    os.dup2(writing, 2)
    os.close(writing)
    thread = threading.Thread(target=_pass_on, args=(reading,), name="native-log", daemon=True)
    thread.start()
    atexit.register(_end, file.number, thread)


def _pass_on(reading: int) -> None:
    """Log the lines of the pipe until its other end is closed."""
    rest, budget = b"", LineBudget()
    while chunk := os.read(reading, CHUNK):
        *lines, rest = (rest + chunk).split(b"\n")
        rest = rest[:LINE_BYTES]
        for line in filter(None, lines):
            allowed = budget.allow_line()
            if dropped := budget.take_dropped():
                log.warning("native code wrote %d more lines, which were dropped", dropped)
            if allowed:
                log.warning("%s", line[:LINE_BYTES].decode(errors="replace"))


def _end(before: int, thread: threading.Thread) -> None:
    os.dup2(before, 2)  # the last writing end of the pipe is closed
    thread.join(FLUSH_SECONDS)
