"""Compacts the journal: writes a snapshot after each checkpoint of the trainer, then deletes the segments that it replaces."""

from __future__ import annotations

import asyncio
import errno
import logging
import os
from collections.abc import Callable
from pathlib import Path

from learner.intake.persistence.snapshot import SnapshotStore, StateCapture
from learner.intake.wal.filesystem import FileSystem
from learner.intake.wal.journal import Journal
from learner.intake.wal.segments import drop_segments

log = logging.getLogger(__name__)


class JournalCompactor:
    def __init__(
        self, disk: FileSystem, folder: Path, journal: Journal, snapshots: SnapshotStore, capture: Callable[[], StateCapture]
    ) -> None:
        """``folder`` is the journal's; ``capture`` returns the state after everything appended so far."""
        self._disk = disk
        self._folder = folder
        self._journal = journal
        self._snapshots = snapshots
        self._capture = capture
        self._requested = asyncio.Event()

    def request_snapshot(self) -> None:
        """Write a snapshot soon: the journal may get shorter, or has lost a segment."""
        self._requested.set()

    async def compact_forever(self) -> None:
        """Write a snapshot whenever one was requested, one at a time.

        A disk without room for one is logged. The next checkpoint requests another, and by then there is less to keep.
        """
        while True:
            await self._requested.wait()
            self._requested.clear()
            state = self._capture()
            begun = self._journal.start_segment()  # without an await between: records from here on are not in the state
            number = await begun
            try:
                await asyncio.to_thread(self.compact_journal, number, state)
            except OSError as error:
                log.error("no snapshot before segment %d (%s); the journal stays as it is", number, error.strerror or error)  # noqa: TRY400

    def compact_journal(self, number: int, state: StateCapture) -> None:
        """Write the snapshot before segment ``number`` and delete the segments that it replaces. Raises OSError.

        A snapshot that would not fit is not begun: the journal needs the room more.
        """
        if self._disk.free_bytes(self._folder) < state.size_bytes:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        self._snapshots.write_snapshot(number, state.iter_records())
        drop_segments(self._disk, self._folder, before=self._snapshots.prune_generations())
