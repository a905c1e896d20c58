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

log = logging.getLogger(__name__)
WAITING_LINES = 1000


class ProgressFile:
    def __init__(self, path: Path) -> None:
        """Go on with the file at ``path``, if there is one; a line that a crash has torn is cut off."""
        self._path = path
        self._lines: deque[str] = deque(maxlen=WAITING_LINES)
        self._had: set[Hashable] = set()
        if path.is_file():
            self._read()

    def _read(self) -> None:
        whole = 0
        with self._path.open("rb") as file:
            for line in file:
                if line.endswith(b"\n"):
                    whole += len(line)
                    with contextlib.suppress(ValueError):  # somebody else's line; readers say so
                        self._had.add(_name(json.loads(line)))
        if whole < self._path.stat().st_size:
            os.truncate(self._path, whole)

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
        size = self._path.stat().st_size if self._path.exists() else 0
        try:
            with self._path.open("ab", buffering=0) as file:
                while written := file.write(data):
                    data = data[written:]
        except OSError as error:
            with contextlib.suppress(OSError):
                os.truncate(self._path, size)
            log.warning("%s takes no line (%s); %d wait", self._path, error.strerror, len(self._lines))
        else:
            self._lines.clear()


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
