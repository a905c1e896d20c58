from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from learner.trainer.intake_client import IntakeClient, IntakeRetries
from learner.trainer.loop import split_minibatches
from learner.trainer.packing.model import load_model
from learner.trainer.persistence.checkpoint import TrainingProgress, newest_checkpoint, read_training_progress
from learner.trainer.persistence.policy_versions import list_versions
from tests.trainer.builders import CPU, configure, write_tiny
from tests.trainer.fake_intake import FakeIntake, sampler
from tests.trainer.trainer_harness import changed, intake_for, train
from treegrpo.config.schema import Config
from treegrpo.core.step import PolicyVersion
from treegrpo.errors import UnavailableError
from treegrpo.net.local_socket import socket_path
from treegrpo.observability.metrics import TrainerMetrics
from treegrpo.timing.backoff import Backoff
from treegrpo.wire.trainer_protocol import Covered, Evaluate, Evaluation, Message, Publish, Refused, StepReport, Take, Taken

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def config(tmp_path: Path) -> Config:
    write_tiny(tmp_path / "model")
    (tmp_path / "run").mkdir()
    return configure(tmp_path, checkpoint_every=3)


def test_a_trivial_reward_improves_and_the_model_is_handed_over(config: Config) -> None:
    config = changed(config, "train", steps=10, batch=6, lr=2e-2)
    metrics = TrainerMetrics()
    with intake_for(config) as intake:
        train(config, metrics=metrics)
    rewards = [report["reward_mean"] for report in intake.reports]
    assert np.mean(rewards[:2]) < 0.65
    assert np.mean(rewards[-2:]) > 0.85
    assert [take.position for take in intake.of(Take)] == [6 * n for n in range(10)]
    assert [(p.version, p.position) for p in intake.of(Publish)] == [(f"0.{n}", 6 * n) for n in range(11)]
    assert all(report["kl_mismatch"] < 1e-6 for report in intake.reports)
    assert all(report["kl_mismatch_lag0"] < 1e-6 for report in intake.reports)
    tokens, _ = sampler(config.run.dir / "checkpoints" / "final", seed=1)(50)
    assert (tokens < 32).mean() > 0.85
    assert metrics.registry.get_sample_value("treegrpo_step") == 10
    assert metrics.registry.get_sample_value("treegrpo_train_reward_mean") == rewards[-1]


class Damaging(FakeIntake):
    """Finds the first version damaged, once in a batch and once in an evaluation, and the second when it is published."""

    def _answer(self, request: Message) -> Message:
        done = len(self.of(type(request)))
        match request:
            case Take() if done == 1:
                return Taken([], "running", damaged="0.0")
            case Evaluate() if done == 1:
                return Evaluation(False, damaged="0.0")
            case Publish("0.1") if sum(p.version == "0.1" for p in self.of(Publish)) == 1:
                return Refused("Version 0.1 cannot be served: it is damaged; write it again.")
            case _:
                return super()._answer(request)


def test_a_version_that_was_damaged_is_written_and_published_again(config: Config) -> None:
    with Damaging(socket_path(config.run.dir)) as intake:
        train(changed(config, "train", steps=2))
    assert [p.version for p in intake.of(Publish)] == ["0.0", "0.0", "0.0", "0.1", "0.1", "0.2"]
    assert [report["step"] for report in intake.reports] == [1, 2]


def test_evaluations_come_first_and_last_and_in_between(config: Config) -> None:
    with intake_for(config) as intake:
        train(changed(config, "eval", every=2))
    assert intake.evaluations == ["0.0", "0.0", "0.2", "0.2", "0.4", "0.4"]
    asked = [type(message).__name__ for message in intake.asked]
    assert asked[:4] == ["Publish", "Evaluate", "Evaluate", "Take"]


def test_checkpoints_cover_positions_and_old_versions_go(config: Config) -> None:
    with intake_for(config) as intake:
        train(config)
    assert [covered.position for covered in intake.of(Covered)] == [6]
    folder = newest_checkpoint(config.run.dir / "checkpoints")
    assert folder is not None
    assert read_training_progress(folder) == TrainingProgress(0, 4, 8)
    assert list_versions(config.run.dir / "weights") == [PolicyVersion(0, n) for n in (2, 3, 4)]


def test_a_resumed_run_goes_on_in_a_new_lineage(config: Config) -> None:
    with intake_for(config):
        train(config)
    with intake_for(config) as intake:
        trainer = train(changed(config, "train", steps=6))
    assert trainer.progress.version == PolicyVersion(1, 6)
    assert [take.position for take in intake.of(Take)] == [8, 10]
    assert [p.version for p in intake.of(Publish)] == ["1.4", "1.5", "1.6"]


def test_a_lineage_that_left_no_checkpoint_is_not_used_again(config: Config) -> None:
    (config.run.dir / "weights" / "3.7").mkdir(parents=True)
    with intake_for(config) as intake:
        train(changed(config, "train", steps=1))
    assert [p.version for p in intake.of(Publish)] == ["4.0", "4.1"]


def test_a_resumed_run_takes_the_same_steps_as_one_that_was_not_stopped(config: Config) -> None:
    with intake_for(config) as through:
        whole = train(config)
    halves = changed(config, "run", dir=config.run.dir.with_name("halves"))
    halves.run.dir.mkdir()
    with intake_for(halves, steps_before_drain=2) as first:
        train(halves)
    with intake_for(halves, had=frozenset(r["version"] for r in first.reports)) as second:
        parts = train(halves)
    assert [r["loss"] for r in through.reports] == [r["loss"] for r in first.reports + second.reports]
    finals = [load_model(c.run.dir / "checkpoints" / "final", CPU) for c in (config, halves)]
    assert all(torch.equal(a, b) for a, b in zip(*(m.parameters() for m in finals), strict=True))
    assert (whole.progress.step, parts.progress.step) == (4, 4)


def test_a_drain_ends_the_run_with_a_checkpoint(config: Config) -> None:
    with intake_for(config, steps_before_drain=2) as intake:
        trainer = train(config)
    assert trainer.progress.step == 2
    assert intake.evaluations == ["0.0", "0.0"]  # not of the version it stopped at
    assert (config.run.dir / "checkpoints" / "step-000002" / "state" / ".metadata").is_file()
    assert (config.run.dir / "checkpoints" / "final" / "model.safetensors").is_file()


def test_a_drain_ends_the_wait_for_an_evaluation(config: Config) -> None:
    with intake_for(config, state="draining") as intake:
        assert train(config).progress.step == 0
    assert intake.of(Take) == []


@pytest.mark.parametrize("stays", [True, False])
def test_a_stop_lets_the_step_finish_whether_the_intake_stays_or_leaves(config: Config, stays: bool) -> None:
    stop = threading.Event()

    def stop_in_step_two(request: Message) -> bool:
        if isinstance(request, Publish) and request.version == "0.2":
            stop.set()
        return stays or not stop.is_set()

    with intake_for(config, answers=stop_in_step_two):
        assert train(config, stop).progress.step == 2
    assert (config.run.dir / "checkpoints" / "step-000002").is_dir()


def test_an_intake_that_vanishes_costs_no_step(config: Config) -> None:
    def until_step_three(request: Message) -> bool:
        return not (isinstance(request, Take) and request.position == 4)

    with intake_for(config, answers=until_step_three), pytest.raises(UnavailableError, match="The intake disconnected"):
        train(config)
    assert (config.run.dir / "checkpoints" / "step-000002" / "progress.json").is_file()


def nothing_new(_tokens: np.ndarray) -> float:
    return 0.2


def test_a_step_without_signal_moves_on_with_the_same_policy(config: Config) -> None:
    with intake_for(config, reward=nothing_new) as intake:
        train(config)
    assert [r["outcomes"] for r in intake.reports] == [["no_signal"]] * 4
    assert [r["zero_signal_ratio"] for r in intake.reports] == [1.0] * 4
    assert [p.position for p in intake.of(Publish)] == [0, 2, 4, 6, 8]
    models = [load_model(f, CPU) for f in (config.model.path, config.run.dir / "checkpoints" / "final")]
    assert all(torch.equal(a, b) for a, b in zip(*(m.parameters() for m in models), strict=True))


def test_the_reference_is_the_initial_model_also_after_a_resume(config: Config) -> None:
    config = changed(config, "train", kl_coef=0.001)
    with intake_for(config) as first:
        train(config)
    with intake_for(config) as second:
        train(changed(config, "train", steps=5))
    assert first.reports[0]["kl_reference"] == pytest.approx(0, abs=1e-9)
    assert second.reports[0]["kl_reference"] > 1e-3


def test_nobody_at_the_socket_is_said(config: Config) -> None:
    with pytest.raises(UnavailableError, match="The intake does not answer at"):
        IntakeClient.connect(
            socket_path(config.run.dir), threading.Event(), retries=IntakeRetries(connect=Backoff((0.1,), seconds=0.2))
        )


def test_sigterm_ends_the_process_well(config: Config) -> None:
    asked = threading.Event()
    flags = ["--run.dir", str(config.run.dir), "--model.path", str(config.model.path), "--train.steps", "1000"]
    flags += ["--train.batch", "2", "--train.kl_coef", "0", "--learner.metrics", "127.0.0.1:0"]
    command = [sys.executable, "-m", "learner.trainer", *flags]

    def trained(request: Message) -> bool:
        if isinstance(request, StepReport):
            asked.set()
        return True

    with intake_for(config, answers=trained):
        process = subprocess.Popen(
            command, cwd=Path(__file__).parents[2], env={**os.environ, "OMP_NUM_THREADS": "1"}, stderr=subprocess.PIPE, text=True
        )
        assert asked.wait(60)
        process.send_signal(signal.SIGTERM)
        _, said = process.communicate(timeout=60)
    assert process.returncode == 0, said
    folder = newest_checkpoint(config.run.dir / "checkpoints")
    assert folder is not None
    assert 1 <= read_training_progress(folder).step < 1000


def test_groups_are_dealt_to_minibatches_and_none_is_empty() -> None:
    batch: list[Any] = [*range(5)]
    assert split_minibatches(batch, 2) == [[0, 2, 4], [1, 3]]
    assert split_minibatches(batch[:2], 4) == [[0], [1]]
    assert split_minibatches([], 4) == [[]]


def test_every_minibatch_is_a_step_of_its_own(config: Config) -> None:
    with intake_for(config) as intake:
        train(changed(config, "train", steps=2, minibatches=2))
    assert [report["outcomes"] for report in intake.reports] == [["applied"] * 2] * 2
    assert [take.position for take in intake.of(Take)] == [0, 2]
