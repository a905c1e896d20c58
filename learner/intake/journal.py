"""The journal: every grant, accepted subtree and lease end, in the order they happened; the queue to the trainer.

A record is a msgpack map behind its length and CRC-32 (4 bytes each, little-endian). Records are appended in memory
and written by one task that makes everything that has come in since the last time durable with one fsync (group
commit); `append` returns a future that is done when its record is on disk. A tail torn by a crash is cut off when the
journal is opened.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import struct
import threading
import zlib
from collections.abc import Generator
from pathlib import Path
from typing import IO, Any, cast

import msgpack

from treegrpo.errors import JournalError

log = logging.getLogger(__name__)
_HEAD = struct.Struct("<II")


def read(path: Path) -> tuple[list[dict[str, Any]], int]:
    """The whole records of a journal file and the number of bytes they take. Raises JournalError."""
    try:
        data = path.read_bytes() if path.exists() else b""
    except OSError as error:
        raise JournalError(f"The journal {path} cannot be read ({error.strerror}); mend that and start again.") from error
    records: list[dict[str, Any]] = []
    end = 0
    while end + _HEAD.size <= len(data):
        length, checksum = _HEAD.unpack_from(data, end)
        body = data[end + _HEAD.size : end + _HEAD.size + length]
        if len(body) < length or zlib.crc32(body) != checksum:
            break
        records.append(cast("dict[str, Any]", msgpack.unpackb(body)))
        end += _HEAD.size + length
    return records, end


class Journal:
    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self._pending: list[tuple[bytes, asyncio.Future[None]]] = []
        self._wake = asyncio.Event()
        self._committing = threading.Lock()
        self._last: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._last.set_result(None)

    def append(self, record: dict[str, Any]) -> asyncio.Future[None]:
        """Put a record in line; the future is done when it is durable, or fails with JournalError."""
        body = cast("bytes", msgpack.packb(record))
        done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._last = done
        self._pending.append((_HEAD.pack(len(body), zlib.crc32(body)) + body, done))
        self._wake.set()
        return done

    def barrier(self) -> asyncio.Future[None]:
        """A future that is done when everything appended so far is durable."""
        return self._last

    async def flushed(self) -> None:
        """Return when everything appended so far is durable."""
        await asyncio.shield(self._last)

    async def write_forever(self) -> None:
        """The committing task. Raises JournalError when the disk refuses; then nothing is acked any more."""
        while True:
            await self._wake.wait()
            self._wake.clear()
            try:
                durable = await asyncio.to_thread(self._commit)
            except OSError as error:
                failure = JournalError(
                    f"The journal {self._file.name} cannot be written ({error.strerror}); make room on the disk."
                )
                for _, done in self._pending:
                    done.set_exception(failure)
                raise failure from error
            for done in durable:
                done.set_result(None)

    def _commit(self) -> list[asyncio.Future[None]]:
        """Make what is pending durable, once: a commit that is under way when its task is cancelled still counts."""
        with self._committing:
            batch = self._pending[:]
            self._file.write(b"".join(frame for frame, _ in batch))
            self._file.flush()
            os.fsync(self._file.fileno())
            del self._pending[: len(batch)]
        return [done for _, done in batch]

    @classmethod
    @contextlib.contextmanager
    def open(cls, path: Path, size: int) -> Generator[Journal]:
        """Append to ``path`` after its first ``size`` bytes; what is still pending is written at the end.

        `write_forever` must run as a task meanwhile.
        """
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("ab") as file:
            if file.tell() > size:
                log.warning("cut %d bytes of a torn record off the journal %s", file.tell() - size, path)
                file.truncate(size)
            journal = cls(file)
            yield journal
            journal._commit()
