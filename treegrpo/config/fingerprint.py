"""Run fingerprint: the settings and files that define a run, written when it begins, compared whenever it resumes.

A lease that is out, a group half rolled out and the position in the journal mean something only under the questions, the
seed, the plan and the batch they were made with; rewards and evaluations compare only under one environment. Everything
else may change from one start to the next: steps, learning rate, loss, estimator, staleness, checkpoints, addresses,
counts, engines, security. Of files the content counts, not where they lie. A run that has trained nothing yet may become
another (`learner/intake/persistence/untrained_run.py`).

The intake keeps this file, for it alone has the questions and decides which draw is which; the trainer and the command line
compare what they were told with it.
"""

from __future__ import annotations

import hashlib
import json
import logging
import secrets
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, cast

from treegrpo.config.schema import Config, RolloutConfig
from treegrpo.errors import ConfigError, DataError, RunFileError
from treegrpo.storage.atomic import partial_path, write_atomically
from treegrpo.storage.run_files import read_object, unusable_file_error

log = logging.getLogger(__name__)
FILE_NAME = "run.json"
ID = "run.id"
REMEDY = "restore it, or, if nothing has changed since the run began, remove it"
KEYS = (
    "run.seed",
    *(f"rollout.{key}" for key in RolloutConfig.model_fields),
    "train.batch",
    "eval.questions",
    "environment.reward",
    "environment.reward_shape",
    "environment.format_penalty",
    "environment.topk",
    "environment.max_observation_tokens",
)
MODEL, QUESTIONS = "model.path", ("data.train", "data.heldout")
TEXT = "text_sha256"
"""Of a model the second digest; an older run without one continues without it."""
WEIGHT_FILES = ("config.json", "tokenizer*", "*.safetensors")
"""Of a model, what decides what is computed."""
TEXT_FILES = (
    *("generation_config.json", "chat_template*", "additional_chat_templates/*", "special_tokens_map.json"),
    *("added_tokens.json", "vocab.*", "merges.txt", "*.model"),
)
"""And what decides, beside these, how text becomes tokens and which tokens end a turn."""
EDGE_BYTES = 1 << 20
"""Of a large file the size, the beginning and the end are looked at: fine-tuning leaves neither as it was."""

Fingerprint = Mapping[str, Any]
"""Key → value, or {path, sha256} of what lies there."""


def record_fingerprint(config: Config, *, begun: bool) -> str:
    """Record the fingerprint of the run in ``run.dir``, or, if it has ``begun``, check it; returns the run's id.

    The id is random, and made when the run begins: it distinguishes two runs of one run.name.

    Raises:
        ConfigError: it is another now.
        RunFileError: what was written is not what is there, or nothing can be written.
        DataError: a file cannot be read.
    """
    path = config.run.dir / FILE_NAME
    if begun and path.exists():
        check_fingerprint(config)
        return _id(path)
    _write(path, json.dumps({ID: secrets.token_hex(8), **_fingerprint(config, [*KEYS, MODEL, *QUESTIONS])}, indent=1))
    if begun:
        log.warning(
            "the run in %s was begun by an earlier version, which recorded no fingerprint; the present settings are recorded",
            config.run.dir,
        )
    return _id(path)


def check_fingerprint(config: Config, names: Iterable[str] = (*KEYS, MODEL, *QUESTIONS)) -> None:
    """Check that the run in ``run.dir`` has the fingerprint that it began with; without a record everything is accepted.

    Args:
        config: the present one.
        names: the keys to compare; those of files that this process does not have are left out.

    Raises:
        ConfigError: it is another.
        RunFileError: what was written is not what is there.
        DataError: a file cannot be read.
    """
    if found := changes(config, names):
        raise ConfigError(
            f"The run in run.dir = {config.run.dir} cannot resume with other settings: {', '.join(found)}. Set them back as they "
            "were, or begin a new run in another run.dir, with this run's last checkpoint as model.path to keep its training."
        )


def changes(config: Config, names: Iterable[str] = (*KEYS, MODEL, *QUESTIONS)) -> list[str]:
    """Settings and files of the run in ``run.dir`` that changed since it began, with both values; see `check_fingerprint`."""
    path = config.run.dir / FILE_NAME
    if not path.exists():
        return []
    now, then = _fingerprint(config, names), _read(path)
    if missing := [key for key in now if key not in then]:
        log.warning("%s does not record %s, so a change of it cannot be detected", path, ", ".join(missing))
    return [change for key in now if key in then for change in _changes(key, then[key], now[key])]


def _id(path: Path) -> str:
    """The run's id in the record at ``path``; the record's hash, for a run of an earlier version."""
    known = _read(path).get(ID)
    return known if isinstance(known, str) else hashlib.sha256(path.read_bytes()).hexdigest()[:16]


def _fingerprint(config: Config, names: Iterable[str]) -> Fingerprint:
    return {name: _value(config, name) for name in names}


def _value(config: Config, name: str) -> Any:
    section, _, key = name.partition(".")
    value = getattr(getattr(config, section), key)
    if not isinstance(value, Path):
        return value
    try:
        if name == MODEL:
            return {"path": str(value), "sha256": _digest(value, WEIGHT_FILES), TEXT: _digest(value, TEXT_FILES)}
        return {"path": str(value), "sha256": _content(value)}
    except OSError as error:
        raise DataError(f"{name} = {value} cannot be read ({error.strerror or error}); check the path.") from error


def _content(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _digest(folder: Path, patterns: Iterable[str]) -> str:
    """The digest of the files of a model directory that match ``patterns``."""
    found = hashlib.sha256()
    for path in sorted({path for pattern in patterns for path in folder.glob(pattern)}):
        size = path.stat().st_size
        found.update(f"{path.name} {size}\n".encode())
        with path.open("rb") as file:
            found.update(file.read(EDGE_BYTES))
            file.seek(max(0, size - EDGE_BYTES))
            found.update(file.read())
    return found.hexdigest()


def _changes(name: str, then: Any, now: Any) -> Iterator[str]:
    if not isinstance(now, dict):
        if then != now:
            yield f"{name} was {then} and is {now}"
    elif any(then[part] != now[part] for part in ("sha256", TEXT) if part in then and part in now):
        same = then["path"] == now["path"]
        yield f"{name} = {now['path']} has changed since" if same else f"{name} was {then['path']} and is {now['path']}"


def _read(path: Path) -> Fingerprint:
    found = read_object(path, REMEDY)
    for name in (MODEL, *QUESTIONS):
        entry = found.get(name, {"path": "", "sha256": ""})
        if not isinstance(entry, dict) or not {"path", "sha256"} <= cast("dict[str, Any]", entry).keys():
            raise RunFileError(f"{path} is not what was written there ({name} has no path and sha256); {REMEDY}.")
    return found


def _write(path: Path, text: str) -> None:
    """Replace ``path`` by a file with ``text``. Raises RunFileError."""
    try:
        write_atomically(path, text.encode())
    except OSError as error:
        partial = partial_path(path)
        raise unusable_file_error(partial if partial.is_dir() else path, error) from error
