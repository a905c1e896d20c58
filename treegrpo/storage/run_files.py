"""Files of a run's directory, which other programs may change: checks their kinds, and reads their JSON.

    run.json progress.jsonl set_aside.jsonl paused   files
    intake.lock up.lock                              files, held by a process
    intake.sock                                      a socket, while the intake serves
    journal/ snapshots/ weights/ checkpoints/ logs/  directories, or links to some

What is there and is something else is named before anything is started. Within a file a byte order mark and a torn last line
are passed over, and a line that is no record is left out and told of once.
"""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, cast

from treegrpo.errors import RunFileError, describe

FILES = ("run.json", "progress.jsonl", "set_aside.jsonl", "paused", "intake.lock", "up.lock", "journal/reserve")
FOLDERS = ("journal", "snapshots", "weights", "checkpoints", "logs")
SOCKETS = ("intake.sock",)
LINE_BYTES = 16 << 20
"""No line of ours is as long; of a longer one nothing is kept."""
_BOM = b"\xef\xbb\xbf"
Object = dict[str, Any]


def check_run_files(run_dir: Path) -> None:
    """Raise RunFileError if a file of a run's directory is a directory, or the other way round."""
    for names, kind, is_kind in (
        (FOLDERS, "a directory", stat.S_ISDIR),
        (FILES, "a file", stat.S_ISREG),
        (SOCKETS, "a socket", stat.S_ISSOCK),
    ):
        for name in names:
            check_kind(run_dir / name, kind, is_kind)


def check_kind(path: Path, kind: str, is_kind: Callable[[int], bool]) -> None:
    """Raise RunFileError if ``path`` exists and is not of this kind."""
    try:
        mode = path.stat().st_mode
    except FileNotFoundError:
        if path.is_symlink():
            raise RunFileError(
                f"{path} is a link to {path.readlink()}, which is not there; restore what it leads to, or remove it."
            ) from None
        return
    except OSError as error:
        raise unusable_file_error(path, error) from error
    if not is_kind(mode):
        found = next((word for word, test in _KINDS if test(mode)), "something else")
        raise RunFileError(f"{path} is {found}, and the run keeps {kind} there; move it away.")


_KINDS = (("a directory", stat.S_ISDIR), ("a file", stat.S_ISREG), ("a socket", stat.S_ISSOCK), ("a pipe", stat.S_ISFIFO))


def unusable_file_error(path: Path, error: OSError) -> RunFileError:
    """The RunFileError for an OSError at ``path``."""
    return RunFileError(f"{path} cannot be used ({error.strerror or error}); move that file away, or correct its owner.")


def read_object(path: Path, remedy: str) -> Object:
    """The JSON object in a file; ``remedy`` ends the sentence of an error.

    Raises:
        RunFileError: the file cannot be read, or holds something else.
    """
    try:
        return parse_object(path.read_bytes())
    except OSError as error:
        raise RunFileError(f"{path} cannot be read ({error.strerror or error}); {remedy}.") from error
    except ValueError as error:
        raise RunFileError(f"{path} is not what was written there ({describe(error)[:100]}); {remedy}.") from error


def parse_object(data: bytes) -> Object:
    """The JSON object in ``data``. Raises ValueError with a reason."""
    try:
        found: object = json.loads(data.removeprefix(_BOM))
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error
    if not isinstance(found, dict):
        raise ValueError(f"it is not a JSON object but {type(found).__name__}")  # noqa: TRY004 - one type for who reads
    return cast("Object", found)


class JsonLinesFile:
    """Reads the objects of a JSONL file that grows. Invalid lines are skipped and reported by `skipped_summary`."""

    def __init__(self, path: Path, line_bytes: int = LINE_BYTES) -> None:
        self._path = path
        self._line_bytes = line_bytes
        self._offset = 0
        self._line = 0
        self._wrong = 0
        self._first = ""

    def read_new_rows(self) -> Iterator[Object]:
        """The objects that were appended since the last call; an incomplete last line is read later.

        A file that has become shorter was written anew, and is read from its beginning.

        Raises:
            RunFileError: there is something that cannot be read. A file that is not there has no lines.
        """
        try:
            with self._path.open("rb") as file:
                if file.seek(0, os.SEEK_END) < self._offset:
                    self._offset = self._line = 0
                file.seek(self._offset)
                while line := self._whole_line(file):
                    try:
                        found = parse_object(line) if line.strip(b"\r\n\x00 " + _BOM) else None
                    except ValueError as error:
                        self.skip_line(describe(error)[:100])
                        continue
                    if found is not None:
                        yield found
        except FileNotFoundError:
            return
        except OSError as error:
            raise unusable_file_error(self._path, error) from error

    def _whole_line(self, file: Any) -> bytes:
        """The next complete line; empty if there is none yet."""
        piece: bytes = file.readline(self._line_bytes)
        line = piece
        while len(piece) == self._line_bytes and not piece.endswith(b"\n"):
            piece = file.readline(self._line_bytes)
            line = b"#" + piece[-1:]  # too long to be ours: only its end matters
        if not piece.endswith(b"\n"):  # the end of the file, where another process may be writing
            return b""
        self._offset = file.tell()
        self._line += 1
        return line

    @property
    def complete_bytes(self) -> int:
        """Bytes up to the end of the last complete line that was read."""
        return self._offset

    def skip_line(self, reason: str) -> None:
        """Count the last line as invalid."""
        self._wrong += 1
        self._first = self._first or f"line {self._line} is not a record ({reason})"

    @property
    def skipped_summary(self) -> str:
        """A sentence about the skipped lines; empty if there are none."""
        if not self._wrong:
            return ""
        count = "1 line is" if self._wrong == 1 else f"{self._wrong} lines are"
        return f"{self._path}: {self._first}; {count} left out, so another program has written there, or another version."
