"""What a directory's files were when it was written, so that damage is told from everything else that may go wrong.

Loading errors would not do. Weights are read without any checksum, so a bit that has turned is not noticed; and an error
while a checkpoint is loaded may as well come from another version of a library or another model, which is no reason to
set a good checkpoint aside.
"""

from __future__ import annotations

import hashlib
import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from treegrpo.errors import describe

NAME = "manifest.json"
DAMAGED = ".damaged"
"""Ends the name of a directory that is not as it was written, and was set aside."""
READERS = 4
"""Files that are read at a time: one thread hashes a gigabyte or two in a second."""
Entry = list[int | str]
"""Bytes and SHA-256 in hexadecimal."""


def write(folder: Path) -> None:
    """Note size and SHA-256 of every file below ``folder``. Raises OSError."""
    names = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    with ThreadPoolExecutor(READERS) as threads:
        entries = threads.map(_entry, [folder / name for name in names])
        (folder / NAME).write_text(json.dumps(dict(zip(names, entries, strict=True)), indent=1) + "\n", encoding="utf-8")


def exists(folder: Path) -> bool:
    return (folder / NAME).is_file()


def damage(folder: Path) -> str:
    """Which file of ``folder`` is not what it was and how, in words; empty if all are. What was added later does not count."""
    try:
        known: dict[str, Entry] = json.loads((folder / NAME).read_text(encoding="utf-8"))
        names = sorted(known, key=lambda name: (folder / name).is_file())  # what is missing is found without reading the rest
    except (OSError, ValueError, TypeError) as error:
        return f"{NAME} cannot be read: {describe(error)}"
    with ThreadPoolExecutor(READERS) as threads:
        found = threads.map(_difference, [folder / name for name in names], names, [known[name] for name in names])
        return next(filter(None, found), "")


def _difference(path: Path, name: str, then: Entry) -> str:
    try:
        size = path.stat().st_size
        if size != then[0]:
            return f"{name} has {size} bytes of {then[0]}"
        return "" if _entry(path) == then else f"{name} has another SHA-256 than when it was written"
    except FileNotFoundError:
        return f"{name} is missing"
    except OSError as error:
        return f"{name} cannot be read: {error.strerror}"


def _entry(path: Path) -> Entry:
    with path.open("rb") as file:
        return [path.stat().st_size, hashlib.file_digest(file, "sha256").hexdigest()]
