"""The write-ahead log: every grant, accepted subtree and lease end, in order.

Records are appended in memory. One task writes them, and makes all that have come since its last commit durable with one
fsync (group commit); `append_record` returns a future that is done when its record is on the disk.

    a write fails   ─► truncate what is half written ─► try again, until it works
    an fsync fails  ─► leave the segment             ─► try again in a new one, until it works

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
from learner.intake.wal.framing import BATCH_BYTES, MAX_RECORD_BYTES, Record, encode_frame, encode_record
from learner.intake.wal.segments import FORMAT, JournalEnd, segment_path
from treegrpo.timing.backoff import Backoff
from treegrpo.timing.notifier import Notifier

log = logging.getLogger(__name__)
DISK_FULL_ERRNOS = (errno.ENOSPC, errno.EDQUOT)
BACKOFF = Backoff((0.1, 0.5, 1.0, 2.0, 5.0))
"""Between attempts while the disk refuses a write."""
GROUP_COMMIT_SECONDS = 0.01
"""From one commit to the next at least: the records that come meanwhile share the next fsync."""
BACKLOG_BYTES = 2 * MAX_RECORD_BYTES
"""Records may wait to be written up to this before `Journal.wait_for_capacity` makes their senders wait."""


@dataclass(frozen=True, slots=True, eq=False)
class PendingRecord:
    """A queued record, encoded, or a request for a new segment."""

    data: bytes | None
    """None: a new segment begins here."""
    done: asyncio.Future[int]
    """Gets the number of the segment that the record is in, or of the new one."""


async def wait_until_durable(done: asyncio.Future[int], deadline: float) -> bool:
    """Wait for a record to be on the disk; False when ``deadline`` (time.monotonic) comes first."""
    finished, _ = await asyncio.wait({done}, timeout=max(0.0, deadline - time.monotonic()))
    return bool(finished)


class Journal:
    def __init__(self, disk: FileSystem, folder: Path, end: JournalEnd, backoff: Backoff = BACKOFF) -> None:
        """Append after ``end``. ``backoff``: between attempts while writes fail."""
        self._disk = disk
        self.folder = folder
        self._number, self._durable_bytes = end.number - 1, end.after
        self._backoff = backoff
        self._file: WritableFile | None = None
        """None: the next commit begins a new segment."""
        self._pending: list[PendingRecord] = []
        self._wake = asyncio.Event()
        self._wake.set()
        self._commit_lock = threading.Lock()
        self._committed = Notifier()
        self._last: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        self._last.set_result(self._number)
        self.blocked_since: float | None = None
        """time.monotonic since when the disk refuses: nothing is acknowledged, and nothing should be granted."""
        self.low_space_since: float | None = None
        """time.monotonic since when the disk has no room to spare: nothing should be granted. See `disk_reserve.py`."""
        self.on_availability_change: Callable[[], None] = lambda: None
        """Called when any of the two changes."""
        self.on_disk_full: Callable[[], bool] = lambda: False
        """Called when there is no room; True if it has made some."""
        self.backlog_bytes = 0
        """Of records that wait to be written."""

    # ---- appending

    def append_record(self, record: Record | bytes) -> asyncio.Future[int]:
        """Queue a record, which may be encoded already; the future is done when it is durable."""
        data = record if isinstance(record, bytes) else encode_record(record)
        self.backlog_bytes += len(data)
        return self._enqueue(data)

    def start_segment(self) -> asyncio.Future[int]:
        """Write all records appended from now on to a new segment; its number, when what came before is durable."""
        return self._enqueue(None)

    def _enqueue(self, data: bytes | None) -> asyncio.Future[int]:
        self._last = asyncio.get_running_loop().create_future()
        self._pending.append(PendingRecord(data, self._last))
        self._wake.set()
        return self._last

    def durable_so_far(self) -> asyncio.Future[int]:
        """A future that is done when everything appended so far is durable."""
        return self._last

    async def wait_for_capacity(self) -> None:
        """Return when few enough bytes wait to be written: back-pressure for the streams of samplers."""
        while self.backlog_bytes > BACKLOG_BYTES:
            await self._committed.wait()

    # ---- committing

    async def commit_forever(self) -> None:
        """Commit queued records; retry with back-off while writes fail."""
        while True:
            await self._wake.wait()
            self._wake.clear()
            failures = 0
            while self.has_pending:
                try:
                    committed = await asyncio.to_thread(self.commit_next)
                except OSError as error:
                    if error.errno in DISK_FULL_ERRNOS and self.on_disk_full():
                        continue
                    self._log_blocked(error)
                    await asyncio.sleep(self._backoff.delay(failures))
                    failures += 1
                    continue
                if self.blocked_since is not None:
                    log.info("writes to the journal succeed again after %.1f s", time.monotonic() - self.blocked_since)
                    self._set_blocked(None)
                self.resolve_records(committed)
                await asyncio.sleep(GROUP_COMMIT_SECONDS)

    def _log_blocked(self, error: OSError) -> None:
        if not self.blocked:
            log.error(
                "The disk refuses the journal %s (%s): nothing is acknowledged or granted meanwhile; "
                "free space on it, or repair it.",
                *(self.folder, error.strerror or error),
            )
            self._set_blocked(time.monotonic())

    @property
    def has_pending(self) -> bool:
        """Whether there is something to commit."""
        return bool(self._pending) or self._file is None

    @property
    def segment_number(self) -> int:
        """The number of the current or last segment."""
        return self._number

    @property
    def blocked(self) -> bool:
        return self.blocked_since is not None

    def _set_blocked(self, since: float | None) -> None:
        self.blocked_since = since
        self.on_availability_change()

    def set_low_space(self, since: float | None) -> None:
        """Set since when the disk is low on space; None: it no longer is."""
        self.low_space_since = since
        self.on_availability_change()

    def resolve_records(self, committed: list[PendingRecord]) -> None:
        """Complete the futures of durable records. In the event loop, while `commit_next` may run in any thread."""
        for record in committed:
            self.backlog_bytes -= len(record.data or b"")
            record.done.set_result(self._number)
        self._committed.notify()

    def commit_next(self) -> list[PendingRecord]:
        """Make the next batch durable, or begin the next segment. A commit whose task is cancelled still counts, once.

        Raises OSError, and the records still wait.
        """
        with self._commit_lock:
            if self._file is None:
                self._create_segment()
            batch = self._next_batch()
            if batch and batch[0].data is None:
                self._create_segment()
            elif batch:
                self._write_frame(encode_frame([record.data for record in batch if record.data is not None]))
            del self._pending[: len(batch)]
        return batch

    def _next_batch(self) -> list[PendingRecord]:
        """The first request for a segment, or the records before it that make a frame."""
        batch: list[PendingRecord] = []
        size = 0
        for record in self._pending:
            if record.data is None or size >= BATCH_BYTES:
                return batch or [record]
            batch.append(record)
            size += len(record.data)
        return batch

    def _create_segment(self) -> None:
        """Begin the next segment; until it is durable the journal stays as it is."""
        path = segment_path(self.folder, self._number + 1)
        file = self._disk.create_file(path)
        try:
            header = {"format": FORMAT, "segment": self._number + 1, "after": self._durable_bytes}
            data = encode_frame([encode_record(header)])
            file.append_bytes(data)
            file.flush_to_disk()
            self._disk.sync_directory(self.folder)
        except OSError:
            file.close_file()
            raise
        if self._file is not None:
            self._file.close_file()
        self._file, self._number, self._durable_bytes = file, self._number + 1, len(data)

    def _write_frame(self, data: bytes) -> None:
        assert self._file is not None  # noqa: S101  # `commit_next` began one
        try:
            self._file.append_bytes(data)
        except OSError:
            self._truncate_or_leave(self._file)
            raise
        try:
            self._file.flush_to_disk()
        except OSError:
            self._leave_segment(self._file)
            raise
        self._durable_bytes += len(data)

    def _truncate_or_leave(self, file: WritableFile) -> None:
        """Truncate the segment after a failed write, or begin a new one if that fails too."""
        try:
            file.truncate_to(self._durable_bytes)
            file.flush_to_disk()
        except OSError:
            self._leave_segment(file)

    def _leave_segment(self, file: WritableFile) -> None:
        """Stop writing to this segment: the next commit begins a new one."""
        self._file = None
        with contextlib.suppress(OSError):  # only to give back room: the next segment says what counts of this one
            file.truncate_to(self._durable_bytes)
        file.close_file()

    # ---- lifetime

    @classmethod
    @contextlib.contextmanager
    def open_journal(cls, disk: FileSystem, folder: Path, end: JournalEnd, backoff: Backoff = BACKOFF) -> Generator[Journal]:
        """Open the journal after ``end`` for the time of the block; pending records are written at its end.

        `commit_forever` must run as a task meanwhile.
        """
        disk.make_directory(folder)
        journal = cls(disk, folder, end, backoff)
        try:
            yield journal
        finally:
            journal._commit_rest()

    def _commit_rest(self) -> None:
        try:
            while self._pending:
                self.commit_next()
        except OSError as error:
            count, reason = len(self._pending), error.strerror or error
            log.error("%d events are not in the journal %s (%s): none was acknowledged", count, self.folder, reason)  # noqa: TRY400
        if self._file is not None:
            self._file.close_file()
