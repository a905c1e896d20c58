"""Outages that must not stop a trainer: an unreachable intake, a full disk, a damaged checkpoint."""

from __future__ import annotations

import errno
import logging
import threading
from collections.abc import Callable, Generator, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest
import torch

from learner.trainer.packing.model import load_model
from learner.trainer.persistence.checkpoint import newest_checkpoint, read_records, read_training_progress
from tests.trainer.builders import CPU, configure, write_tiny
from tests.trainer.file_size_limit import UNLIMITED, full_beyond, limit_files
from tests.trainer.trainer_harness import changed, intake_for, train
from treegrpo.config.schema import Config
from treegrpo.errors import ContractError, DiskError, ModelError, UnavailableError
from treegrpo.observability.metrics import TrainerMetrics
from treegrpo.storage.manifest import DAMAGED
from treegrpo.wire.trainer_protocol import Covered, Evaluate, Message, Publish, StepReport, Take

pytestmark = pytest.mark.usefixtures("one_thread")

SMALL = 20_000
"""Bytes: no weights fit."""
MIDDLE = 120_000
"""Weights fit, the optimiser's moments do not."""


@pytest.fixture
def config(tmp_path: Path) -> Config:
    write_tiny(tmp_path / "model")
    (tmp_path / "run").mkdir()
    return configure(tmp_path, checkpoint_every=2)


@contextmanager
def when_said(words: str, act: Callable[[], object]) -> Generator[None]:
    """Do ``act`` at once whenever the trainer logs ``words``."""

    class Listener(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            if words in record.getMessage():
                act()

    listener, logger = Listener(), logging.getLogger("learner.trainer")
    logger.addHandler(listener)
    try:
        yield
    finally:
        logger.removeHandler(listener)


def leftovers(config: Config) -> list[str]:
    return [path.name for path in config.run.dir.rglob(".*") if path.is_dir()]


def positions(messages: list[Take]) -> list[int]:
    return [take.position for take in messages]


# ---- an intake that is away


@pytest.mark.parametrize(("kind", "number"), [(Publish, 2), (Take, 2), (StepReport, 2), (Covered, 1), (Evaluate, 1)], ids=str)
def test_a_failed_request_is_repeated_after_the_version_is_announced(config: Config, kind: type[Message], number: int) -> None:
    seen: list[Message] = []
    lost: list[int] = []

    def answers(request: Message) -> bool:
        seen.append(request)
        if lost or sum(isinstance(one, kind) for one in seen) < number:
            return True
        lost.append(len(seen) - 1)
        return False

    with intake_for(config, answers=answers) as intake:
        assert train(config).progress.step == 4
    (at,) = lost
    published = [one for one in seen[: at + 1] if isinstance(one, Publish)][-1]
    again = [seen[at]] if kind is Publish else [published, seen[at]]
    assert seen[at + 1 : at + 1 + len(again)] == again
    assert positions(intake.of(Take)) == [0, 2, 4, 6]
    assert [report["step"] for report in intake.reports] == [1, 2, 3, 4]


def test_an_intake_that_starts_again_finds_the_trainer_waiting(config: Config) -> None:
    def until_step_three(request: Message) -> bool:
        return not (isinstance(request, Take) and request.position == 4)

    second = intake_for(config)
    with ExitStack() as intakes:
        intakes.enter_context(intake_for(config, answers=until_step_three))

        def restart() -> None:
            intakes.close()
            intakes.enter_context(second)

        with when_said("The trainer waits for it", restart):
            assert train(config, outage_seconds=30.0).progress.step == 4
    assert [type(message) for message in second.asked[:2]] == [Publish, Take]
    assert second.of(Publish)[0].version == "0.2"
    assert positions(second.of(Take)) == [4, 6]


def test_what_the_intake_refuses_is_an_error_at_once(config: Config) -> None:
    with intake_for(config, kept=2), pytest.raises(ContractError, match="Position 0 is gone"):
        train(config, outage_seconds=600.0)


def test_a_step_that_could_not_be_reported_is_reported_by_the_next_trainer(config: Config) -> None:
    silent = threading.Event()

    def answers(request: Message) -> bool:
        if isinstance(request, StepReport) and request.values["step"] == 3:
            silent.set()
        return not silent.is_set()

    with intake_for(config, answers=answers) as first, pytest.raises(UnavailableError):
        train(config, outage_seconds=0.2)
    folder = newest_checkpoint(config.run.dir / "checkpoints")
    assert folder is not None
    assert [record["step"] for record in read_records(folder)] == [3]
    with intake_for(config, had=frozenset(report["version"] for report in first.reports)) as second:
        train(config)
    assert [report["version"] for report in first.reports + second.reports] == ["0.1", "0.2", "0.3", "1.4"]
    assert positions(second.of(Take)) == [6]


# ---- a disk that is full


def unwritten(metrics: TrainerMetrics, what: str) -> float:
    labels = {"what": what, "error": errno.errorcode[errno.EFBIG]}
    return metrics.registry.get_sample_value("treegrpo_trainer_writes_failed_total", labels) or 0.0


def filling(step: int, size: int) -> Callable[[Message], bool]:
    """The disk becomes full when ``step`` is reported."""

    def answers(request: Message) -> bool:
        if isinstance(request, StepReport) and request.values["step"] == step:
            limit_files(size)
        return True

    return answers


@pytest.fixture
def room_again() -> Iterator[Callable[[], None]]:
    yield lambda: limit_files(UNLIMITED)
    limit_files(UNLIMITED)


def test_training_waits_until_its_weights_can_be_written(config: Config, room_again: Callable[[], None]) -> None:
    metrics, blocked = TrainerMetrics(), list[float | None]()

    def mend() -> None:
        blocked.append(metrics.registry.get_sample_value("treegrpo_trainer_blocked"))
        room_again()

    with intake_for(config, answers=filling(1, SMALL)) as intake, when_said("The trainer waits.", mend):
        assert train(config, metrics=metrics).progress.step == 4
    assert [*blocked, metrics.registry.get_sample_value("treegrpo_trainer_blocked")] == [1, 0]
    assert [p.version for p in intake.of(Publish)] == ["0.0", "0.1", "0.2", "0.3", "0.4"]
    assert unwritten(metrics, "weights") == 1
    assert leftovers(config) == []


def test_a_checkpoint_that_does_not_fit_is_written_after_a_later_step(
    config: Config, room_again: Callable[[], None], caplog: pytest.LogCaptureFixture
) -> None:
    config, metrics = changed(config, "train", steps=7), TrainerMetrics()
    fill = filling(2, MIDDLE)

    def answers(request: Message) -> bool:
        if isinstance(request, StepReport) and request.values["step"] == 5:
            room_again()
        return fill(request)

    with intake_for(config, answers=answers) as intake, when_said("The trainer waits.", pytest.fail):
        assert train(config, metrics=metrics).progress.step == 7
    assert [covered.position for covered in intake.of(Covered)] == [10, 12]
    assert unwritten(metrics, "checkpoint") == 3
    assert caplog.text.count("tried again after each step") == 1
    assert leftovers(config) == []


def test_the_last_checkpoint_is_waited_for(config: Config, room_again: Callable[[], None]) -> None:
    metrics = TrainerMetrics()
    with intake_for(config, answers=filling(3, MIDDLE), steps_before_drain=3), when_said("The trainer waits.", room_again):
        assert train(config, metrics=metrics).progress.step == 3
    folder = newest_checkpoint(config.run.dir / "checkpoints")
    assert folder is not None
    assert read_training_progress(folder).step == 3
    assert unwritten(metrics, "checkpoint") == 1


def test_a_signal_ends_the_wait_for_the_disk_and_the_step_is_repeated(config: Config) -> None:
    stop = threading.Event()
    with (
        intake_for(config, answers=filling(3, SMALL)),
        when_said("The trainer waits.", stop.set),
        full_beyond(UNLIMITED),
        pytest.raises(DiskError, match=r"weights/0\.4 could not be written"),
    ):
        train(config, stop)
    with intake_for(config) as intake:
        assert train(config).progress.step == 4
    assert positions(intake.of(Take)) == [4, 6]


# ---- a checkpoint that is damaged


def damage(folder: Path) -> None:
    weights = bytearray((folder / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (folder / "model.safetensors").write_bytes(weights)


def test_after_a_damaged_checkpoint_the_one_before_gives_equal_weights(config: Config, caplog: pytest.LogCaptureFixture) -> None:
    config = changed(config, "train", steps=5)
    checkpoints = config.run.dir / "checkpoints"
    with intake_for(config):
        train(changed(config, "train", steps=4))
    damage(checkpoints / "step-000004")
    with intake_for(config) as intake:
        train(config)
    assert positions(intake.of(Take)) == [4, 6, 8]
    assert intake.of(Publish)[0].version == "1.2"
    assert "step-000004 is damaged (model.safetensors has another SHA-256" in caplog.text
    assert sorted(path.name for path in checkpoints.iterdir()) == [
        "final",
        "step-000002",  # of those that are whole the best at the time
        "step-000004",
        f"step-000004{DAMAGED}",
        "step-000005",
    ]
    undisturbed = changed(config, "run", dir=config.run.dir.with_name("undisturbed"))
    undisturbed.run.dir.mkdir()
    with intake_for(undisturbed):
        train(undisturbed)
    models = [load_model(one.run.dir / "checkpoints" / "final", CPU) for one in (config, undisturbed)]
    assert all(torch.equal(a, b) for a, b in zip(*(model.parameters() for model in models), strict=True))


def test_a_run_whose_checkpoints_are_all_damaged_does_not_begin_anew(config: Config) -> None:
    with intake_for(config) as intake:
        train(config)
        for folder in (config.run.dir / "checkpoints").glob("step-*"):
            damage(folder)
        for _ in range(2):
            with pytest.raises(ModelError, match=r"Every checkpoint in .* is damaged, step-000004.damaged the newest"):
                train(config)
    assert len(intake.of(Take)) == 4


def test_the_best_checkpoint_stays_when_it_is_evaluated_later(config: Config) -> None:
    with intake_for(config, em={0: 0.1, 4: 0.9, 8: 0.2, 12: 0.3}.__getitem__):
        train(config)
        train(changed(config, "train", steps=8))
        train(changed(config, "train", steps=12))
    folders = sorted(path.name for path in (config.run.dir / "checkpoints").glob("step-*"))
    assert folders == ["step-000004", "step-000010", "step-000012"]
