"""Archives the files of a run that has not trained yet, so that it can begin again with another configuration.

Open leases, answers and positions are valid only for the configuration that the run began with
(`treegrpo/config/fingerprint.py`). Until the first step nothing else depends on them. They are moved into `untrained` in
their own folder, which may be on another disk, and replace what an earlier archive has left there.
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
ARCHIVE = "untrained"
PROGRESS = "progress.jsonl"
FILES = (PROGRESS, "set_aside.jsonl")
FOLDERS = ("checkpoints", JOURNAL, SNAPSHOTS)
"""In this order: a start after a crash in between finds the journal with the snapshots, or neither."""
STEP = re.compile(r"(?:step-|\d+\.)(\d+)\b")
"""In the name of a checkpoint, damaged or not, and of a policy version."""


def is_untrained(run_dir: Path) -> bool:
    """Whether no step was made: there is neither a checkpoint, nor a policy version, nor a record of one. Raises RunFileError."""
    names = [path.name for folder in ("checkpoints", "weights") for path in (run_dir / folder).glob("[!.]*")]
    if any(int(found[1]) for name in names if (found := STEP.match(name))):
        return False
    return not any(row.get("kind") == "step" for row in JsonLinesFile(run_dir / PROGRESS).read_new_rows())


def check_resumable(config: Config) -> str:
    """Check that the run in ``run.dir`` may continue with this configuration.

    Returns a text with the changed fields if nothing was trained yet; else an empty string.

    Raises ConfigError and DataError as `check_fingerprint`.
    """
    if is_untrained(config.run.dir):
        return ", ".join(changes(config))
    check_fingerprint(config)
    return ""


def archive_untrained_run(config: Config) -> bool:
    """Archive an untrained run if its configuration has changed; whether it has.

    Raises:
        ConfigError, DataError: as `check_fingerprint`: it has changed, and the run has trained.
        RunFileError: a file cannot be moved.
    """
    if not (changed := check_resumable(config)):
        return False
    try:
        _archive_files(config.run.dir)
    except OSError as error:
        raise unusable_file_error(Path(error.filename or config.run.dir), error) from error
    log.warning("nothing was trained yet, so the run begins again with the new configuration: %s", changed)
    return True


def _archive_files(run_dir: Path) -> None:
    for name in FOLDERS:
        if (folder := run_dir / name).is_dir():
            _archive_folder(folder)
    for name in FILES:
        if (path := run_dir / name).exists():
            path.replace(run_dir / f"{name}.{ARCHIVE}")


def _archive_folder(folder: Path) -> None:
    """Move the contents of ``folder`` into its subfolder `ARCHIVE`, durably."""
    archive = folder / ARCHIVE
    shutil.rmtree(archive, ignore_errors=True)
    entries = list(folder.iterdir())
    archive.mkdir()
    for entry in entries:
        entry.rename(archive / entry.name)
    sync_path(folder)
