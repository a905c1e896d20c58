"""Artifact store of the trainer: writes policy versions, checkpoints and the final model; retries while the disk is full.

    a policy version, the final model   required: retried with back-off while training waits
    a checkpoint in between             optional: retried after the next step
    the last checkpoint                 required

A failed write leaves nothing behind, is counted by its system error, and logged once.
"""

from __future__ import annotations

import errno
import logging
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TypeVar

from torch.optim import Optimizer
from transformers import PreTrainedModel

from learner.trainer.distributed.ranks import SINGLE_RANK, Ranks
from learner.trainer.persistence import checkpoint
from learner.trainer.persistence.checkpoint import Record, TrainingProgress
from learner.trainer.persistence.policy_versions import export_model, list_versions, prune_versions, write_version
from treegrpo.config.schema import Config
from treegrpo.errors import DiskError, RunFileError
from treegrpo.observability.metrics import TrainerMetrics
from treegrpo.timing.backoff import Backoff, RetrySchedule
from treegrpo.wire.trainer_protocol import KEEP_VERSIONS

log = logging.getLogger(__name__)
DISK_RETRIES = Backoff.exponential(1.0, 30.0, seconds=1200.0)
"""Of required writes; then the trainer ends. Less than the ranks' collective timeout."""
T = TypeVar("T")


class ArtifactStore:
    """Reads and writes the artifacts of one run; all ranks call it together."""

    def __init__(
        self,
        config: Config,
        metrics: TrainerMetrics,
        stop: threading.Event,
        ranks: Ranks = SINGLE_RANK,
        retries: Backoff = DISK_RETRIES,
    ) -> None:
        """Args:
        config: of the run.
        metrics: count failures and seconds.
        stop: set when a signal tells this process to end; then nothing is retried.
        ranks: those that write together.
        retries: of required writes.
        """
        self._retries = retries
        self._config, self._metrics, self._stop, self._ranks = config, metrics, stop, ranks
        self._weights, self._checkpoints = config.run.dir / "weights", config.run.dir / "checkpoints"
        self._checkpoint_step: int | None = None
        """The step of the last checkpoint."""
        self.checkpoint_overdue = False
        """Whether the last attempt to write a checkpoint failed."""

    def find_latest(self) -> tuple[Path | None, TrainingProgress, list[Record]]:
        """The latest checkpoint, if there is one; the progress of its run, in a new lineage; and its step records.

        Raises ModelError: there are checkpoints, and none that can be used.
        """
        folder, progress, records = self._ranks.run_on_first(self._find_latest)
        self._checkpoint_step = progress.step if folder else None
        return folder, progress, records

    def _find_latest(self) -> tuple[Path | None, TrainingProgress, list[Record]]:
        folder = checkpoint.newest_checkpoint(self._checkpoints)
        progress = checkpoint.read_training_progress(folder) if folder else TrainingProgress()
        # A run that was continued and died before its next checkpoint has used a lineage that no checkpoint knows.
        used = [v.lineage for v in list_versions(self._weights)] + ([progress.lineage] if folder else [])
        records = checkpoint.read_records(folder) if folder else []
        return folder, replace(progress, lineage=max(used) + 1) if used else progress, records

    def store_version(self, model: PreTrainedModel, progress: TrainingProgress) -> Path:
        """Write a policy version; returns its directory. Raises DiskError, as `_write_with_retries`."""
        base = self._config.model
        return self._write_with_retries(
            "weights", lambda: write_version(model, self._weights, progress.version, base.path, base.dtype, self._ranks)
        )

    def prune_old_versions(self) -> None:
        """Remove policy versions that are no longer needed."""
        self._ranks.run_on_first(lambda: prune_versions(self._weights, KEEP_VERSIONS))

    def store_final_model(self, model: PreTrainedModel) -> Path:
        """Write the trained model; returns its directory. Raises DiskError, as `_write_with_retries`."""
        base, folder = self._config.model, self._checkpoints / "final"
        self._write_with_retries("final", lambda: export_model(model, folder, base.path, base.dtype, self._ranks))
        return folder

    def store_checkpoint(
        self,
        model: PreTrainedModel,
        optimizer: Optimizer,
        progress: TrainingProgress,
        records: Sequence[Record],
        *,
        required: bool,
    ) -> bool:
        """Write a checkpoint unless there is one of this step; whether there is one now.

        Raises DiskError, as `_write_with_retries`, if it is ``required``; otherwise it is tried once.
        """
        if self._checkpoint_step == progress.step:
            return True
        config, began = self._config, time.perf_counter()

        def write() -> None:
            keep = config.train.keep_checkpoints
            checkpoint.save_checkpoint(
                self._checkpoints, progress, model, optimizer, config.model.path, keep, self._ranks, records
            )

        try:
            self._write_with_retries("checkpoint", write) if required else write()
        except DiskError as error:
            if required:
                raise
            self._count_failure("checkpoint", error)
            if not self.checkpoint_overdue:
                log.error("%s Training continues, and the checkpoint is tried again after each step.", error)  # noqa: TRY400 - one sentence is enough
            self.checkpoint_overdue = True
            return False
        self._checkpoint_step, self.checkpoint_overdue = progress.step, False
        self._metrics.phase.labels("checkpoint").observe(time.perf_counter() - began)
        return True

    def store_evaluation(self, progress: TrainingProgress) -> None:
        """Write the evaluation of a policy into its checkpoint, if there is one, which may be the best."""
        if self._checkpoint_step != progress.step:
            return
        try:
            self._ranks.run_on_first(lambda: checkpoint.write_evaluation(self._checkpoints, progress))
        except DiskError as error:
            self._count_failure("checkpoint", error)
            log.warning("%s", error)
        except RunFileError as error:  # the run continues without it
            log.warning("%s", error)

    def _write_with_retries(self, what: str, write: Callable[[], T]) -> T:
        """What ``write`` returns; a DiskError is retried with back-off.

        Raises DiskError: the retries are used up, or a signal has told this process to end.
        """
        retries = self._retries.schedule()
        try:
            while True:
                try:
                    return write()
                except DiskError as error:
                    self._count_failure(what, error)
                    self._metrics.blocked.set(1)
                    if not self._ranks.run_on_first(partial(self._wait_for_retry, retries, str(error))):
                        self._ranks.raise_on_all(error)
        finally:
            self._metrics.blocked.set(0)

    def _wait_for_retry(self, retries: RetrySchedule, reason: str) -> bool:
        """Block until the next attempt, and log ``reason`` now and then; False if there is to be none."""
        if self._stop.is_set() or retries.remaining <= 0:
            return False
        if retries.log_is_due():
            log.warning("%s The trainer waits. Trying again for up to %.0f s.", reason, retries.remaining)
        return retries.wait_event(self._stop)

    def _count_failure(self, what: str, error: DiskError) -> None:
        self._metrics.unwritten.labels(what, errno.errorcode.get(error.errno or 0, "unknown")).inc()
