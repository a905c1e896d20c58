"""Detects that another program has removed the run's directory, the journal's folder or a segment.

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
CHECK_SECONDS = 2.0


class DirectoryMonitor:
    def __init__(self, disk: FileSystem, journal: Journal, snapshots: SnapshotStore, run_dir: Path) -> None:
        self._disk = disk
        self._journal = journal
        self._snapshots = snapshots
        self._folders = {folder: _inode(folder) for folder in (run_dir, journal.folder)}
        self._reported: set[int] = set()

    async def monitor_forever(self, request_snapshot: Callable[[], None]) -> None:
        """Check every few seconds. Raises RunError: the run's files are gone."""
        while True:
            await asyncio.sleep(CHECK_SECONDS)
            self.check_directories(request_snapshot)

    def check_directories(self, request_snapshot: Callable[[], None]) -> None:
        """Check once, as `monitor_forever`."""
        for folder, inode in self._folders.items():
            if _is_replaced(folder, inode):
                raise RunError(
                    f"The directory {folder} was removed or replaced while the run went on, and with it what was written there; "
                    "restore it from a copy, or begin a new run.dir."
                )
        if gone := self._missing_segments() - self._reported:
            self._reported |= gone
            log.error(
                "the journal's segment %s was removed by another program; a snapshot of the run replaces it",
                segment_path(self._journal.folder, min(gone)),
            )
            request_snapshot()

    def _missing_segments(self) -> set[int]:
        """The segments that a restart would read and that are not there."""
        try:
            first = next(iter(self._snapshots.snapshot_numbers()), 1)
            return set(range(first, self._journal.segment_number + 1)) - set(segment_numbers(self._disk, self._journal.folder))
        except (OSError, JournalError):  # a disk that fails for now: the journal says so
            return set()


def _inode(path: Path) -> tuple[int, int]:
    found = path.stat()
    return found.st_dev, found.st_ino


def _is_replaced(path: Path, inode: tuple[int, int]) -> bool:
    """Whether ``path`` is another directory than before, or gone."""
    try:
        return _inode(path) != inode
    except (FileNotFoundError, NotADirectoryError):
        return True
    except OSError:  # a disk that fails for now: the journal says so
        return False
