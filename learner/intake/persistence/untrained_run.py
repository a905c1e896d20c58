"""A run that has trained nothing yet may still become another: it begins anew, and what it has leased is set aside.

Leases that are out, answers and positions mean something only under what the run was when it began
(`treegrpo/config/fingerprint.py`). As long as no step was made nothing else hangs on them. They are moved into `untrained` of
their folder, which may be a disk of its own, and replace what an earlier beginning has left there.
"""

from __future__ import annotations

import logging
import re
import shutil
from pathlib import Path

from learner.intake.persistence.recovery import JOURNAL, SNAPSHOTS
from treegrpo.config.fingerprint import changes, check_fingerprint
from treegrpo.config.schema import Config
from treegrpo.storage.atomic import sync_path
from treegrpo.storage.run_files import JsonLinesFile, unusable_file_error

log = logging.getLogger(__name__)
ASIDE = "untrained"
PROGRESS = "progress.jsonl"
FILES = (PROGRESS, "set_aside.jsonl")
FOLDERS = ("checkpoints", JOURNAL, SNAPSHOTS)
"""In the order in which they are emptied: a start after a crash in between finds the journal with the snapshots, or neither."""
STEP = re.compile(r"(?:step-|\d+\.)(\d+)\b")
"""In the name of a checkpoint, damaged or not, and of a policy version."""


def is_untrained(run_dir: Path) -> bool:
    """Whether no step was made: there is neither a checkpoint, nor a policy version, nor a record of one. Raises RunFileError."""
    names = [path.name for folder in ("checkpoints", "weights") for path in (run_dir / folder).glob("[!.]*")]
    if any(int(found[1]) for name in names if (found := STEP.match(name))):
        return False
    return not any(row.get("kind") == "step" for row in JsonLinesFile(run_dir / PROGRESS).read_new_rows())


def check_resumable(config: Config) -> str:
    """That the run in ``run.dir`` can go on as what it is told to be; empty, or what changes since nothing was trained.

    Raises ConfigError and DataError as `check_fingerprint`.
    """
    if is_untrained(config.run.dir):
        return ", ".join(changes(config))
    check_fingerprint(config)
    return ""


def archive_untrained_run(config: Config) -> bool:
    """Set aside what a run has that was begun as another and has trained nothing; whether there was such a one.

    Raises:
        ConfigError, DataError: as `check_fingerprint`: it is another, and has trained.
        RunFileError: something cannot be set aside.
    """
    if not (changed := check_resumable(config)):
        return False
    try:
        _set_aside(config.run.dir)
    except OSError as error:
        raise unusable_file_error(Path(error.filename or config.run.dir), error) from error
    log.warning("nothing was trained yet, so the run begins anew as what it is told to be now: %s", changed)
    return True


def _set_aside(run_dir: Path) -> None:
    for name in FOLDERS:
        if (folder := run_dir / name).is_dir():
            _empty(folder)
    for name in FILES:
        if (path := run_dir / name).exists():
            path.replace(run_dir / f"{name}.{ASIDE}")


def _empty(folder: Path) -> None:
    """Move what is in ``folder`` into `ASIDE` within, durably."""
    aside = folder / ASIDE
    shutil.rmtree(aside, ignore_errors=True)
    entries = list(folder.iterdir())
    aside.mkdir()
    for entry in entries:
        entry.rename(aside / entry.name)
    sync_path(folder)
