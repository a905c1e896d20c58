"""Checkpoints: all that a run needs to go on as if it had not stopped, with as many ranks as before or others.

    checkpoints/step-000020/   a Hugging Face directory in float32
        state/                 moments of the optimiser and random states, by torch.distributed.checkpoint
        progress.json          lineage, step, position; written last

Weights stand in the Hugging Face files alone. Every rank writes its part of the moments and reads whatever part it needs
of all that was written. A checkpoint is there completely or not at all. The newest few are kept, and the best of those
that were evaluated.
"""

from __future__ import annotations

import json
import logging
import shutil
import warnings
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint import state_dict_loader, state_dict_saver
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.optim import Optimizer
from transformers import PreTrainedModel

from learner.trainer.publish import write_model
from learner.trainer.ranks import ALONE, Ranks
from treegrpo.errors import ModelError
from treegrpo.step import PolicyVersion

log = logging.getLogger(__name__)
MOMENTS = ("exp_avg", "exp_avg_sq")
"""AdamW's, besides its count of steps."""


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
) -> Path:
    """Write a checkpoint below ``root`` and remove those no longer kept; returns its directory. All ranks call it."""
    folder = root / f"step-{progress.step:06d}"
    with ranks.whole(folder) as partial:
        write_model(model, partial, tokenizer_from, ranks=ranks)
        with _by_one_process_too():
            state_dict_saver.save({**_moments(model, optimizer), **_random_state(ranks)}, checkpoint_id=partial / "state")
        written = json.dumps(asdict(progress)) + "\n"
        ranks.first(lambda: (partial / "progress.json").write_text(written, encoding="utf-8"))
    ranks.first(lambda: _remove_superfluous(root, keep))
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


def _remove_superfluous(root: Path, keep: int) -> None:
    """All but the newest ``keep`` and the best evaluated one."""
    folders = sorted(root.glob("step-*"))
    evaluated = [(em, folder) for folder in folders if (em := read_progress(folder).em) is not None]
    best = max(evaluated, default=(0.0, None))[1]
    for folder in folders[:-keep]:
        if folder != best:
            shutil.rmtree(folder)
