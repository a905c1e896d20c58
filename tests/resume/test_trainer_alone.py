"""The trainer killed in the middle of a step: it takes the same groups again and makes the same of them."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from learner.trainer.packing.model import load_model
from tests.trainer.builders import CPU, configure, write_tiny
from tests.trainer.fake_intake import FakeIntake
from tests.trainer.trainer_harness import changed, intake_for, train
from treegrpo.config.schema import Config
from treegrpo.wire.trainer_protocol import Message, Publish, StepReport, Take

pytestmark = pytest.mark.whole_run
SECONDS = 60.0


def started(config: Config) -> subprocess.Popen[str]:
    keys = {"run.dir": config.run.dir, "model.path": config.model.path, "learner.metrics": "127.0.0.1:0"}
    keys |= {f"train.{key}": value for key, value in config.train.model_dump(exclude_unset=True).items()}
    return subprocess.Popen(
        [sys.executable, "-m", "learner.trainer", *(word for key, value in keys.items() for word in (f"--{key}", str(value)))],
        cwd=Path(__file__).parents[2],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stderr=subprocess.PIPE,
        text=True,
    )


def killed(config: Config, moment: Callable[[FakeIntake], bool]) -> FakeIntake:
    """Start a trainer and kill it at ``moment``; what it asked until then."""
    with intake_for(config) as intake, started(config) as process:
        deadline = time.monotonic() + SECONDS
        while not moment(intake):
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.001)
        process.kill()
        process.communicate()
    return intake


def in_the_middle_of(step: int) -> Callable[[FakeIntake], bool]:
    """It has the groups of ``step``, and nobody knows of a new version yet."""

    def moment(intake: FakeIntake) -> bool:
        asked: list[Message] = list(intake.asked)
        return isinstance(asked[-1] if asked else None, Take) and sum(isinstance(one, Take) for one in asked) == step

    return moment


def half_written(config: Config, pattern: str) -> Callable[[FakeIntake], bool]:
    return lambda _intake: any(config.run.dir.glob(pattern))


def test_a_trainer_killed_within_steps_ends_with_the_same_weights(tmp_path: Path) -> None:
    write_tiny(tmp_path / "model")
    config = configure(tmp_path, checkpoint_every=2, steps=6)
    undisturbed = changed(config, "run", dir=tmp_path / "undisturbed")
    for one in (config, undisturbed):
        one.run.dir.mkdir()
    torch.set_num_threads(1)
    with intake_for(undisturbed) as whole:
        train(undisturbed)
    first = killed(config, in_the_middle_of(step=4))
    second = killed(config, half_written(config, "weights/.*.4.partial"))
    third = killed(config, half_written(config, "checkpoints/.step-000004.partial"))
    with intake_for(config) as last, started(config) as process:
        _, said = process.communicate(timeout=SECONDS)
    assert process.returncode == 0, said
    taken = [[take.position for take in intake.of(Take)] for intake in (first, second, third, last)]
    assert taken == [[0, 2, 4, 6], [4, 6], [4, 6], [4, 6, 8, 10]]
    assert [intake.of(Publish)[0].version for intake in (first, second, third, last)] == ["0.0", "1.2", "2.2", "3.2"]
    losses = {
        report.values["step"]: report.values["loss"]
        for intake in (first, second, third, last)
        for report in intake.of(StepReport)
    }
    assert [losses[step] for step in range(1, 7)] == [report["loss"] for report in whole.reports]
    models = [load_model(one.run.dir / "checkpoints" / "final", CPU) for one in (config, undisturbed)]
    assert all(torch.equal(a, b) for a, b in zip(*(model.parameters() for model in models), strict=True))
