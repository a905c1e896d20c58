"""Checkpoints: all that a run needs to go on as if it had not stopped, with as many ranks as before or others.

    checkpoints/step-000020/   a Hugging Face directory in float32
        state/                 moments of the optimiser and random states, by torch.distributed.checkpoint
        records.jsonl          of the steps since the checkpoint before, to be said again
        progress.json          lineage, step, position
        manifest.json          size and SHA-256 of all of these; written last
        evaluation.json        held-out exact match, if it became known later
    checkpoints/step-000040.damaged/   one that is not as it was written; kept to be looked at, never read

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

from learner.trainer.distributed.ranks import ALONE, Ranks
from learner.trainer.persistence.atomic_directory import on_disk
from learner.trainer.persistence.policy_versions import write_model
from treegrpo.core.step import PolicyVersion
from treegrpo.errors import DiskError, ModelError
from treegrpo.storage import manifest
from treegrpo.storage.run_files import parse_object, unusable_file_error

log = logging.getLogger(__name__)
MOMENTS = ("exp_avg", "exp_avg_sq")
"""AdamW's, besides its count of steps."""
PROGRESS, RECORDS, EVALUATION = "progress.json", "records.jsonl", "evaluation.json"
NEEDED = (*manifest.MODEL_FILES, PROGRESS, ".metadata", "*.distcp")
"""At least one file of each of these a checkpoint's manifest names."""
_NAME = re.compile(r"step-(\d{6,})")
Record = dict[str, Any]
"""What a step said of itself; see `report.step_values`."""


@dataclass(frozen=True, slots=True)
class Progress:
    """Where a run stands."""

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


def save(
    root: Path,
    progress: Progress,
    model: PreTrainedModel,
    optimizer: Optimizer,
    tokenizer_from: Path,
    keep: int,
    ranks: Ranks = ALONE,
    records: Sequence[Record] = (),
) -> Path:
    """Write a checkpoint below ``root`` and remove those no longer kept; returns its directory. All ranks call it.

    Raises:
        DiskError: on all ranks, if the disk is full or fails for one of them; what there was is as it was.
    """
    folder = root / f"step-{progress.step:06d}"

    def describe(partial: Path) -> None:
        with on_disk(folder):
            (partial / RECORDS).write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
            (partial / PROGRESS).write_text(json.dumps(asdict(progress)) + "\n", encoding="utf-8")
            manifest.write_manifest(partial)

    with ranks.whole(folder) as partial:
        write_model(model, partial, tokenizer_from, ranks=ranks)
        _write_state({**_moments(model, optimizer), **_random_state(ranks)}, partial / "state", folder, ranks)
        ranks.first(lambda: describe(partial))
    ranks.first(lambda: _remove_superfluous(root, keep))
    return folder


def _write_state(state: dict[str, Tensor], into: Path, folder: Path, ranks: Ranks) -> None:
    try:
        with on_disk(folder), _by_one_process_too():
            state_dict_saver.save(state, checkpoint_id=into)
    except DiskError as error:  # whoever had it, the library has told everybody
        ranks.raise_alike(error)


def newest(root: Path) -> Path | None:
    """The last checkpoint that is as it was written, None if there never was one. Damaged ones are set aside.

    One without a manifest counts as damaged: it was written before everything else in it had its name, or not by us.

    Raises:
        ModelError: there is none but damaged ones.
        RunFileError: one cannot be set aside.
    """
    for folder in reversed(_folders(root)):
        if not (reason := manifest.find_damage(folder, NEEDED)):
            return folder
        aside = _set_aside(folder)
        log.warning(
            "the checkpoint %s is damaged (%s); it is set aside as %s, and the one before is used", folder, reason, aside.name
        )
    if damaged := sorted(root.glob(f"*{manifest.DAMAGED}")):
        raise ModelError(
            f"Every checkpoint in {root} is damaged, {damaged[-1].name} the newest; restore one under its name without "
            f"{manifest.DAMAGED}, or begin a new run.dir, from another checkpoint (model.path)."
        )
    return None


def read_progress(folder: Path) -> Progress:
    """Where the run of a checkpoint stood. Raises ModelError."""
    try:
        return Progress(**parse_object((folder / PROGRESS).read_bytes()))
    except (OSError, ValueError, TypeError) as error:
        raise _broken(folder, error) from error


def read_records(folder: Path) -> list[Record]:
    """The records a checkpoint was written with; those of an earlier version of treegrpo have none. Raises ModelError."""
    if not (path := folder / RECORDS).exists():
        return []
    try:
        return [parse_object(line) for line in path.read_bytes().splitlines()]
    except (OSError, ValueError) as error:
        raise _broken(folder, error) from error


def note_evaluation(root: Path, progress: Progress) -> None:
    """Say how good the policy of an existing checkpoint turned out to be. Raises DiskError."""
    path = root / f"step-{progress.step:06d}" / EVALUATION
    partial = path.with_suffix(".partial")
    with on_disk(path):
        partial.write_text(json.dumps({"em": progress.em}) + "\n", encoding="utf-8")
        partial.replace(path)


def restore(folder: Path, model: PreTrainedModel, optimizer: Optimizer, ranks: Ranks = ALONE) -> None:
    """Bring the optimiser and the random generators to where they were. Raises ModelError. All ranks call it."""
    if not (folder / "state").exists() and (folder / "trainer.pt").exists():
        raise ModelError(
            f"The checkpoint {folder} is of an earlier version of treegrpo; begin a new run from it: --model.path {folder}."
        )
    random = _random_state(ranks)
    try:
        known = FileSystemReader(folder / "state").read_metadata().state_dict_metadata
        kept = {name: state for name, state in random.items() if name in known}
        with _by_one_process_too():
            state_dict_loader.load({**_moments(model, optimizer), **kept}, checkpoint_id=folder / "state")
    except (Exception, CheckpointException) as error:  # a broken file surfaces as any of a dozen types
        raise _broken(folder, error) from error
    if len(kept) < len(random):
        log.warning("rank %d is new in this run: its random state is a fresh one", ranks.rank)
    for name, state in kept.items():
        torch.set_rng_state(state) if name.startswith("cpu") else torch.cuda.set_rng_state(state, ranks.device)


def _moments(model: nn.Module, optimizer: Optimizer) -> dict[str, Tensor]:
    """What AdamW remembers of each parameter, by name, to be written or to be read into.

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
def _by_one_process_too() -> Generator[None]:
    """Without a process group the library warns that it takes this for the only process, which it is."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled, unavailable or uninitialized")
        yield


def _broken(folder: Path, error: BaseException) -> ModelError:
    reason = " ".join(str(error).split())[:200]
    return ModelError(f"The checkpoint {folder} is broken ({reason}); remove it to resume from the one before.")


def _folders(root: Path) -> list[Path]:
    """The checkpoints below ``root``, oldest first; those set aside are none."""
    found = ((match, folder) for folder in root.glob("step-*") if (match := _NAME.fullmatch(folder.name)))
    return [folder for _, folder in sorted((int(match[1]), folder) for match, folder in found)]


def _set_aside(folder: Path) -> Path:
    """Give a damaged checkpoint a name under which it counts no more."""
    names = (folder.with_name(f"{folder.name}{number}{manifest.DAMAGED}") for number in chain([""], (f".{n}" for n in count(2))))
    aside = next(name for name in names if not os.path.lexists(name))
    try:
        return folder.rename(aside)
    except OSError as error:
        raise unusable_file_error(folder, error) from error


def _remove_superfluous(root: Path, keep: int) -> None:
    """All but the newest ``keep`` and the best evaluated one, and what crashes have left half written or half removed."""
    folders = _folders(root)
    evaluated = [(em, folder) for folder in folders if (em := _em(folder)) is not None]
    best = max(evaluated, default=(0.0, None))[1]
    for folder in folders[:-keep]:
        if folder != best:
            folder.rename(folder.with_name(f".{folder.name}.old"))  # there completely or not at all, also when it goes
    for left in root.glob(".step-*"):
        shutil.rmtree(left, ignore_errors=True)


def _em(folder: Path) -> float | None:
    """Held-out exact match of a checkpoint's policy; None if it was not evaluated, or nobody can read what came of it."""
    for name in (EVALUATION, PROGRESS):
        with suppress(OSError, ValueError, KeyError, TypeError):
            if (em := parse_object((folder / name).read_bytes())["em"]) is not None and isfinite(em):
                return float(em)
    return None
