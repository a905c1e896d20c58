"""Containers lock GPUs exclusively, and a dead one releases its own. With a fake nvidia-smi."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from treegrpo.runtime.exit_report import FAILED, TRANSIENT

CLAIM = Path(__file__).parents[2] / "deploy" / "claim_gpu.py"
SHOW = "import os; print(os.environ['CUDA_VISIBLE_DEVICES'], flush=True); input()"


@pytest.fixture
def gpu_machine(tmp_path: Path) -> dict[str, str]:
    """The environment of a machine with two GPUs."""
    tool = tmp_path / "nvidia-smi"
    tool.write_text("#!/bin/sh\necho GPU-a\necho GPU-b\n", encoding="utf-8")
    tool.chmod(0o755)
    (tmp_path / "locks").mkdir()
    return {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}", "GPU_LOCKS": str(tmp_path / "locks"), "GPU_PATIENCE": "0"}


def start(gpu_machine: dict[str, str], count: int) -> subprocess.Popen[str]:
    command = [sys.executable, str(CLAIM), str(count), sys.executable, "-c", SHOW]
    return subprocess.Popen(command, env=gpu_machine, stdin=-1, stdout=-1, stderr=-1, text=True)


def first_line(container: subprocess.Popen[str]) -> str:
    assert container.stdout is not None
    return container.stdout.readline().strip()


def test_containers_share_the_gpus_and_a_killed_one_leaves_its_own(gpu_machine: dict[str, str]) -> None:
    with start(gpu_machine, 1) as first, start(gpu_machine, 1) as second:
        assert {first_line(first), taken := first_line(second)} == {"GPU-a", "GPU-b"}
        with start(gpu_machine, 1) as third:
            _, said = third.communicate()
        assert third.returncode == TRANSIENT
        assert "1 GPUs are asked for and 0 of 2 are free" in said
        second.kill()
        second.wait()
        with start(gpu_machine, 1) as fourth:
            assert first_line(fourth) == taken
            fourth.kill()
        first.kill()


def test_a_learner_takes_several(gpu_machine: dict[str, str]) -> None:
    with start(gpu_machine, 2) as learner:
        assert first_line(learner) == "GPU-a,GPU-b"
        learner.kill()


def test_a_machine_without_a_gpu_is_told_what_to_do(gpu_machine: dict[str, str], tmp_path: Path) -> None:
    (tmp_path / "nvidia-smi").write_text("#!/bin/sh\nexit 9\n", encoding="utf-8")
    with start(gpu_machine, 1) as container:
        _, said = container.communicate()
    assert container.returncode == FAILED
    assert "COMPOSE_PROFILES=cpu" in said
    for driver, code in ((tmp_path / "none", FAILED), (tmp_path, 0)):
        check = subprocess.run(
            [sys.executable, str(CLAIM), "--check"], env={**gpu_machine, "GPU_DRIVER": str(driver)}, check=False
        )
        assert check.returncode == code
