"""The segment files of the journal: journal/00000001.log and on, numbered without a gap.

A segment begins with a frame of its own, which says at which byte the one before it ends:

    {"format": 1, "segment": 7, "after": 73812}

Bytes behind it were never acknowledged (a write failed, or a crash tore it) and are not read. So a segment that was left is
never written to again, and only the end of the last one has to be found by reading: a torn tail there is cut off.
"""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Generator, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, cast

from learner.intake.wal.filesystem import FileSystem
from learner.intake.wal.framing import BrokenFrameError, Record, has_later_commit, read_frame
from treegrpo.errors import JournalError

log = logging.getLogger(__name__)
FORMAT = 1
SUFFIX = ".log"
SINGLE_FILE_JOURNAL = "journal.msgpack"
_SEGMENT = re.compile(r"([0-9]{8,})" + re.escape(SUFFIX))


@dataclass(frozen=True, slots=True)
class JournalEnd:
    """Where a journal ends: the next segment's number, and the durable bytes of the one before."""

    number: int = 1
    after: int = 0


def segment_path(folder: Path, number: int) -> Path:
    return folder / f"{number:08d}{SUFFIX}"


def segment_numbers(disk: FileSystem, folder: Path) -> list[int]:
    """The numbers of the segments in a folder. Raises JournalError at a journal of an earlier version."""
    names = disk.list_names(folder)
    if SINGLE_FILE_JOURNAL in names:
        raise JournalError(
            f"The journal {folder / SINGLE_FILE_JOURNAL} is of an earlier version of treegrpo, which kept one file; "
            "finish that run with that version, or set run.dir to another directory."
        )
    return [int(match[1]) for name in names if (match := _SEGMENT.fullmatch(name))]  # other files are not the journal's


def drop_segments(disk: FileSystem, folder: Path, before: int) -> None:
    """Remove the segments before number ``before``, the oldest first. Raises OSError."""
    for number in segment_numbers(disk, folder):
        if number < before:
            disk.remove_path(segment_path(folder, number))
    disk.sync_directory(folder)


class SegmentReader:
    """Iterates over the records from segment ``first`` on, one frame in memory at a time; sets `end` when all are read."""

    def __init__(self, disk: FileSystem, folder: Path, first: int = 1) -> None:
        self._disk = disk
        self._folder = folder
        self._first = first
        self.end = JournalEnd(first)

    def __iter__(self) -> Iterator[Record]:
        """Raises JournalError: a segment is missing, damaged or cannot be read."""
        try:
            starts = self._segment_starts()
            for number, stop in zip(starts, [*list(starts.values())[1:], None], strict=False):
                with self._disk.open_file(path := segment_path(self._folder, number)) as file:
                    good = yield from _read_records(file, path, stop)
                self.end = JournalEnd(number + 1, good)
            self._sync_last_segment()
        except JournalError:
            raise
        except OSError as error:
            reason = error.strerror or error
            raise JournalError(f"The journal {self._folder} cannot be read ({reason}); fix that and start again.") from error

    def _sync_last_segment(self) -> None:
        """Flush the last segment: its writer may have been killed between write and fsync.

        What is acknowledged from here on depends on it.
        """
        if self.end.number > self._first:
            self._disk.sync_file(segment_path(self._folder, self.end.number - 1))
            self._disk.sync_directory(self._folder)

    def _segment_starts(self) -> dict[int, int]:
        """The segments to read, each with the end of the one before, as its first frame says."""
        present = [number for number in segment_numbers(self._disk, self._folder) if number >= self._first]
        if missing := set(range(self._first, max(present, default=self._first - (self._first == 1)) + 1)) - set(present):
            path = segment_path(self._folder, min(missing))
            raise JournalError(f"The journal's segment {path} is missing; restore it, or begin a new run.dir.")
        starts: dict[int, int] = {}
        for number in present:
            with self._disk.open_file(path := segment_path(self._folder, number)) as file:
                try:
                    starts[number] = _read_header(file, path, number)
                except BrokenFrameError as broken:
                    begun = number != present[-1] or number == self._first > 1  # a snapshot is written after its segment
                    if begun or has_later_commit(file, 0, broken.end):
                        raise _damage_error(path, 0) from None
                    log.warning("segment %s was torn by a crash before anything was acknowledged in it", path)
        return starts


def _read_header(file: BinaryIO, path: Path, number: int) -> int:
    """The end of the segment before. Raises BrokenFrameError and JournalError."""
    records = read_frame(file)
    if records is None:
        raise BrokenFrameError
    if records[0].get("format") != FORMAT:
        raise JournalError(
            f"The journal's segment {path} is of format {records[0].get('format')}, and this version of treegrpo reads "
            f"{FORMAT}; continue the run with the version that wrote it."
        )
    if records[0]["segment"] != number:
        raise JournalError(f"{path} is segment {records[0]['segment']} under another name; restore the journal's folder.")
    return cast("int", records[0]["after"])


def _read_records(file: BinaryIO, path: Path, stop: int | None) -> Generator[Record, None, int]:
    """The records up to byte ``stop``, or to the last whole frame of the last segment; returns where that is."""
    read_frame(file)
    good = file.tell()
    while good != stop:
        try:
            records = read_frame(file)
        except BrokenFrameError as broken:
            if stop is not None or has_later_commit(file, good, broken.end):
                raise _damage_error(path, good) from None
            lost = file.seek(0, os.SEEK_END) - good
            log.warning(
                "left out the last %d bytes of %s, which hold no whole commit: a crash tore one that was not acknowledged yet, "
                "or the disk has damaged one that was",
                *(lost, path),
            )
            break
        if records is None and stop is not None:
            raise _damage_error(path, good)
        if records is None:
            break
        yield from records
        good = file.tell()
    return good


def _damage_error(path: Path, position: int) -> JournalError:
    return JournalError(
        f"The journal's segment {path} is damaged at byte {position}, amid what was acknowledged; restore that file from a "
        "copy, or begin a new run.dir from the last checkpoint (model.path)."
    )
