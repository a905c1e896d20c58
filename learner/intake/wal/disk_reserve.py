"""The disk reserve: preallocated space for the journal, so that current leases can finish on a full disk.

    room  ─► reserved ─► the disk is full ─► released to the journal: subtrees come in, and groups get their positions,
      ▲                                      but nothing is granted
      └────────────── there is room again ───┘

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
CHECK_SECONDS = 5.0
NAME = "reserve"
"""A file of this name beside the segments, since the journal may have a disk of its own."""


class DiskReserve:
    def __init__(self, disk: FileSystem, journal: Journal, check_seconds: float = CHECK_SECONDS) -> None:
        """``check_seconds``: between attempts to allocate a released reserve again."""
        self._disk = disk
        self._journal = journal
        self._check_seconds = check_seconds
        self._path = journal.folder / NAME
        self._held = False
        journal.on_disk_full = self.release_reserve

    async def maintain_forever(self) -> None:
        """Allocate the reserve, and allocate it again after it was released."""
        try:
            while True:
                if not self._held:
                    self._held = await asyncio.to_thread(self._try_preallocate)
                    self._report_space()
                await asyncio.sleep(self._check_seconds)
        finally:
            if self._held:
                self._remove_file()

    def _try_preallocate(self) -> bool:
        """Allocate the reserve if twice its size is free: otherwise the disk would be full again at once."""
        with contextlib.suppress(OSError):
            names = self._disk.list_names(self._path.parent)
            if NAME in names or self._disk.free_bytes(self._path.parent) >= 2 * RESERVE_BYTES:
                self._disk.preallocate(self._path, RESERVE_BYTES)
                return True
        return False

    def release_reserve(self) -> bool:
        """Free the reserve; False if it is free already."""
        if not self._held:
            return False
        self._remove_file()
        self._report_space()
        return True

    def _remove_file(self) -> None:
        self._held = False
        with contextlib.suppress(OSError):
            self._disk.remove_path(self._path)

    def _report_space(self) -> None:
        """Log a change, and set in the journal whether leases may be granted."""
        since = self._journal.low_space_since
        if self._held and since is not None:
            log.info("there is room on the disk again, after %.0f s", time.monotonic() - since)
            self._journal.set_low_space(None)
        elif not self._held and since is None:
            log.error(
                "The disk of %s has no %d MiB to spare: results of open leases are kept, but nothing is granted until it has; "
                "free space on it.",
                *(self._path.parent, 2 * RESERVE_BYTES >> 20),
            )
            self._journal.set_low_space(time.monotonic())
