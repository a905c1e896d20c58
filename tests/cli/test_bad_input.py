"""What a user can get wrong: one sentence, an exit code that says whether it may pass, no traceback, nothing left running."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest

from tests.cli.command_harness import CommandResult, treegrpo
from tests.cli.small_run import SmallRun
from tests.control.broker_processes import embedded
from treegrpo.runtime.entrypoint import FAILED, TRANSIENT


@pytest.fixture
def small_run(tmp_path: Path) -> SmallRun:
    return SmallRun(tmp_path)


def refused(result: CommandResult, *parts: str, code: int = FAILED) -> None:
    assert result.code == code
    assert result.left == []
    for part in parts:
        assert part in result.sentence


def test_an_unknown_key(small_run: SmallRun) -> None:
    refused(treegrpo("up", *small_run.flags(), "--train.stepps", "3"), "train.stepps", "the nearest is train.steps")


def test_a_bad_value(small_run: SmallRun) -> None:
    refused(treegrpo("up", *small_run.flags(train__steps="many")), "train.steps = 'many'", "the flag --train.steps")


def test_an_unknown_command() -> None:
    refused(treegrpo("upp"), "'upp' is not a command; the nearest is up")


def test_a_busy_port(small_run: SmallRun) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        refused(treegrpo("up", *small_run.flags(learner__listen=address)), f"learner.listen = {address} is taken")
    assert not small_run.run_dir.exists()


def test_an_engine_that_is_not_installed(small_run: SmallRun) -> None:
    flags = small_run.flags(engine__kind="sglang", engine__python="/nowhere/python")
    for command in ("up", "eval"):
        refused(treegrpo(command, *flags), "SGLang is not installed: engine.python = /nowhere/python", "make sglang-cpu")
    assert not small_run.run_dir.exists()


def test_a_broker_that_is_not_there(small_run: SmallRun) -> None:
    address = small_run.keys["broker.address"]
    for command in (["sampler"], ["learner"], ["state", "paused"]):
        result = treegrpo(*command, *small_run.flags())
        refused(result, f"No MQTT broker answers at broker.address = {address}", code=TRANSIENT)


async def test_a_learner_that_is_not_there(small_run: SmallRun) -> None:
    broker = embedded(small_run.keys["broker.address"])
    await broker.start()
    try:
        refused(treegrpo("sampler", *small_run.flags()), small_run.keys["learner.listen"], code=TRANSIENT)
    finally:
        await broker.stop()


def test_a_state_that_does_not_exist(small_run: SmallRun) -> None:
    refused(treegrpo("state", "asleep", *small_run.flags()), "'asleep' is not a run state", "paused")
    refused(treegrpo("state"), "running|paused|draining is missing")


def test_a_run_that_is_not_there_has_no_plot(small_run: SmallRun) -> None:
    refused(treegrpo("plot", *small_run.flags()), "nothing to plot")
