"""The run's progress file: one JSON line for each step, evaluation and group set aside.

What is said again after a restart, of either half of the learner, is not written again: the file itself says what it has.
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
WAITING_LINES = 1000


class ProgressLog:
    def __init__(self, path: Path) -> None:
        """Go on with the file at ``path``, if there is one; a line that a crash has torn is cut off. Raises RunFileError."""
        self._path = path
        self._lines: deque[str] = deque(maxlen=WAITING_LINES)
        self._had: set[Hashable] = set()
        self._begun = self._read()

    def _read(self) -> bool:
        """Learn what the file has; whether that is anything. Raises RunFileError."""
        lines = JsonLinesFile(self._path)
        for row in lines.read_new_rows():
            try:
                self._had.add(_name(row))
            except TypeError:  # a list where a name should be
                lines.skip_line("its name is none")
        if lines.skipped_summary:
            log.warning("%s", lines.skipped_summary)
        with contextlib.suppress(FileNotFoundError):
            if lines.complete_bytes < self._path.stat().st_size:
                os.truncate(self._path, lines.complete_bytes)
        return lines.complete_bytes > 0

    def add(self, row: Mapping[str, object]) -> bool:
        """Append a line; False if it is there already. Those that a full disk does not take wait for the next one."""
        name = _name(row)
        if name is not None and name in self._had:
            return False
        self._had.add(name)
        self._lines.append(json.dumps({"time": round(time.time(), 3), **row}) + "\n")
        self._write()
        return True

    def _write(self) -> None:
        data = "".join(self._lines).encode()
        size: int | None = None
        try:
            with self._path.open("ab", buffering=0) as file:
                size = file.tell()
                if self._begun and not size and self._path.is_file():
                    log.warning("%s was removed or emptied by another program: what it had is lost, and it goes on", self._path)
                if size and not _ends_whole(self._path):
                    data = b"\n" + data  # somebody has torn our last line, or added to it
                while written := file.write(data):
                    data = data[written:]
        except OSError as error:
            with contextlib.suppress(OSError):
                if size is not None:
                    os.truncate(self._path, size)
            log.warning("%s takes no line (%s); %d wait", self._path, error.strerror, len(self._lines))
        else:
            self._begun = True
            self._lines.clear()


def _ends_whole(path: Path) -> bool:
    """Whether a file that is not empty ends with the end of a line. Raises OSError."""
    with path.open("rb") as file:
        file.seek(-1, os.SEEK_END)
        return file.read(1) == b"\n"


def _name(row: Mapping[str, object]) -> Hashable:
    """What two records of the same thing have in common; None for what may happen again."""
    match row.get("kind"):
        case "step":  # a version is made once, since a trainer that starts again begins a new lineage
            return "step", row.get("step"), row.get("version"), row.get("position")
        case "eval":
            return "eval", row.get("version")
        case "set_aside":
            return "set_aside", row.get("lease")
        case _:
            return None
