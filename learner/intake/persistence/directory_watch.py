"""Notices that another program has removed what a running intake has written: its directory, its journal, a segment.

the run's directory or the journal's folder is gone   ─► the run ends: what is written from then on is in no file
a segment that a restart would need is gone           ─► a snapshot of the state in memory takes its place
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from pathlib import Path

from learner.intake.persistence.snapshot import SnapshotStore
from learner.intake.wal.filesystem import FileSystem
from learner.intake.wal.journal import Journal
from learner.intake.wal.segments import segment_numbers, segment_path
from treegrpo.errors import JournalError, RunError

log = logging.getLogger(__name__)
LOOK_SECONDS = 2.0


class DirectoryMonitor:
    def __init__(self, disk: FileSystem, journal: Journal, snapshots: SnapshotStore, run_dir: Path) -> None:
        self._disk = disk
        self._journal = journal
        self._snapshots = snapshots
        self._folders = {folder: _inode(folder) for folder in (run_dir, journal.folder)}
        self._told: set[int] = set()

    async def run_forever(self, snapshot: Callable[[], None]) -> None:
        """Look now and then; ``snapshot`` asks for one. Raises RunError: what the run writes is in no file any more."""
        while True:
            await asyncio.sleep(LOOK_SECONDS)
            self.look(snapshot)

    def look(self, snapshot: Callable[[], None]) -> None:
        """Look once, as `run_forever`."""
        for folder, inode in self._folders.items():
            if _is_another(folder, inode):
                raise RunError(
                    f"The directory {folder} was removed or replaced while the run went on, and with it what was written there; "
                    "restore it from a copy, or begin a new run.dir."
                )
        if gone := self._missing() - self._told:
            self._told |= gone
            log.error(
                "the journal's segment %s was removed by another program; a snapshot of the run takes its place",
                segment_path(self._journal.folder, min(gone)),
            )
            snapshot()

    def _missing(self) -> set[int]:
        """The segments that a restart would read and that are not there."""
        try:
            first = next(iter(self._snapshots.numbers()), 1)
            return set(range(first, self._journal.segment_number + 1)) - set(segment_numbers(self._disk, self._journal.folder))
        except (OSError, JournalError):  # a disk that fails for now: the journal says so
            return set()


def _inode(path: Path) -> tuple[int, int]:
    found = path.stat()
    return found.st_dev, found.st_ino


def _is_another(path: Path, inode: tuple[int, int]) -> bool:
    """Whether what is at ``path`` now is not what was there."""
    try:
        return _inode(path) != inode
    except (FileNotFoundError, NotADirectoryError):
        return True
    except OSError:  # a disk that fails for now: the journal says so
        return False
