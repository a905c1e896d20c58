"""What the trainer writes down: policy versions, checkpoints, the final model; on a disk that may be full for a while.

    a policy version, the final model   needed: written again and again, and training waits
    a checkpoint in between             not needed: written again after the next step
    the last checkpoint                 needed

What could not be written leaves nothing behind, is counted by what the disk said, and said once.
"""

from __future__ import annotations

import errno
import logging
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

from torch.optim import Optimizer
from transformers import PreTrainedModel

from learner.trainer.distributed.ranks import ALONE, Ranks
from learner.trainer.patience import Patience
from learner.trainer.persistence import checkpoint
from learner.trainer.persistence.checkpoint import Progress, Record
from learner.trainer.persistence.policy_versions import export, prune, publish, published
from treegrpo.config.schema import Config
from treegrpo.errors import DiskError, RunFileError
from treegrpo.observability.metrics import TrainerMetrics
from treegrpo.wire.trainer_protocol import KEEP_VERSIONS

log = logging.getLogger(__name__)
FULL_SECONDS = 1200.0
"""The longest that a disk may refuse what is needed; then the trainer ends. Less than the other ranks' patience."""
FIRST_RETRY_SECONDS = 1.0
LONGEST_RETRY_SECONDS = 30.0
T = TypeVar("T")


class Shelf:
    def __init__(self, config: Config, metrics: TrainerMetrics, stop: threading.Event, ranks: Ranks = ALONE) -> None:
        """Args:
        config: of the run.
        metrics: where failures and seconds are counted.
        stop: set when a signal tells this process to end; then nothing is waited for.
        ranks: those that write together.
        """
        self._config, self._metrics, self._stop, self._ranks = config, metrics, stop, ranks
        self._weights, self._checkpoints = config.run.dir / "weights", config.run.dir / "checkpoints"
        self._saved: int | None = None
        """The step of the last checkpoint."""
        self.overdue = False
        """Whether a checkpoint could not be written and has not been since."""

    # ---- read

    def begin(self) -> tuple[Path | None, Progress, list[Record]]:
        """The checkpoint to go on from, if there is one; where its run stood, in a lineage of its own; and its records.

        Raises ModelError: there are checkpoints, and none that can be used.
        """
        folder, progress, records = self._ranks.first(self._begin)
        self._saved = progress.step if folder else None
        return folder, progress, records

    def _begin(self) -> tuple[Path | None, Progress, list[Record]]:
        folder = checkpoint.newest(self._checkpoints)
        progress = checkpoint.read_progress(folder) if folder else Progress()
        # A run that was continued and died before its next checkpoint has used a lineage that no checkpoint knows.
        used = [v.lineage for v in published(self._weights)] + ([progress.lineage] if folder else [])
        records = checkpoint.read_records(folder) if folder else []
        return folder, replace(progress, lineage=max(used) + 1) if used else progress, records

    # ---- write: all ranks together

    def publish(self, model: PreTrainedModel, progress: Progress) -> Path:
        """Write a policy version; returns its directory. Raises DiskError as `_patiently`."""
        base = self._config.model
        return self._patiently(
            "weights", lambda: publish(model, self._weights, progress.version, base.path, base.dtype, self._ranks)
        )

    def prune(self) -> None:
        """Remove policy versions that nobody needs any more."""
        self._ranks.first(lambda: prune(self._weights, KEEP_VERSIONS))

    def final(self, model: PreTrainedModel) -> Path:
        """Write the model to go on with; returns its directory. Raises DiskError as `_patiently`."""
        base, folder = self._config.model, self._checkpoints / "final"
        self._patiently("final", lambda: export(model, folder, base.path, base.dtype, self._ranks))
        return folder

    def checkpoint(
        self,
        model: PreTrainedModel,
        optimizer: Optimizer,
        progress: Progress,
        records: Sequence[Record],
        *,
        needed: bool,
    ) -> bool:
        """Write a checkpoint unless there is one of this step; whether there is one now.

        Raises DiskError as `_patiently` if it is ``needed``; else the disk is asked once.
        """
        if self._saved == progress.step:
            return True
        config, began = self._config, time.perf_counter()

        def write() -> None:
            keep = config.train.keep_checkpoints
            checkpoint.save(self._checkpoints, progress, model, optimizer, config.model.path, keep, self._ranks, records)

        try:
            self._patiently("checkpoint", write) if needed else write()
        except DiskError as error:
            if needed:
                raise
            self._count("checkpoint", error)
            if not self.overdue:
                log.error("%s Training goes on, and it is tried again after each step.", error)  # noqa: TRY400 - one sentence is enough
            self.overdue = True
            return False
        self._saved, self.overdue = progress.step, False
        self._metrics.phase.labels("checkpoint").observe(time.perf_counter() - began)
        return True

    def note_evaluation(self, progress: Progress) -> None:
        """Remember how good a policy is if there is a checkpoint of it, which may be the best."""
        if self._saved != progress.step:
            return
        try:
            self._ranks.first(lambda: checkpoint.note_evaluation(self._checkpoints, progress))
        except DiskError as error:
            self._count("checkpoint", error)
            log.warning("%s", error)
        except RunFileError as error:  # the run needs no such note
            log.warning("%s", error)

    def _patiently(self, what: str, write: Callable[[], T]) -> T:
        """What ``write`` returns, as soon as the disk takes it.

        Raises DiskError: it has not for FULL_SECONDS, or a signal has told this process to end.
        """
        patience = Patience(FULL_SECONDS, self._stop, first=FIRST_RETRY_SECONDS, longest=LONGEST_RETRY_SECONDS)
        try:
            while True:
                try:
                    return write()
                except DiskError as error:
                    self._count(what, error)
                    self._metrics.blocked.set(1)
                    said = f"{error} The trainer waits."
                    if not self._ranks.first(lambda: patience.wait(said)):  # noqa: B023 - called here
                        self._ranks.raise_alike(error)
        finally:
            self._metrics.blocked.set(0)

    def _count(self, what: str, error: DiskError) -> None:
        self._metrics.unwritten.labels(what, errno.errorcode.get(error.errno or 0, "unknown")).inc()
