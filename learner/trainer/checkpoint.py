"""Checkpoints: all that a run needs to go on as if it had not stopped.

    checkpoints/step-000020/   a Hugging Face directory in float32
        trainer.pt             optimiser and random states
        progress.json          lineage, step, position; written last

A checkpoint is there completely or not at all. The newest few are kept, and the best of those that were evaluated.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch.optim import Optimizer
from transformers import PreTrainedModel

from learner.trainer.durable import whole
from learner.trainer.publish import write_model
from treegrpo.errors import ModelError
from treegrpo.tree import PolicyVersion


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


def save(root: Path, progress: Progress, model: PreTrainedModel, optimizer: Optimizer, tokenizer_from: Path, keep: int) -> Path:
    """Write a checkpoint below ``root`` and remove those no longer kept; returns its directory."""
    folder = root / f"step-{progress.step:06d}"
    with whole(folder) as partial:
        write_model(model, partial, tokenizer_from)
        torch.save({"optimizer": optimizer.state_dict(), "random": _random_state()}, partial / "trainer.pt")
        (partial / "progress.json").write_text(json.dumps(asdict(progress)) + "\n", encoding="utf-8")
    for old in _superfluous(root, keep):
        shutil.rmtree(old)
    return folder


def newest(root: Path) -> Path | None:
    """The directory of the last checkpoint, None if there is none."""
    return max(root.glob("step-*"), default=None)


def read_progress(folder: Path) -> Progress:
    """Where the run of a checkpoint stood. Raises ModelError."""
    try:
        return Progress(**json.loads((folder / "progress.json").read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise _broken(folder, error) from error


def restore(folder: Path, optimizer: Optimizer) -> None:
    """Bring the optimiser and the random generators to where they were. Raises ModelError."""
    try:
        state: dict[str, Any] = torch.load(folder / "trainer.pt", map_location="cpu", weights_only=True)
        optimizer.load_state_dict(state["optimizer"])
        torch.set_rng_state(state["random"]["cpu"])
        torch.cuda.set_rng_state_all(state["random"]["cuda"])
    except Exception as error:  # a broken file surfaces as any of a dozen types
        raise _broken(folder, error) from error


def _random_state() -> dict[str, Any]:
    return {"cpu": torch.get_rng_state(), "cuda": torch.cuda.get_rng_state_all()}


def _broken(folder: Path, error: Exception) -> ModelError:
    reason = " ".join(str(error).split())[:200]
    return ModelError(f"The checkpoint {folder} is broken ({reason}); remove it to resume from the one before.")


def _superfluous(root: Path, keep: int) -> list[Path]:
    """All but the newest ``keep`` and the best evaluated one."""
    folders = sorted(root.glob("step-*"))
    evaluated = [(em, folder) for folder in folders if (em := read_progress(folder).em) is not None]
    best = max(evaluated, default=(0.0, None))[1]
    return [folder for folder in folders[:-keep] if folder != best]
