"""Checkpoints: the state from which a run continues as if it had not stopped, also with another number of ranks.

    checkpoints/step-000020/   a Hugging Face directory in float32
        state/                 moments of the optimiser and random states, by torch.distributed.checkpoint
        records.jsonl          of the steps since the checkpoint before, to be sent to the intake again
        progress.json          lineage, step, position
        manifest.json          size and SHA-256 of all of these; written last
        evaluation.json        held-out exact match, if it became known later
    checkpoints/step-000040.damaged/   one that was damaged; kept for inspection, never read

Weights stand in the Hugging Face files alone. Every rank writes its part of the moments and reads whatever part it needs
of all that was written. A checkpoint is there completely or not at all. The newest few are kept, and the best of those
that were evaluated.
"""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
import warnings
from collections.abc import Generator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from itertools import chain, count
from math import isfinite
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint import state_dict_loader, state_dict_saver
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.optim import Optimizer
from transformers import PreTrainedModel

from learner.trainer.distributed.ranks import SINGLE_RANK, Ranks
from learner.trainer.persistence.atomic_directory import replace_directory_on_ranks
from learner.trainer.persistence.disk_errors import translate_disk_errors
from learner.trainer.persistence.policy_versions import write_model
from treegrpo.core.step import PolicyVersion
from treegrpo.errors import DiskError, ModelError
from treegrpo.storage import manifest
from treegrpo.storage.atomic import write_atomically
from treegrpo.storage.run_files import parse_object, unusable_file_error

log = logging.getLogger(__name__)
MOMENTS = ("exp_avg", "exp_avg_sq")
"""AdamW's, besides its count of steps."""
PROGRESS, RECORDS, EVALUATION = "progress.json", "records.jsonl", "evaluation.json"
REQUIRED_FILES = (*manifest.MODEL_FILES, PROGRESS, ".metadata", "*.distcp")
"""Patterns of which the manifest of a checkpoint has to name at least one file each."""
_NAME = re.compile(r"step-(\d{6,})")
Record = dict[str, Any]
"""The record of a step; see `step_metrics.step_record`."""


@dataclass(frozen=True, slots=True)
class TrainingProgress:
    """The progress of training that a checkpoint records."""

    lineage: int = 0
    step: int = 0
    """Steps done."""
    position: int = 0
    """Groups done with: where in the intake's journal the next step begins."""
    em: float | None = None
    """Held-out exact match of this step's policy, if it was evaluated."""

    @property
    def version(self) -> PolicyVersion:
        return PolicyVersion(self.lineage, self.step)


def save_checkpoint(
    root: Path,
    progress: TrainingProgress,
    model: PreTrainedModel,
    optimizer: Optimizer,
    tokenizer_from: Path,
    keep: int,
    ranks: Ranks = SINGLE_RANK,
    records: Sequence[Record] = (),
) -> Path:
    """Write a checkpoint below ``root`` and remove those no longer kept; returns its directory. All ranks call it.

    Raises:
        DiskError: on all ranks, if the disk is full or fails for one of them; what there was is as it was.
    """
    folder = root / f"step-{progress.step:06d}"

    def write_descriptions(partial: Path) -> None:
        with translate_disk_errors(folder):
            (partial / RECORDS).write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
            (partial / PROGRESS).write_text(json.dumps(asdict(progress)) + "\n", encoding="utf-8")
            manifest.write_manifest(partial)

    with replace_directory_on_ranks(folder, ranks) as partial:
        write_model(model, partial, tokenizer_from, ranks=ranks)
        _write_state({**_moments(model, optimizer), **_random_state(ranks)}, partial / "state", folder, ranks)
        ranks.run_on_first(lambda: write_descriptions(partial))
    ranks.run_on_first(lambda: _remove_old_checkpoints(root, keep))
    return folder


def _write_state(state: dict[str, Tensor], into: Path, folder: Path, ranks: Ranks) -> None:
    try:
        with translate_disk_errors(folder), _without_group_warning():
            state_dict_saver.save(state, checkpoint_id=into)
    except DiskError as error:  # of any rank; the library has raised it on all
        ranks.raise_on_all(error)


def newest_checkpoint(root: Path) -> Path | None:
    """The newest undamaged checkpoint, None if there never was one. Damaged ones are renamed.

    One without a manifest counts as damaged: a crash interrupted its write, or another program wrote it.

    Raises:
        ModelError: there is none but damaged ones.
        RunFileError: one cannot be renamed.
    """
    for folder in reversed(_folders(root)):
        if not (reason := manifest.find_damage(folder, REQUIRED_FILES)):
            return folder
        aside = _rename_damaged(folder)
        log.warning(
            "the checkpoint %s is damaged (%s); it is renamed to %s, and the one before is used", folder, reason, aside.name
        )
    if damaged := sorted(root.glob(f"*{manifest.DAMAGED}")):
        raise ModelError(
            f"Every checkpoint in {root} is damaged, {damaged[-1].name} the newest; restore one under its name without "
            f"{manifest.DAMAGED}, or begin a new run.dir, from another checkpoint (model.path)."
        )
    return None


def read_training_progress(folder: Path) -> TrainingProgress:
    """The progress of a checkpoint's run. Raises ModelError."""
    try:
        return TrainingProgress(**parse_object((folder / PROGRESS).read_bytes()))
    except (OSError, ValueError, TypeError) as error:
        raise _broken_checkpoint(folder, error) from error


def read_records(folder: Path) -> list[Record]:
    """The records a checkpoint was written with; those of an earlier version of treegrpo have none. Raises ModelError."""
    if not (path := folder / RECORDS).exists():
        return []
    try:
        return [parse_object(line) for line in path.read_bytes().splitlines()]
    except (OSError, ValueError) as error:
        raise _broken_checkpoint(folder, error) from error


def write_evaluation(root: Path, progress: TrainingProgress) -> None:
    """Write the evaluation of an existing checkpoint's policy into it. Raises DiskError."""
    path = root / f"step-{progress.step:06d}" / EVALUATION
    with translate_disk_errors(path):
        write_atomically(path, (json.dumps({"em": progress.em}) + "\n").encode())


def restore_optimizer(folder: Path, model: PreTrainedModel, optimizer: Optimizer, ranks: Ranks = SINGLE_RANK) -> None:
    """Restore the optimiser and the random number generators. Raises ModelError. All ranks call it."""
    if not (folder / "state").exists() and (folder / "trainer.pt").exists():
        raise ModelError(
            f"The checkpoint {folder} is of an earlier version of treegrpo; begin a new run from it: --model.path {folder}."
        )
    random = _random_state(ranks)
    try:
        known = FileSystemReader(folder / "state").read_metadata().state_dict_metadata
        kept = {name: state for name, state in random.items() if name in known}
        with _without_group_warning():
            state_dict_loader.load({**_moments(model, optimizer), **kept}, checkpoint_id=folder / "state")
    except (Exception, CheckpointException) as error:  # a broken file surfaces as any of a dozen types
        raise _broken_checkpoint(folder, error) from error
    if len(kept) < len(random):
        log.warning("rank %d is new in this run: it starts with a new random state", ranks.rank)
    for name, state in kept.items():
        torch.set_rng_state(state) if name.startswith("cpu") else torch.cuda.set_rng_state(state, ranks.device)


def _moments(model: nn.Module, optimizer: Optimizer) -> dict[str, Tensor]:
    """AdamW's state of each parameter, by name, to be written or read into.

    Before its first step that is what AdamW itself would begin with. Learning rate and weight decay are the configuration's.
    """
    found: dict[str, Tensor] = {}
    for name, parameter in model.named_parameters():
        state = optimizer.state[parameter]
        if not state:
            state["step"] = torch.zeros((), device=parameter.device)
            state.update({moment: torch.zeros_like(parameter) for moment in MOMENTS})
        found |= {f"{name}.{key}": state[key].detach() for key in ("step", *MOMENTS)}
    return found


def _random_state(ranks: Ranks) -> dict[str, Tensor]:
    """By device and rank."""
    states = {f"cpu.{ranks.rank}": torch.get_rng_state()}
    if ranks.device.type == "cuda":
        states[f"cuda.{ranks.rank}"] = torch.cuda.get_rng_state(ranks.device)
    return states


@contextmanager
def _without_group_warning() -> Generator[None]:
    """Suppress the library's warning that there is no process group, which a lone process does not need."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled, unavailable or uninitialized")
        yield


def _broken_checkpoint(folder: Path, error: BaseException) -> ModelError:
    reason = " ".join(str(error).split())[:200]
    return ModelError(f"The checkpoint {folder} is broken ({reason}); remove it to resume from the one before.")


def _folders(root: Path) -> list[Path]:
    """The checkpoints below ``root``, oldest first, without damaged ones."""
    found = ((match, folder) for folder in root.glob("step-*") if (match := _NAME.fullmatch(folder.name)))
    return [folder for _, folder in sorted((int(match[1]), folder) for match, folder in found)]


def _rename_damaged(folder: Path) -> Path:
    """Rename a damaged checkpoint, so that it is not read any more."""
    names = (folder.with_name(f"{folder.name}{number}{manifest.DAMAGED}") for number in chain([""], (f".{n}" for n in count(2))))
    aside = next(name for name in names if not os.path.lexists(name))
    try:
        return folder.rename(aside)
    except OSError as error:
        raise unusable_file_error(folder, error) from error


def _remove_old_checkpoints(root: Path, keep: int) -> None:
    """Remove all checkpoints but the newest ``keep`` and the best evaluated one, and partial ones."""
    folders = _folders(root)
    evaluated = [(em, folder) for folder in folders if (em := _em(folder)) is not None]
    best = max(evaluated, default=(0.0, None))[1]
    for folder in folders[:-keep]:
        if folder != best:
            folder.rename(folder.with_name(f".{folder.name}.old"))  # a removal is atomic, too
    for left in root.glob(".step-*"):
        shutil.rmtree(left, ignore_errors=True)


def _em(folder: Path) -> float | None:
    """Held-out exact match of a checkpoint's policy; None if it was not evaluated, or the result is unreadable."""
    for name in (EVALUATION, PROGRESS):
        with suppress(OSError, ValueError, KeyError, TypeError):
            if (em := parse_object((folder / name).read_bytes())["em"]) is not None and isfinite(em):
                return float(em)
    return None
