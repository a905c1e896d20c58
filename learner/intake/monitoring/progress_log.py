"""The run's progress file: one JSON line for each step, evaluation and group set aside.

A record that is repeated after a restart, of the intake or the trainer, is not written again: the file says what it has.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import time
from collections import deque
from collections.abc import Hashable, Mapping
from pathlib import Path

from treegrpo.storage.run_files import JsonLinesFile

log = logging.getLogger(__name__)
MAX_BUFFERED_LINES = 1000


class ProgressLog:
    def __init__(self, path: Path) -> None:
        """Append to the file at ``path``, if there is one; a torn last line is cut off. Raises RunFileError."""
        self._path = path
        self._buffered: deque[str] = deque(maxlen=MAX_BUFFERED_LINES)
        self._recorded: set[Hashable] = set()
        self._is_begun = self._read_keys()

    def _read_keys(self) -> bool:
        """Read which records the file has; False if it has none. Raises RunFileError."""
        lines = JsonLinesFile(self._path)
        for row in lines.read_new_rows():
            try:
                self._recorded.add(_record_key(row))
            except TypeError:  # a list where a value should be
                lines.skip_line("it has no valid name")
        if lines.skipped_summary:
            log.warning("%s", lines.skipped_summary)
        with contextlib.suppress(FileNotFoundError):
            if lines.complete_bytes < self._path.stat().st_size:
                os.truncate(self._path, lines.complete_bytes)
        return lines.complete_bytes > 0

    def append_row(self, row: Mapping[str, object]) -> bool:
        """Append a line; False if the file has it already. Lines that a full disk refuses are written with the next one."""
        key = _record_key(row)
        if key is not None and key in self._recorded:
            return False
        self._recorded.add(key)
        self._buffered.append(json.dumps({"time": round(time.time(), 3), **row}) + "\n")
        self._flush_buffer()
        return True

    def _flush_buffer(self) -> None:
        data = "".join(self._buffered).encode()
        size: int | None = None
        try:
            with self._path.open("ab", buffering=0) as file:
                size = file.tell()
                if self._is_begun and not size and self._path.is_file():
                    log.warning(
                        "%s was removed or emptied by another program: its lines are lost, and new ones are appended", self._path
                    )
                if size and not _ends_with_newline(self._path):
                    data = b"\n" + data  # another program has torn our last line, or added to it
                while written := file.write(data):
                    data = data[written:]
        except OSError as error:
            with contextlib.suppress(OSError):
                if size is not None:
                    os.truncate(self._path, size)
            why, lines = error.strerror, len(self._buffered)
            log.warning("no line can be appended to %s (%s); %d lines are buffered", self._path, why, lines)
        else:
            self._is_begun = True
            self._buffered.clear()


def _ends_with_newline(path: Path) -> bool:
    """Whether a file that is not empty ends with a whole line. Raises OSError."""
    with path.open("rb") as file:
        file.seek(-1, os.SEEK_END)
        return file.read(1) == b"\n"


def _record_key(row: Mapping[str, object]) -> Hashable:
    """The key of a record that is written once; None for a kind that may repeat."""
    match row.get("kind"):
        case "step":  # a version is made once, since a trainer that starts again begins a new lineage
            return "step", row.get("step"), row.get("version"), row.get("position")
        case "eval":
            return "eval", row.get("version")
        case "set_aside":
            return "set_aside", row.get("lease")
        case _:
            return None
