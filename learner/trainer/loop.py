"""The training loop, the file to read first: take groups, train on them, publish the new policy, repeat.

    groups ─► usable leaves ─► advantages ─► packs ─► loss ─► step ─► weights ─► (intake ─► samplers ─► groups)

    ┌────────┐ Take: B groups   ┌───────────────────────────────────────┐
    │        │ ───────────────► │ group_validation   valid groups       │
    │        │                  │ credit_assignment  usable leaves      │
    │        │                  │ advantages         of the estimator   │
    │ intake │                  │ packing            distinct tokens    │
    │        │                  │ ranks              each its own packs │
    │        │                  │ optimizer_steps    loss, AdamW        │
    │        │ Publish, Report  │ artifact_store     weights/0.7/       │
    │        │ ◄─────────────── │                    step-000020/       │
    └────────┘                  └───────────────────────────────────────┘

    part      produces              waits for                          unblocked by
    trainer   a policy version      `train.batch` groups               samplers closing groups
    rank      gradients             the other ranks, layer by layer    their packs, as many and as costly as its own
    intake    leases                room below the staleness bound     Publish: groups before `position` are trained
    samplers  subtrees              a lease, or newer weights          a grant, the announcement of a version

The trainer never waits for a sampler by name, and nothing waits for the trainer but the staleness bound. Its position
counts the groups it is done with; it moves with the step, also when the step had nothing to learn, and is in the
checkpoint. A step is taken or skipped as a whole, by all ranks alike: each runs this loop, and rank 0 alone talks. An
unreachable intake (`intake_client.py`) and a full disk (`artifact_store.py`) are retried; neither costs a step.
"""

from __future__ import annotations

import logging
import signal
import threading
import time
from collections.abc import Sequence
from dataclasses import replace

import torch
from transformers import set_seed
from transformers.utils.logging import disable_progress_bar

from learner.trainer.algorithm.advantages import EstimatorOptions, advantages
from learner.trainer.algorithm.credit_assignment import UsableGroup, assign_credit, select_usable
from learner.trainer.algorithm.group_validation import unpack_groups
from learner.trainer.algorithm.plan_signal import check_signal
from learner.trainer.distributed.ranks import CPU, SINGLE_RANK, Ranks
from learner.trainer.intake_client import IntakeClient
from learner.trainer.optimizer_steps import Updater
from learner.trainer.packing.model import load_model
from learner.trainer.packing.packing import Pack, pack
from learner.trainer.persistence.artifact_store import ArtifactStore
from learner.trainer.persistence.checkpoint import restore_optimizer
from learner.trainer.step_metrics import MismatchMonitor, PhaseTimer, export_step, step_record
from treegrpo.config.fingerprint import KEYS, MODEL, check_fingerprint
from treegrpo.config.schema import Config
from treegrpo.config.security import Role
from treegrpo.errors import ContractError, UnavailableError
from treegrpo.net.address import join_address, split_address
from treegrpo.net.local_socket import socket_path
from treegrpo.observability.metrics import TrainerMetrics, serve_metrics
from treegrpo.runtime.stop_signals import stop_signals
from treegrpo.security.credentials import Credentials
from treegrpo.storage.manifest import check_model_files
from treegrpo.storage.run_files import check_run_files

log = logging.getLogger(__name__)
WRITE_ATTEMPTS = 3
"""For a version that the intake finds damaged as soon as it is written."""


class Trainer:
    """Runs the training loop on every rank."""

    def __init__(self, config: Config, intake: IntakeClient, metrics: TrainerMetrics, ranks: Ranks = SINGLE_RANK) -> None:
        """Load the last checkpoint of the run in `run.dir`, or the model if it has none.

        Raises:
            ModelError: the model directory or the checkpoint cannot be used.
        """
        self._config, self._intake, self._metrics, self._ranks = config, intake, metrics, ranks
        self._store = ArtifactStore(config, metrics, intake.stop, ranks)
        set_seed(config.run.seed)
        folder, self.progress, self._records = self._store.find_latest()
        device = ranks.device if ranks.world == 1 else CPU  # several ranks load the whole model before they shard it
        if config.train.kl_coef or folder is None:
            ranks.run_on_first(lambda: check_model_files(config.model.path))
        again = config.train.gradient_checkpointing
        reference = load_model(config.model.path, device).requires_grad_(False) if config.train.kl_coef else None
        policy = load_model(folder or config.model.path, device, gradient_checkpointing=again)
        self._updater = Updater(config, policy, reference, ranks)
        if folder:
            restore_optimizer(folder, policy, self._updater.optimizer, ranks)
        self._evaluated: int | None = None
        self._mismatch = MismatchMonitor()
        intake.on_version_damaged = self._publish_policy

    def train(self) -> None:
        """Train to the end, or until the run drains; either way there is a checkpoint and ``checkpoints/final``.

        Raises:
            UnavailableError: the intake stayed unreachable while the run was to go on. The checkpoint is written all the same.
            DiskError: a policy version or the last checkpoint could not be written for a long time.
            ContractError: the intake does not have the groups that come next.
        """
        try:
            self._run_steps()
        except UnavailableError:
            self._finish()
            if not self._intake.draining:  # a draining intake may end first
                raise

    def _run_steps(self) -> None:
        train, every = self._config.train, self._config.eval.every
        self._publish_policy()
        self._resend_records()
        self._evaluate()
        while self.progress.step < train.steps and (taken := self._take()):
            groups, phases = taken
            self._step(groups, phases)
            if every and self.progress.step % every == 0:
                self._evaluate()
            if (self.progress.step % train.checkpoint_every == 0 or self._store.checkpoint_overdue) and self._checkpoint():
                self._intake.confirm_checkpoint(self.progress.position)
        self._finish()
        if self.progress.step >= train.steps:
            self._evaluate()

    def _take(self) -> tuple[list[bytes], PhaseTimer] | None:
        """The groups of the next step and its timer, which has counted the wait; None when the run drains."""
        phases = PhaseTimer()
        with phases("wait"):
            groups = self._intake.take_groups(self.progress.position, self._config.train.batch)
        self._metrics.waiting.inc(phases.seconds["wait"])
        return (groups, phases) if groups else None

    def _step(self, packed: list[bytes], phases: PhaseTimer) -> None:
        with phases("pack"):
            groups, refused = unpack_groups(packed, self._updater.vocabulary)
            batch = select_usable(groups)
            minibatches = [self._packs(part) for part in split_minibatches(batch, self._config.train.minibatches)]
        if self._ranks.is_first:
            for reason in refused:
                log.warning("a group is left out of training: %s", reason)
        with phases("update"):
            update = self._updater.step_minibatches(minibatches, self.progress.step)
        self.progress = replace(
            self.progress, step=self.progress.step + 1, position=self.progress.position + len(packed), em=None
        )
        try:
            with phases("publish"):
                self._publish_policy()
        finally:  # the step counts, even if its version is not published
            record = {**step_record(self.progress, groups, batch, update, phases), "groups_refused": len(refused)}
            self._records.append(record)
        self._metrics.refused.inc(len(refused))
        self._intake.report_step(record)
        export_step(self._metrics, record)
        if self._ranks.is_first:
            self._mismatch.check_mismatch(record)

    def _resend_records(self) -> None:
        """Report the steps before the checkpoint again: the intake may have died with a record, and drops duplicates."""
        for record in self._records:
            self._intake.report_step(record)
        self._records.clear()

    def _packs(self, batch: Sequence[UsableGroup]) -> list[Pack]:
        """This rank's packs of a minibatch, whose weights in the loss are its own."""
        train = self._config.train
        values = [advantages(one.tree_arrays, EstimatorOptions.from_config(train)) for one in batch]
        credited = assign_credit(batch, values, train.aggregation)
        keep_zero = train.kl_coef > 0 or train.entropy_coef > 0
        world, now = self._ranks.world, self.progress.version
        return self._ranks.assign_packs(pack(credited, train.pack_tokens, keep_zero=keep_zero, ranks=world, now=now))

    def _publish_policy(self) -> None:
        """Write the policy as a version, and have the intake announce it."""
        progress = self.progress
        for again in reversed(range(WRITE_ATTEMPTS)):
            folder = self._store.store_version(self._updater.model, progress)
            try:
                self._intake.request_publish(progress.version, folder, progress.position)
                break
            except ContractError as error:  # its files were damaged as soon as they were written
                if not again:
                    raise
                log.warning("%s", error)
        self._store.prune_old_versions()
        self._metrics.version.set(progress.step)

    def _evaluate(self) -> None:
        """Wait for the evaluation of this policy on the held-out questions, unless it is known or the run drains."""
        if self._evaluated == self.progress.step:
            return
        began = time.perf_counter()
        if (result := self._intake.await_evaluation(self.progress.version)) is not None:
            self.progress, self._evaluated = replace(self.progress, em=result.em), self.progress.step
            self._store.store_evaluation(self.progress)
            self._metrics.phase.labels("evaluate").observe(time.perf_counter() - began)
            log.info("version %s: held-out EM %.1f", self.progress.version, 100 * result.em)

    def _checkpoint(self, *, required: bool = False) -> bool:
        """Write a checkpoint; whether there is one of this step now. Raises DiskError only if it is ``required``."""
        model, optimizer = self._updater.model, self._updater.optimizer
        written = self._store.store_checkpoint(model, optimizer, self.progress, self._records, required=required)
        if written:
            self._records.clear()
        return written

    def _finish(self) -> None:
        """Write the last checkpoint, to resume from, and ``final``, the trained model."""
        self._checkpoint(required=True)
        final = self._store.store_final_model(self._updater.model)
        log.info("step %d of %d; the model is in %s", self.progress.step, self._config.train.steps, final)


def split_minibatches(batch: Sequence[UsableGroup], minibatches: int) -> list[Sequence[UsableGroup]]:
    """The groups of each minibatch, dealt out in turn; fewer minibatches where there are fewer groups, but one at least."""
    return [batch[first::minibatches] for first in range(max(1, min(minibatches, len(batch))))]


def main(config: Config, ranks: Ranks) -> None:
    """Train as ``config`` says until the end, a stop signal, or the run state "draining". Raises TreeGrpoError."""
    stop = threading.Event()
    for number in stop_signals():
        signal.signal(number, lambda _number, _frame: stop.set())
    torch.set_num_threads(config.train.threads)
    disable_progress_bar()  # of every model file written
    check_signal(config)
    ranks.run_on_first(lambda: check_run_files(config.run.dir))
    metrics = TrainerMetrics()
    host, port = split_address(config.learner.metrics, "learner.metrics")
    own = join_address(host, port + 1 if port else 0)
    access = Credentials.from_config(config.security, Role.LEARNER)
    ranks.run_on_first(lambda: serve_metrics(metrics, own, "learner.metrics (the port after it)", access))
    with IntakeClient.connect(socket_path(config.run.dir), stop, ranks) as intake:
        ranks.run_on_first(lambda: check_fingerprint(config, (*KEYS, MODEL)))  # the questions are the intake's
        trainer = Trainer(config, intake, metrics, ranks)
        metrics.lag_bound.set(config.train.max_lag)
        metrics.serving.set(1)
        trainer.train()
