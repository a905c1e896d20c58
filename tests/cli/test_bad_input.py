"""What a user can get wrong: one sentence, an exit code that says whether it may pass, no traceback, nothing left running."""

from __future__ import annotations

import shutil
import socket
from pathlib import Path

import pytest

from tests.cli.machine import Result, treegrpo
from tests.cli.workbench import GEOHOP, Workbench, question, write_rows
from tests.control.brokers import embedded
from treegrpo.runtime.entrypoint import FAILED, TRANSIENT


@pytest.fixture
def bench(tmp_path: Path) -> Workbench:
    return Workbench(tmp_path)


def refused(result: Result, *parts: str, code: int = FAILED) -> None:
    assert result.code == code
    assert result.left == []
    for part in parts:
        assert part in result.sentence


def test_an_unknown_key(bench: Workbench) -> None:
    refused(treegrpo("up", *bench.flags(), "--train.stepps", "3"), "train.stepps", "the nearest is train.steps")


def test_a_bad_value(bench: Workbench) -> None:
    refused(treegrpo("up", *bench.flags(train__steps="many")), "train.steps = 'many'", "the flag --train.steps")


def test_an_unknown_command() -> None:
    refused(treegrpo("upp"), "'upp' is no command; the nearest is up")


def test_a_model_directory_without_config(bench: Workbench) -> None:
    model = shutil.copytree(GEOHOP / "model", bench.folder / "model")
    (model / "config.json").unlink()
    result = treegrpo("up", *bench.flags(model__path=str(model)))
    refused(result, str(model), "no config.json")
    assert not bench.run_dir.exists()


def test_a_corpus_row_without_contents(bench: Workbench) -> None:
    write_rows(bench.corpus, [{"id": "1", "contents": "A\na"}, {"id": "2"}])
    refused(treegrpo("up", *bench.flags()), str(bench.corpus), "line 2", "contents")
    assert not bench.run_dir.exists()


def test_a_question_without_an_answer(bench: Workbench) -> None:
    write_rows(bench.train, [question(0, "Ghazni", "Laos"), question(1, "Mubi", None)])
    refused(treegrpo("up", *bench.flags()), str(bench.train), "row 2")
    assert not bench.run_dir.exists()


def test_a_busy_port(bench: Workbench) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        refused(treegrpo("up", *bench.flags(learner__listen=address)), f"learner.listen = {address} is taken")
    assert not bench.run_dir.exists()


def test_an_engine_that_is_not_installed(bench: Workbench) -> None:
    flags = bench.flags(engine__kind="sglang", engine__python="/nowhere/python")
    for command in ("up", "eval"):
        refused(treegrpo(command, *flags), "SGLang is not installed: engine.python = /nowhere/python", "make sglang-cpu")
    assert not bench.run_dir.exists()


def test_a_broker_that_is_not_there(bench: Workbench) -> None:
    address = bench.keys["broker.address"]
    for command in (["sampler"], ["learner"], ["state", "paused"]):
        result = treegrpo(*command, *bench.flags())
        refused(result, f"No MQTT broker answers at broker.address = {address}", code=TRANSIENT)


async def test_a_learner_that_is_not_there(bench: Workbench) -> None:
    broker = embedded(bench.keys["broker.address"])
    await broker.start()
    try:
        refused(treegrpo("sampler", *bench.flags()), bench.keys["learner.listen"], code=TRANSIENT)
    finally:
        await broker.stop()


def test_a_state_that_does_not_exist(bench: Workbench) -> None:
    refused(treegrpo("state", "asleep", *bench.flags()), "'asleep' is no run state", "paused")
    refused(treegrpo("state"), "running|paused|draining is missing")


def test_a_run_that_is_not_there_has_no_plot(bench: Workbench) -> None:
    refused(treegrpo("plot", *bench.flags()), "nothing to plot")
