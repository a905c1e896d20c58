"""The trainer, the file to read first: take groups, learn from them, publish the new policy, again.

    groups ─► episodes ─► advantages ─► packs ─► loss ─► step ─► weights ─► (intake ─► samplers ─► groups)

    ┌────────┐ Take: B groups   ┌───────────────────────────────┐
    │        │ ───────────────► │ examine    sound groups       │
    │        │                  │ episodes   usable leaves      │
    │        │                  │ advantages of the estimator   │
    │ intake │                  │ packing    distinct tokens    │
    │        │                  │ ranks      each its own packs │
    │        │                  │ update     policy, loss, AdamW│
    │        │ Publish, Report  │ publish    weights/0.7/       │
    │        │ ◄─────────────── │ checkpoint step-000020/       │
    └────────┘                  └───────────────────────────────┘

    part      produces              waits for                          unblocked by
    trainer   a policy version      `train.batch` groups               samplers closing groups
    rank      gradients             the other ranks, layer by layer    their packs, as many and as dear as its own
    intake    leases                room below the staleness bound     Publish: groups before `position` are trained
    samplers  subtrees              a lease, or newer weights          a grant, the announcement of a version

The trainer never waits for a sampler by name, and nothing waits for the trainer but the staleness bound. Its position
counts the groups it is done with; it moves with the step, also when the step had nothing to learn, and is in the
checkpoint. A step is taken or skipped as a whole, by all ranks alike: each runs this loop, and rank 0 alone talks.
"""

from __future__ import annotations

import logging
import signal
import threading
import time
from collections.abc import Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import torch
from transformers import set_seed
from transformers.utils.logging import disable_progress_bar

from learner.trainer import checkpoint
from learner.trainer.advantages import Options, advantages
from learner.trainer.checkpoint import Progress
from learner.trainer.episodes import Episodes, credit, usable
from learner.trainer.examine import unpack
from learner.trainer.link import Link
from learner.trainer.model import load_model
from learner.trainer.packing import Pack, pack
from learner.trainer.publish import export, prune, publish, published
from learner.trainer.ranks import ALONE, CPU, Ranks
from learner.trainer.report import Phases, show, step_values
from learner.trainer.update import Updater
from treegrpo.access import Access
from treegrpo.config import Config
from treegrpo.errors import ConfigError, UnavailableError
from treegrpo.handoff import KEEP_VERSIONS, socket_path
from treegrpo.security import Role
from treegrpo.telemetry import TrainerMetrics, serve, split_address

log = logging.getLogger(__name__)


class Trainer:
    def __init__(self, config: Config, link: Link, metrics: TrainerMetrics, ranks: Ranks = ALONE) -> None:
        """Load the model, or the last checkpoint if the run is resumed.

        Raises:
            ConfigError: the run directory holds a run that is not to be resumed.
            ModelError: the model directory or the checkpoint cannot be used.
        """
        self._config, self._link, self._metrics, self._ranks = config, link, metrics, ranks
        self._weights, self._checkpoints = config.run.dir / "weights", config.run.dir / "checkpoints"
        set_seed(config.run.seed)
        folder = ranks.first(self._resumed_from)
        device = ranks.device if ranks.world == 1 else CPU  # several ranks load the whole before they share it
        again = config.train.gradient_checkpointing
        reference = load_model(config.model.path, device).requires_grad_(False) if config.train.kl_coef else None
        policy = load_model(folder or config.model.path, device, gradient_checkpointing=again)
        self._updater = Updater(config, policy, reference, ranks)
        if folder:
            checkpoint.restore(folder, policy, self._updater.optimizer, ranks)
        self.progress = ranks.first(lambda: self._begins_at(folder))
        self._saved: int | None = self.progress.step if folder else None
        self._evaluated: int | None = None

    def run(self) -> None:
        """Train to the end, or until the run drains; either way there is a checkpoint and ``checkpoints/final``.

        Raises:
            UnavailableError: the intake went away while the run was to go on. The checkpoint is written even so.
        """
        try:
            self._train()
        except UnavailableError:
            self._finish()
            if not self._link.draining:  # an intake that was told first to drain may leave first
                raise

    def _train(self) -> None:
        train, every = self._config.train, self._config.eval.every
        self._publish()
        self._evaluate()
        while self.progress.step < train.steps and (taken := self._take()):
            groups, phases = taken
            self._step(groups, phases)
            if every and self.progress.step % every == 0:
                self._evaluate()
            if self.progress.step % train.checkpoint_every == 0:
                self._checkpoint()
                self._link.covered(self.progress.position)
        self._finish()
        if self.progress.step >= train.steps:
            self._evaluate()

    def _take(self) -> tuple[list[bytes], Phases] | None:
        """The groups of the next step and its clock, which has counted the wait; None when the run drains."""
        phases = Phases()
        with phases("wait"):
            groups = self._link.take(self.progress.position, self._config.train.batch)
        self._metrics.waiting.inc(phases.seconds["wait"])
        return (groups, phases) if groups else None

    def _step(self, packed: list[bytes], phases: Phases) -> None:
        with phases("pack"):
            groups, refused = unpack(packed, int(cast("Any", self._updater.model.config).vocab_size))
            batch = usable(groups)
            minibatches = [self._packs(part) for part in split(batch, self._config.train.minibatches)]
        if self._ranks.is_first:
            for sentence in refused:
                log.warning("a group is left out of training: %s", sentence)
        with phases("update"):
            update = self._updater.update(minibatches, self.progress.step)
        self.progress = replace(
            self.progress, step=self.progress.step + 1, position=self.progress.position + len(packed), em=None
        )
        with phases("publish"):
            self._publish()
        report = {**step_values(self.progress, groups, batch, update, phases), "groups_refused": len(refused)}
        self._metrics.refused.inc(len(refused))
        self._link.report(report)
        show(self._metrics, report)

    def _packs(self, batch: Sequence[Episodes]) -> list[Pack]:
        """This rank's packs of a minibatch, whose weights in the loss are its own."""
        train = self._config.train
        values = [advantages(one.branches, Options.of(train)) for one in batch]
        credited = credit(batch, values, train.aggregation)
        keep_zero = train.kl_coef > 0 or train.entropy_coef > 0
        return self._ranks.share_out(pack(credited, train.pack_tokens, keep_zero=keep_zero, ranks=self._ranks.world))

    def _publish(self) -> None:
        model, progress = self._config.model, self.progress
        folder = publish(self._updater.model, self._weights, progress.version, model.path, model.dtype, self._ranks)
        self._link.publish(progress.version, folder, progress.position)
        self._ranks.first(lambda: prune(self._weights, KEEP_VERSIONS))
        self._metrics.version.set(progress.step)

    def _evaluate(self) -> None:
        """Have the held-out questions answered by this policy, unless that was done or the run drains."""
        if self._evaluated == self.progress.step:
            return
        began = time.perf_counter()
        if (result := self._link.evaluate(self.progress.version)) is not None:
            self.progress, self._evaluated = replace(self.progress, em=result.em), self.progress.step
            self._metrics.phase.labels("evaluate").observe(time.perf_counter() - began)
            log.info("version %s: held-out EM %.1f", self.progress.version, 100 * result.em)

    def _checkpoint(self) -> None:
        if self._saved == self.progress.step:
            return
        began = time.perf_counter()
        updater, config = self._updater, self._config
        policy, keep = (updater.model, updater.optimizer), config.train.keep_checkpoints
        checkpoint.save(self._checkpoints, self.progress, *policy, config.model.path, keep, self._ranks)
        self._saved = self.progress.step
        self._metrics.phase.labels("checkpoint").observe(time.perf_counter() - began)

    def _finish(self) -> None:
        """Leave a checkpoint to resume from and ``final``, the model to go on with."""
        config = self._config
        export(self._updater.model, self._checkpoints / "final", config.model.path, config.model.dtype, self._ranks)
        self._checkpoint()
        log.info("step %d of %d; the model is in %s", self.progress.step, config.train.steps, self._checkpoints / "final")

    def _resumed_from(self) -> Path | None:
        folder = checkpoint.newest(self._checkpoints)
        if folder and not self._config.run.resume:
            raise ConfigError(f"run.dir = {self._config.run.dir} holds a run already; add --resume, or choose another.")
        return folder

    def _begins_at(self, folder: Path | None) -> Progress:
        progress = checkpoint.read_progress(folder) if folder else Progress()
        # A run that was resumed and died before its first checkpoint has used a lineage that no checkpoint knows.
        used = [v.lineage for v in published(self._weights)] + ([progress.lineage] if folder else [])
        return replace(progress, lineage=max(used) + 1) if used else progress


def split(batch: Sequence[Episodes], minibatches: int) -> list[Sequence[Episodes]]:
    """The groups of each minibatch, dealt out in turn; fewer minibatches where there are fewer groups, but one at least."""
    return [batch[first::minibatches] for first in range(max(1, min(minibatches, len(batch))))]


def main(config: Config, ranks: Ranks) -> None:
    """Train as ``config`` says until the end, a SIGTERM or SIGINT, or the run state "draining". Raises TreeGrpoError."""
    stop = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda _number, _frame: stop.set())
    torch.set_num_threads(config.train.threads)
    disable_progress_bar()  # of every model file written
    metrics = TrainerMetrics()
    host, port = split_address(config.learner.metrics, "learner.metrics")
    own = f"{host}:{port + 1 if port else 0}"
    access = Access.of(config.security, Role.LEARNER)
    ranks.first(lambda: serve(metrics, own, "learner.metrics (the port after it)", access))
    with closing(Link.open(socket_path(config.run.dir), stop, ranks)) as link:
        trainer = Trainer(config, link, metrics, ranks)
        metrics.serving.set(1)
        trainer.run()
