"""The segments of the journal on the disk: journal/00000001.log and on, numbered without a gap.

A segment begins with a frame of its own, which says at which byte the one before it ends:

    {"format": 1, "segment": 7, "after": 73812}

What stands behind that byte there was never acknowledged (a write failed, or a crash tore it) and is not read. So a
segment is never written to again once it is left, whatever happened to it, and only the end of the last one has to be
found out by reading.
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
from learner.intake.wal.framing import BrokenFrameError, Record, follows, read_frame
from treegrpo.errors import JournalError

log = logging.getLogger(__name__)
FORMAT = 1
SUFFIX = ".log"
SINGLE_FILE_JOURNAL = "journal.msgpack"
_SEGMENT = re.compile(r"([0-9]{8,})" + re.escape(SUFFIX))


@dataclass(frozen=True, slots=True)
class JournalEnd:
    """Where a journal ends: the next segment's number, and the bytes that count of the one before."""

    number: int = 1
    after: int = 0


def segment_path(folder: Path, number: int) -> Path:
    return folder / f"{number:08d}{SUFFIX}"


def numbers(disk: FileSystem, folder: Path) -> list[int]:
    """The segments that are there. Raises JournalError at a journal of an earlier version."""
    names = disk.names(folder)
    if SINGLE_FILE_JOURNAL in names:
        raise JournalError(
            f"The journal {folder / SINGLE_FILE_JOURNAL} is of an earlier version of treegrpo, which kept one file; "
            "finish that run with that version, or set run.dir to another directory."
        )
    return [int(match[1]) for name in names if (match := _SEGMENT.fullmatch(name))]  # what else is there is not ours


def drop(disk: FileSystem, folder: Path, before: int) -> None:
    """Remove the segments before a number, the oldest first. Raises OSError."""
    for number in numbers(disk, folder):
        if number < before:
            disk.remove(segment_path(folder, number))
    disk.sync_folder(folder)


class SegmentReader:
    """The records from segment ``first`` on, one frame in memory at a time; when they are read through, `end` is known."""

    def __init__(self, disk: FileSystem, folder: Path, first: int = 1) -> None:
        self._disk = disk
        self._folder = folder
        self._first = first
        self.end = JournalEnd(first)

    def __iter__(self) -> Iterator[Record]:
        """Raises JournalError: a segment is missing, damaged or cannot be read."""
        try:
            starts = self._starts()
            for number, stop in zip(starts, [*list(starts.values())[1:], None], strict=False):
                with self._disk.open(path := segment_path(self._folder, number)) as file:
                    good = yield from _records(file, path, stop)
                self.end = JournalEnd(number + 1, good)
            self._settle()
        except JournalError:
            raise
        except OSError as error:
            reason = error.strerror or error
            raise JournalError(f"The journal {self._folder} cannot be read ({reason}); mend that and start again.") from error

    def _settle(self) -> None:
        """What the last segment was read to have is on the disk now.

        Its writer may have been killed between write and fsync. What is acknowledged from here on counts on it.
        """
        if self.end.number > self._first:
            self._disk.sync(segment_path(self._folder, self.end.number - 1))
            self._disk.sync_folder(self._folder)

    def _starts(self) -> dict[int, int]:
        """The segments to read, each with the end of the one before, as its first frame says."""
        there = [number for number in numbers(self._disk, self._folder) if number >= self._first]
        if missing := set(range(self._first, max(there, default=self._first - (self._first == 1)) + 1)) - set(there):
            path = segment_path(self._folder, min(missing))
            raise JournalError(f"The journal's segment {path} is missing; restore it, or begin a new run.dir.")
        starts: dict[int, int] = {}
        for number in there:
            with self._disk.open(path := segment_path(self._folder, number)) as file:
                try:
                    starts[number] = _header(file, path, number)
                except BrokenFrameError as broken:
                    begun = number != there[-1] or number == self._first > 1  # a snapshot is written after its segment
                    if begun or follows(file, 0, broken.end):
                        raise _damaged(path, 0) from None
                    log.warning("segment %s was torn by a crash before anything was acknowledged in it", path)
        return starts


def _header(file: BinaryIO, path: Path, number: int) -> int:
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


def _records(file: BinaryIO, path: Path, stop: int | None) -> Generator[Record, None, int]:
    """The records up to byte ``stop``, or to the last whole frame of the last segment; returns where that is."""
    read_frame(file)
    good = file.tell()
    while good != stop:
        try:
            records = read_frame(file)
        except BrokenFrameError as broken:
            if stop is not None or follows(file, good, broken.end):
                raise _damaged(path, good) from None
            lost = file.seek(0, os.SEEK_END) - good
            log.warning(
                "left out the last %d bytes of %s, which hold no whole commit: a crash has torn one that was not acknowledged "
                "yet, or the disk has damaged one that was",
                *(lost, path),
            )
            break
        if records is None and stop is not None:
            raise _damaged(path, good)
        if records is None:
            break
        yield from records
        good = file.tell()
    return good


def _damaged(path: Path, place: int) -> JournalError:
    return JournalError(
        f"The journal's segment {path} is damaged at byte {place}, amid what was acknowledged; restore that file from a "
        "copy, or begin a new run.dir from the last checkpoint (model.path)."
    )
