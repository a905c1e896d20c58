"""Keeps the journal short: a snapshot whenever a checkpoint of the trainer stands, then what it makes superfluous goes."""

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
        """``folder`` is the journal's; ``capture`` tells the state that everything appended so far has led to."""
        self._disk = disk
        self._folder = folder
        self._journal = journal
        self._snapshots = snapshots
        self._capture = capture
        self._asked = asyncio.Event()

    def ask(self) -> None:
        """There may be something to forget."""
        self._asked.set()

    async def run_forever(self) -> None:
        """Snapshot whenever it was asked for, one at a time.

        A disk without room for one is logged. The next checkpoint asks again, and by then there is less to keep.
        """
        while True:
            await self._asked.wait()
            self._asked.clear()
            state = self._capture()
            begun = self._journal.start_segment()  # in the same breath: what is appended from here on is not in the state
            number = await begun
            try:
                await asyncio.to_thread(self.compact, number, state)
            except OSError as error:
                log.error("no snapshot before segment %d (%s); the journal stays as it is", number, error.strerror or error)  # noqa: TRY400

    def compact(self, number: int, state: StateCapture) -> None:
        """Write the snapshot before segment ``number`` and drop what it makes superfluous. Raises OSError.

        One that would not fit is not begun: what room there is the journal needs more.
        """
        if self._disk.free_bytes(self._folder) < state.bytes:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        self._snapshots.write(number, state.records())
        drop_segments(self._disk, self._folder, before=self._snapshots.prune())
