"""Framing: how records are laid out in the files of journal and snapshots.

    frame   head (16 bytes, little-endian) and body
    head    magic · length of the body · CRC-32 of the body · CRC-32 of the twelve bytes before
    body    msgpack array of records, each a map

A frame of the journal is a commit: the records that one fsync made durable. Nothing is written after a frame before it
is durable. Hence a broken frame with anything behind it that a later commit wrote has been damaged since. One that is the
last thing in its file is taken for torn by a crash, when none of its records was acknowledged; a disk that has damaged the
very last commit looks the same.
"""

from __future__ import annotations

import os
import struct
import zlib
from collections.abc import Iterable, Iterator
from typing import Any, BinaryIO, cast

import msgpack

from treegrpo.net.limits import MESSAGE_BYTES

MAX_RECORD_BYTES = MESSAGE_BYTES + (1 << 20)
"""A message, and the other fields of its record."""
BATCH_BYTES = 8 << 20
"""A frame takes no further record beyond this."""
MAX_BODY_BYTES = BATCH_BYTES + MAX_RECORD_BYTES
SCAN_BYTES = 1 << 20
_MAGIC = b"\xf4tgj"
_HEAD = struct.Struct("<4sII")
_SEAL = struct.Struct("<I")
HEAD_BYTES = _HEAD.size + _SEAL.size

Record = dict[str, Any]


class BrokenFrameError(Exception):
    """A frame is incomplete or damaged. Never leaves this package."""

    def __init__(self, end: int | None = None) -> None:
        """``end``: where the frame ends, if its head is intact."""
        super().__init__("a frame is broken")
        self.end = end


def encode_record(record: Record) -> bytes:
    """Encode a record with msgpack. Raises ValueError beyond MAX_RECORD_BYTES."""
    data = cast("bytes", msgpack.packb(record))
    if len(data) > MAX_RECORD_BYTES:
        raise ValueError(f"a record of {len(data)} bytes is larger than the limit of {MAX_RECORD_BYTES}")
    return data


def encode_frame(records: list[bytes]) -> bytes:
    """Make a frame of encoded records."""
    body = b"".join((cast("bytes", msgpack.Packer().pack_array_header(len(records))), *records))
    head = _HEAD.pack(_MAGIC, len(body), zlib.crc32(body))  # one call: each lets another thread run first
    return b"".join((head, _SEAL.pack(zlib.crc32(head)), body))


def split_into_frames(records: Iterable[bytes]) -> Iterator[list[bytes]]:
    """Split encoded records into lists that each make a frame."""
    batch: list[bytes] = []
    size = 0
    for record in records:
        batch.append(record)
        size += len(record)
        if size >= BATCH_BYTES:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def read_frame(file: BinaryIO) -> list[Record] | None:
    """Read the frame at the position of ``file``; None at the end of the file. Raises BrokenFrameError."""
    head = file.read(HEAD_BYTES)
    if not head:
        return None
    if len(head) < HEAD_BYTES or _SEAL.unpack_from(head, _HEAD.size)[0] != zlib.crc32(head[: _HEAD.size]):
        raise BrokenFrameError
    magic, length, checksum = _HEAD.unpack_from(head)
    if magic != _MAGIC or length > MAX_BODY_BYTES:
        raise BrokenFrameError
    end = file.tell() + length
    body = file.read(length)
    if len(body) < length or zlib.crc32(body) != checksum:
        raise BrokenFrameError(end)
    return cast("list[Record]", msgpack.unpackb(body, strict_map_key=False))


def has_later_commit(file: BinaryIO, broken: int, end: int | None) -> bool:
    """Whether a later commit follows the broken frame at ``broken``. ``end``: where it ends by its own head, if known."""
    if end is not None:
        return file.seek(0, os.SEEK_END) > end
    start, tail = broken + 1, b""
    while True:
        file.seek(start)
        data = tail + file.read(SCAN_BYTES)
        if len(data) == len(tail):
            return False
        position = -1
        while (position := data.find(_MAGIC, position + 1)) >= 0:
            file.seek(start - len(tail) + position)
            try:
                read_frame(file)
            except BrokenFrameError:
                continue
            return True
        start += len(data) - len(tail)
        tail = data[1 - len(_MAGIC) :]
