"""The journal: every grant, accepted subtree and lease end, in the order they happened; the queue to the trainer.

Records are appended in memory and written by one task that makes everything that has come in since the last time
durable with one fsync (group commit); `append` returns a future that is done when its record is on the disk.

    a write fails   ─► cut back what is half there ─► try again, until it works
    an fsync fails  ─► leave the segment           ─► try again in a new one, until it works

Meanwhile nothing is acknowledged and nothing fails: the journal is *blocked*. A new segment, because after a failed
fsync the kernel may have dropped what it could not write and calls it clean: a second fsync of that file would report
success for bytes that are not there. The new one's first frame says up to where the old one counts.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import logging
import threading
import time
from collections.abc import Callable, Generator
from dataclasses import dataclass
from pathlib import Path

from learner.intake.wal.filesystem import FileSystem, WritableFile
from learner.intake.wal.framing import BATCH_BYTES, MAX_RECORD_BYTES, Record, encode, frame
from learner.intake.wal.segments import FORMAT, JournalEnd, segment_path
from treegrpo.timing.backoff import Backoff
from treegrpo.timing.notifier import Notifier

log = logging.getLogger(__name__)
FULL = (errno.ENOSPC, errno.EDQUOT)
BACKOFF = Backoff((0.1, 0.5, 1.0, 2.0, 5.0))
"""Between attempts while the disk refuses a write."""
GROUP_COMMIT_SECONDS = 0.01
"""From one commit to the next at least: what comes in meanwhile shares it, and an ack is no later than anybody minds."""
BACKLOG_BYTES = 2 * MAX_RECORD_BYTES
"""What may wait to be written before `room` makes peers wait."""


@dataclass(frozen=True, slots=True, eq=False)
class PendingRecord:
    """A record in line, or a cut."""

    data: bytes | None
    done: asyncio.Future[int]
    """Gets the number of the segment it is in, or that begins with the cut."""


async def wait_until_durable(done: asyncio.Future[int], deadline: float) -> bool:
    """Wait for a record to be on the disk; False when ``deadline`` (time.monotonic) comes first."""
    finished, _ = await asyncio.wait({done}, timeout=max(0.0, deadline - time.monotonic()))
    return bool(finished)


class Journal:
    def __init__(self, disk: FileSystem, folder: Path, end: JournalEnd, backoff: Backoff = BACKOFF) -> None:
        """Append after ``end``. ``backoff``: between attempts while the disk refuses."""
        self._disk = disk
        self.folder = folder
        self._number, self._good = end.number - 1, end.after
        self._backoff = backoff
        self._file: WritableFile | None = None
        """None: the next commit begins a new segment."""
        self._pending: list[PendingRecord] = []
        self._wake = asyncio.Event()
        self._wake.set()
        self._committing = threading.Lock()
        self._committed = Notifier()
        self._last: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        self._last.set_result(self._number)
        self.blocked_since: float | None = None
        """time.monotonic since when the disk refuses: nothing is acknowledged, and nothing should be granted."""
        self.short_since: float | None = None
        """time.monotonic since when the disk has no room to spare: nothing should be granted. See `disk_reserve.py`."""
        self.on_blocked: Callable[[], None] = lambda: None
        """Called when any of the two changes."""
        self.on_full: Callable[[], bool] = lambda: False
        """Called when there is no room; True if there is some now."""
        self.backlog = 0
        """Bytes that wait to be written."""

    def append(self, record: Record | bytes) -> asyncio.Future[int]:
        """Put a record in line, or one that is encoded already; the future is done when it is durable."""
        data = record if isinstance(record, bytes) else encode(record)
        self.backlog += len(data)
        return self._line_up(data)

    def cut(self) -> asyncio.Future[int]:
        """Everything appended from now on goes to a new segment; its number, when what came before is durable."""
        return self._line_up(None)

    def _line_up(self, data: bytes | None) -> asyncio.Future[int]:
        self._last = asyncio.get_running_loop().create_future()
        self._pending.append(PendingRecord(data, self._last))
        self._wake.set()
        return self._last

    def barrier(self) -> asyncio.Future[int]:
        """A future that is done when everything appended so far is durable."""
        return self._last

    async def room(self) -> None:
        """Return when little enough waits to be written: whoever feeds the journal waits here."""
        while self.backlog > BACKLOG_BYTES:
            await self._committed.wait()

    async def write_forever(self) -> None:
        """The committing task."""
        while True:
            await self._wake.wait()
            self._wake.clear()
            failures = 0
            while self.busy:
                try:
                    done = await asyncio.to_thread(self.commit)
                except OSError as error:
                    if error.errno in FULL and self.on_full():
                        continue
                    if not self.blocked:
                        log.error(  # noqa: TRY400 - one sentence is enough
                            "The disk refuses the journal %s (%s): nothing is acknowledged or granted until it takes it; "
                            "make room, or mend it.",
                            *(self.folder, error.strerror or error),
                        )
                        self._block(time.monotonic())
                    await asyncio.sleep(self._backoff.delay(failures))
                    failures += 1
                    continue
                if self.blocked_since is not None:
                    log.info("the disk takes the journal again, after %.1f s", time.monotonic() - self.blocked_since)
                    self._block(None)
                self.settle(done)
                await asyncio.sleep(GROUP_COMMIT_SECONDS)

    @property
    def busy(self) -> bool:
        """Whether there is something to commit."""
        return bool(self._pending) or self._file is None

    @property
    def number(self) -> int:
        """Of the segment that is written to, or was last."""
        return self._number

    @property
    def blocked(self) -> bool:
        return self.blocked_since is not None

    def _block(self, since: float | None) -> None:
        self.blocked_since = since
        self.on_blocked()

    def run_short(self, since: float | None) -> None:
        """The disk has no room to spare, or has some again."""
        self.short_since = since
        self.on_blocked()

    def settle(self, done: list[PendingRecord]) -> None:
        """Tell who waits for what is durable now. In the event loop; `commit` may be anywhere."""
        for entry in done:
            self.backlog -= len(entry.data or b"")
            entry.done.set_result(self._number)
        self._committed.notify()

    def commit(self) -> list[PendingRecord]:
        """Make the next batch durable, or the next cut, once: one that is under way when its task is cancelled counts.

        Raises OSError, and what was to be done is still in line.
        """
        with self._committing:
            if self._file is None:
                self._begin()
            batch = self._batch()
            if batch and batch[0].data is None:
                self._begin()
            elif batch:
                self._write(frame([entry.data for entry in batch if entry.data is not None]))
            del self._pending[: len(batch)]
        return batch

    def _batch(self) -> list[PendingRecord]:
        """The first cut, or the records before it that make a frame."""
        batch: list[PendingRecord] = []
        size = 0
        for entry in self._pending:
            if entry.data is None or size >= BATCH_BYTES:
                return batch or [entry]
            batch.append(entry)
            size += len(entry.data)
        return batch

    def _begin(self) -> None:
        """Begin the next segment; until it is durable the journal stays as it is."""
        path = segment_path(self.folder, self._number + 1)
        file = self._disk.create(path)
        try:
            header = frame([encode({"format": FORMAT, "segment": self._number + 1, "after": self._good})])
            file.write(header)
            file.sync()
            self._disk.sync_folder(self.folder)
        except OSError:
            file.close()
            raise
        if self._file is not None:
            self._file.close()
        self._file, self._number, self._good = file, self._number + 1, len(header)

    def _write(self, data: bytes) -> None:
        assert self._file is not None  # noqa: S101  # `_commit` began one
        try:
            self._file.write(data)
        except OSError:
            self._cut_back(self._file)
            raise
        try:
            self._file.sync()
        except OSError:
            self._leave(self._file)
            raise
        self._good += len(data)

    def _cut_back(self, file: WritableFile) -> None:
        """Take away what a failed write has left, or leave the segment if that fails too."""
        try:
            file.truncate(self._good)
            file.sync()
        except OSError:
            self._leave(file)

    def _leave(self, file: WritableFile) -> None:
        self._file = None
        with contextlib.suppress(OSError):  # only to give back room: the next segment says what counts of this one
            file.truncate(self._good)
        file.close()

    def _close(self) -> None:
        """Write what is still in line."""
        try:
            while self._pending:
                self.commit()
        except OSError as error:
            count, reason = len(self._pending), error.strerror or error
            log.error("%d events are not in the journal %s (%s): nobody was told of them", count, self.folder, reason)  # noqa: TRY400
        if self._file is not None:
            self._file.close()

    @classmethod
    @contextlib.contextmanager
    def open(cls, disk: FileSystem, folder: Path, end: JournalEnd, backoff: Backoff = BACKOFF) -> Generator[Journal]:
        """Append after ``end``; what is still in line is written at the end of the block.

        `write_forever` must run as a task meanwhile.
        """
        disk.make_folder(folder)
        journal = cls(disk, folder, end, backoff)
        try:
            yield journal
        finally:
            journal._close()
