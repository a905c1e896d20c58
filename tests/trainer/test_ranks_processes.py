"""The trainer as processes: what torchrun starts, and what a signal, a death or an error does to all of them."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch

from learner.trainer.packing.model import load_model
from learner.trainer.persistence import checkpoint
from tests.trainer.builders import CPU, configure, write_tiny
from tests.trainer.fake_intake import FakeIntake
from treegrpo.config.schema import Config
from treegrpo.net.local_socket import socket_path
from treegrpo.runtime.entrypoint import ERROR_PREFIX, FAILED, TRANSIENT
from treegrpo.wire.trainer_protocol import Message, StepReport

pytestmark = pytest.mark.whole_run
TORCHRUN = ("torch.distributed.run", "--standalone", "--local-addr=127.0.0.1", "--nproc-per-node=2", "-m")


def started(config: Config, steps: int, *before: str) -> subprocess.Popen[str]:
    """A trainer of two ranks, of torchrun's or its own making, for the intake of ``config``."""
    keys = {"run.dir": config.run.dir, "model.path": config.model.path, "train.batch": 2, "train.minibatches": 2}
    keys |= {"train.steps": steps, "learner.metrics": "127.0.0.1:0", "train.processes": 1 if before else 2}
    return subprocess.Popen(
        [sys.executable, "-m", *before, "learner.trainer", *(part for k, v in keys.items() for part in (f"--{k}", str(v)))],
        cwd=Path(__file__).parents[2],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.fixture
def config(tmp_path: Path) -> Config:
    write_tiny(tmp_path / "model")
    (tmp_path / "run").mkdir()
    return configure(tmp_path)


def test_torchrun_trains_to_the_end(config: Config) -> None:
    with FakeIntake(socket_path(config.run.dir), torn=frozenset({5})) as intake:
        _, said = (process := started(config, 3, *TORCHRUN)).communicate(timeout=100)
    assert process.returncode == 0, said
    assert [report["outcomes"] for report in intake.reports] == [["applied", "applied"]] * 2 + [["applied"]]
    assert [report["position"] for report in intake.reports] == [2, 4, 6]
    assert said.count("a group is left out of training: ") == 1
    assert intake.evaluations == ["0.0", "0.0", "0.3", "0.3"]
    folder = checkpoint.newest_checkpoint(config.run.dir / "checkpoints")
    assert folder is not None
    assert checkpoint.read_training_progress(folder).step == 3
    published = load_model(config.run.dir / "weights" / "0.3", CPU)
    final = load_model(config.run.dir / "checkpoints" / "final", CPU)
    assert all(torch.equal(a, b) for a, b in zip(published.parameters(), final.parameters(), strict=True))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_signal_drains_all_ranks_and_a_dead_rank_ends_the_run(config: Config, number: signal.Signals) -> None:
    reported = threading.Event()

    def answers(request: Message) -> bool:
        if isinstance(request, StepReport):
            reported.set()
        return True

    with FakeIntake(socket_path(config.run.dir), answers=answers):
        process = started(config, 100_000)
        assert reported.wait(100)
        os.kill(process.pid if number == signal.SIGTERM else rank_of(process, 1), number)
        _, said = process.communicate(timeout=60)
    assert "Traceback" not in said
    errors = [line for line in said.splitlines() if line.startswith(ERROR_PREFIX)]
    left = [*(config.run.dir / "checkpoints").glob("step-*/progress.json")]
    if number == signal.SIGTERM:
        assert (process.returncode, errors, len(left)) == (128 + number, [], 1)
    else:
        lost = "error: Rank 0 of the trainer lost another; the log has why that one ended."
        assert (process.returncode, errors, left) == (TRANSIENT, [lost], [])


def errors_of(config: Config, intake: FakeIntake, code: int) -> tuple[str, list[str]]:
    """All that a trainer of two ranks says that fails with ``code``, and its errors."""
    with intake:
        _, said = (process := started(config, 2)).communicate(timeout=100)
    assert process.returncode == code, said
    return said, [line for line in said.splitlines() if line.startswith(ERROR_PREFIX)]


def test_what_all_ranks_end_of_is_said_once(config: Config) -> None:
    said, errors = errors_of(config, FakeIntake(socket_path(config.run.dir), kept=2), FAILED)
    assert errors == [ERROR_PREFIX + "Position 0 is gone."]
    assert "Traceback" not in said


def test_what_is_in_the_way_of_all_ranks_is_said_once(config: Config) -> None:
    (config.run.dir / "weights").touch()
    said, errors = errors_of(config, FakeIntake(socket_path(config.run.dir)), FAILED)
    assert errors == [f"{ERROR_PREFIX}{config.run.dir}/weights is a file, and the run keeps a directory there; move it away."]
    assert "Traceback" not in said


def rank_of(process: subprocess.Popen[str], rank: int) -> int:
    """The process id of one of the ranks that torchrun runs."""
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    environments = {int(child): Path(f"/proc/{child}/environ").read_bytes().split(b"\0") for child in children}
    return next(child for child, words in environments.items() if f"RANK={rank}".encode() in words)
