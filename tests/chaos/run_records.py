"""Reads the records of a run from outside: the journal's events, the progress file, checkpoints.

The intake drops segments of its journal that snapshots cover. The archive links each as it appears, so that the audit
has all events since the run began.
"""

from __future__ import annotations

import io
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from learner.intake.wal.filesystem import LocalFileSystem
from learner.intake.wal.framing import Record
from learner.intake.wal.segments import SUFFIX, SegmentReader

Row = dict[str, Any]


class _WholeFileDisk(LocalFileSystem):
    """Reads a file at one moment: a segment may be written to meanwhile."""

    def open(self, path: Path) -> BinaryIO:
        return io.BytesIO(path.read_bytes())


class JournalArchive:
    def __init__(self, journal: Path, folder: Path) -> None:
        """Keep in ``folder``, on the same file system, what appears in ``journal``."""
        self._journal = journal
        self._folder = folder
        folder.mkdir(parents=True)

    def link_new_segments(self) -> None:
        """Link the segments that are new."""
        for path in self._journal.glob(f"*{SUFFIX}"):
            kept = self._folder / path.name
            try:
                if not kept.exists():
                    os.link(path, kept)
            except FileNotFoundError:  # dropped between the two: it was linked before, or `SegmentReader` will miss it
                continue

    def events(self) -> Iterator[Record]:
        """All events since the run began. Raises JournalError: one is missing or damaged."""
        self.link_new_segments()
        yield from SegmentReader(_WholeFileDisk(), self._folder)


def read_rows(path: Path) -> list[Row]:
    """The whole lines of a JSONL file, none if it is not there."""
    if not path.exists():
        return []
    data = path.read_bytes()
    return [json.loads(line) for line in data[: data.rfind(b"\n") + 1].splitlines()]


def steps_written(progress: Path) -> int:
    """Step records in the progress file, orphaned ones included."""
    return sum(row["kind"] == "step" for row in read_rows(progress))


def trained_position(checkpoints: Path) -> int:
    """The position of the newest checkpoint, 0 if there is none."""
    newest = max((path for path in checkpoints.glob("step-*/progress.json") if not path.parent.suffix), default=None)
    return json.loads(newest.read_text())["position"] if newest else 0
