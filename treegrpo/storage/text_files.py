"""Reads text files: UTF-8, with or without a byte order mark; other encodings are named in the error."""

from __future__ import annotations

from pathlib import Path
from typing import TextIO

_OTHERS = {
    b"\xff\xfe\x00\x00": "begins with the byte order mark of UTF-32; save it as UTF-8",
    b"\x00\x00\xfe\xff": "begins with the byte order mark of UTF-32; save it as UTF-8",
    b"\xff\xfe": "begins with the byte order mark of UTF-16; save it as UTF-8",
    b"\xfe\xff": "begins with the byte order mark of UTF-16; save it as UTF-8",
    b"\x1f\x8b": "is compressed with gzip; unpack it",
}


def open_text(path: Path) -> TextIO:
    """Open a text file for reading; a byte order mark of UTF-8 is no part of its text.

    Raises:
        OSError: it cannot be opened.
        UnicodeError: it is of another encoding, or compressed. What is no UTF-8 otherwise raises its subclass when it is read.
    """
    with path.open("rb") as file:
        head = file.read(4)
    for mark, says in _OTHERS.items():
        if head.startswith(mark):
            raise UnicodeError(f"it {says}")
    return path.open(encoding="utf-8-sig")


def read_text(path: Path) -> str:
    """The whole text of a file; raises as `open_text`."""
    with open_text(path) as file:
        return file.read()
