"""Lossy standard output and error: a write never fails; what cannot be written is dropped, and that is recorded.

A full disk, a reader that has gone (`| head`) or does not read, a terminal that was closed, an encoding without the letter:
each would raise or block in `print` or a log call. `make_streams_lossy` replaces the streams by ones that do not.
"""

from __future__ import annotations

import errno
import io
import os
import select
import sys
from typing import Any, TextIO, cast

STREAMS = (("stdout", 1), ("stderr", 2))
BLOCKED_SECONDS = 5.0
"""The longest wait for the reader of a full pipe, or for a stopped terminal."""


class LossyFile(io.RawIOBase):
    """Raw writable file of a descriptor; a write never fails."""

    def __init__(self, number: int, blocked_seconds: float = BLOCKED_SECONDS) -> None:
        super().__init__()
        self._blocked_seconds = blocked_seconds
        self.number = number
        self.lost: OSError | None = None
        """The error of the first write that was dropped."""
        self._stuck = False
        """The last write timed out after ``blocked_seconds``; until one succeeds, writes do not wait."""

    def writable(self) -> bool:
        return True

    def fileno(self) -> int:
        return self.number

    def isatty(self) -> bool:
        return os.isatty(self.number)

    def write(self, data: Any) -> int:
        rest = memoryview(data).cast("B")
        size = len(rest)
        try:
            while rest:
                rest = rest[self._write(rest) :]
        except OSError as error:
            self.lost = self.lost or error
        return size

    def _write(self, data: memoryview) -> int:
        ready = select.poll()
        ready.register(self.number, select.POLLOUT)
        if not ready.poll(0 if self._stuck else 1000 * self._blocked_seconds):
            self._stuck = True
            raise BlockingIOError(errno.EAGAIN, "it is not read")
        self._stuck = False
        return os.write(self.number, data[: select.PIPE_BUF])  # a pipe with room has room for so much


def make_streams_lossy() -> None:
    """Replace standard output and error by lossy streams; closed ones become /dev/null."""
    _open_closed()
    for name, number in STREAMS:
        stream = cast("TextIO | None", getattr(sys, name))
        if stream is None:
            setattr(sys, name, _text(number, "utf-8"))
        elif _is_raw(stream, number):
            stream.flush()
            setattr(sys, name, _text(number, stream.encoding))


def lossy_file(stream: TextIO) -> LossyFile | None:
    """The file under a stream that `make_streams_lossy` has made."""
    raw = getattr(getattr(stream, "buffer", None), "raw", None)
    return raw if isinstance(raw, LossyFile) else None


def lost_output() -> str:
    """Why a part of standard output is lost; empty if none is, or if the reader closed the pipe."""
    sys.stdout.flush()
    file = lossy_file(sys.stdout)
    error = None if file is None else file.lost
    return "" if error is None or error.errno == errno.EPIPE else error.strerror or str(error)


def _text(number: int, encoding: str) -> TextIO:
    buffer = io.BufferedWriter(LossyFile(number))
    return io.TextIOWrapper(buffer, encoding=encoding, errors="replace", line_buffering=True)


def _is_raw(stream: TextIO, number: int) -> bool:
    """Whether a stream is Python's own, not the replacement of a test or notebook."""
    try:
        return lossy_file(stream) is None and isinstance(stream, io.TextIOWrapper) and stream.fileno() == number
    except (OSError, ValueError):
        return False


def _open_closed() -> None:
    """Open /dev/null for closed standard descriptors: the next opened file would get their numbers."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest number that is free
