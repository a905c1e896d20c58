"""Room on the disk that is kept for the journal, so that a full disk finds what is under way a place.

    room  ─► kept ─► the disk is full ─► given to the journal: what is out comes in, and groups get their positions,
      ▲                                  but nothing is granted
      └──────────── there is room again ─┘

Without it the trainer would not get groups that are ready and durable: the position of each is an event of the journal too.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time

from learner.intake.wal.filesystem import FileSystem
from learner.intake.wal.framing import BATCH_BYTES
from learner.intake.wal.journal import Journal

log = logging.getLogger(__name__)
RESERVE_BYTES = 2 * BATCH_BYTES
"""A commit that fills its frame, and as much again: two thousand branches of 1,500 tokens, or the positions of a long run."""
LOOK_SECONDS = 5.0
NAME = "reserve"
"""A file of this name beside the segments, since the journal may have a disk of its own."""


class DiskReserve:
    def __init__(self, disk: FileSystem, journal: Journal) -> None:
        self._disk = disk
        self._journal = journal
        self._path = journal.folder / NAME
        self._held = False
        journal.on_full = self.give

    async def keep_forever(self) -> None:
        """Keep it, and get it back when it was given."""
        try:
            while True:
                if not self._held:
                    self._held = await asyncio.to_thread(self._take)
                    self._tell()
                await asyncio.sleep(LOOK_SECONDS)
        finally:
            if self._held:
                self._free()

    def _take(self) -> bool:
        """Twice as much has to be free: a disk that has just this is full again in a moment."""
        with contextlib.suppress(OSError):
            there = self._disk.names(self._path.parent)
            if NAME in there or self._disk.free(self._path.parent) >= 2 * RESERVE_BYTES:
                self._disk.reserve(self._path, RESERVE_BYTES)
                return True
        return False

    def give(self) -> bool:
        """Free it; False if it is gone already."""
        if not self._held:
            return False
        self._free()
        self._tell()
        return True

    def _free(self) -> None:
        self._held = False
        with contextlib.suppress(OSError):
            self._disk.remove(self._path)

    def _tell(self) -> None:
        """Say so, and let leases be granted or not."""
        short = self._journal.short_since
        if self._held and short is not None:
            log.info("there is room on the disk again, after %.0f s", time.monotonic() - short)
            self._journal.run_short(None)
        elif not self._held and short is None:
            log.error(
                "The disk of %s has no %d MiB to spare: what is under way comes in, but nothing is granted before it has; "
                "make room.",
                *(self._path.parent, 2 * RESERVE_BYTES >> 20),
            )
            self._journal.run_short(time.monotonic())
