"""Manifest: sizes and SHA-256 of a directory's files as they were written, to detect damaged files.

Every directory of weights that a run writes has one: a checkpoint, a published policy version, the final model. Loading
errors would not do. Weights are read without any checksum, so a bit that has turned is not noticed; and an error while a
checkpoint is loaded may as well come from another version of a library or another model, which is no reason to set a good
checkpoint aside.

    trainer writes files, then manifest.json ─► intake compares, serves what it names ─► samplers compare what arrived
                                             └► compared before the directory is loaded
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from json import dumps
from pathlib import Path

from treegrpo.errors import ModelError, RunFileError
from treegrpo.storage.run_files import read_object

NAME = "manifest.json"
DAMAGED = ".damaged"
"""Suffix of a damaged directory that was renamed."""
READERS = 4
"""Files that are read at a time: one thread hashes a gigabyte or two in a second."""
LOADED = ("*.safetensors", "*.safetensors.index.json", "adapter_config.json")
"""Files that a library loads if they exist; one that is not in the manifest was added by another program."""
MODEL_FILES = ("config.json", "*.safetensors")
"""At least one file of each of these a manifest of weights names."""
_SHA256 = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True, slots=True)
class FileEntry:
    """A file as it was written."""

    size: int
    sha256: str
    """In hexadecimal."""


def write_manifest(folder: Path) -> None:
    """Note size and SHA-256 of every file below ``folder``. Raises OSError."""
    names = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    with ThreadPoolExecutor(READERS) as threads:
        entries = threads.map(_entry, [folder / name for name in names])
        rows = {name: [entry.size, entry.sha256] for name, entry in zip(names, entries, strict=True)}
        (folder / NAME).write_text(dumps(rows, indent=1) + "\n", encoding="utf-8")


def has_manifest(folder: Path) -> bool:
    return (folder / NAME).is_file()


def read_manifest(folder: Path, needed: Iterable[str] = MODEL_FILES) -> dict[str, FileEntry]:
    """The files of ``folder`` as they were written, by their names within it.

    Args:
        folder: a directory that was written with a manifest.
        needed: patterns of names, of each of which there has to be one.

    Raises:
        RunFileError: there is no manifest, it is not whole, or files are not named that a library would load.
    """
    found = read_object(folder / NAME, f"restore {folder}")
    entries = {name: entry for name, row in found.items() if (entry := _parsed(name, row)) is not None}
    if len(entries) < len(found) or not found:
        wrong = next((name for name in found if name not in entries), "it names no file")
        raise RunFileError(f"{folder / NAME} is not what was written there ({wrong}); restore {folder}.")
    for pattern in needed:
        if not any(Path(name).match(pattern) for name in entries):
            raise RunFileError(f"{folder / NAME} names no {pattern}, so it is not what was written there; restore {folder}.")
    there = {path.name for pattern in LOADED for path in folder.glob(pattern)}
    if added := sorted(there - entries.keys()):
        raise RunFileError(f"{folder / added[0]} was added to what was written; remove it.")
    return entries


def find_damage(folder: Path, needed: Iterable[str] = MODEL_FILES) -> str:
    """A sentence about a file of ``folder`` that has changed since it was written; empty if none has.

    Added files count only if a library would load them.
    """
    try:
        known = read_manifest(folder, needed)
    except RunFileError as error:
        return str(error).partition("; ")[0]
    names = sorted(known, key=lambda name: (folder / name).is_file())  # what is missing is found without reading the rest
    with ThreadPoolExecutor(READERS) as threads:
        found = threads.map(_difference, [folder / name for name in names], names, [known[name] for name in names])
        return next(filter(None, found), "")


def check_model_files(folder: Path) -> None:
    """Raise ModelError if ``folder`` is a model that a run has written, and a file has changed since.

    Other models have no manifest and cannot be checked.
    """
    if _is_ours(folder) and (reason := find_damage(folder)):
        raise ModelError(f"The model in {folder} is damaged ({reason}); take another, like a checkpoint of the same run.")


def _is_ours(folder: Path) -> bool:
    """Whether a file is a manifest of ours; other programs use the name too. An unreadable one may be half of ours."""
    if not has_manifest(folder):
        return False
    try:
        found = read_object(folder / NAME, "")
    except RunFileError:
        return True
    return any(_parsed(name, row) is not None for name, row in found.items())


def _parsed(name: str, row: object) -> FileEntry | None:
    """Parse a row of a manifest; None if it is invalid, or its path leaves the directory."""
    match row:
        case [int(size), str(sha256)] if _SHA256.fullmatch(sha256) and size >= 0 and not Path(name).is_absolute():
            return None if ".." in Path(name).parts else FileEntry(size, sha256)
        case _:
            return None


def _difference(path: Path, name: str, then: FileEntry) -> str:
    try:
        size = path.stat().st_size
        if size != then.size:
            return f"{name} has {size} bytes of {then.size}"
        return "" if _entry(path) == then else f"{name} has another SHA-256 than when it was written"
    except FileNotFoundError:
        return f"{name} is missing"
    except OSError as error:
        return f"{name} cannot be read: {error.strerror}"


def _entry(path: Path) -> FileEntry:
    with path.open("rb") as file:
        return FileEntry(path.stat().st_size, hashlib.file_digest(file, "sha256").hexdigest())
