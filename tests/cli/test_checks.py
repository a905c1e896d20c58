from __future__ import annotations

import json
import shutil
import socket
from pathlib import Path

import pytest
import torch

from learner.trainer.packing.model import load_model
from services.cli.checks.check import run_checks
from services.cli.checks.model_checks import check_model, check_tokenizer
from services.cli.checks.run_checks import (
    ListenAddress,
    QuestionFiles,
    all_addresses,
    check_addresses,
    check_corpus,
    check_engine,
    check_run_dir,
    check_sampler_metrics,
    learner_addresses,
    up_checks,
)
from services.cli.doctor import check_findings, diagnose, machine_findings
from tests.cli.small_run import GEOHOP, SmallRun
from tests.control.broker_processes import embedded
from treegrpo.config.loader import load_config
from treegrpo.config.schema import Config, RunConfig
from treegrpo.errors import AddressInUseError, ConfigError, DataError, ModelError


def test_a_complete_run_passes_all_checks(tmp_path: Path) -> None:
    run_checks(up_checks(load_config(None, SmallRun(tmp_path).flags())).values())


@pytest.mark.parametrize(
    ("missing", "sentence"),
    [
        ("config.json", "it has no config.json"),
        ("model.safetensors", "model.safetensors does not exist"),
    ],
)
def test_an_incomplete_model_directory_says_what_it_lacks(tmp_path: Path, missing: str, sentence: str) -> None:
    model = shutil.copytree(GEOHOP / "model", tmp_path / "model")
    (model / missing).unlink()
    with pytest.raises(ModelError, match=sentence):
        check_model(model, "embedded", 256)


def test_a_model_that_is_not_there_or_not_json_is_named(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="there is no such directory"):
        check_model(tmp_path / "absent", "embedded", 256)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ModelError, match="is not valid JSON"):
        check_model(tmp_path, "embedded", 256)


@pytest.mark.parametrize(
    ("name", "text", "sentence"),
    [
        ("config.json", "[]", "is not a JSON object"),
        ("config.json", '{"model_type": "gpt2", "vocab_size": 8}', "the embedded engine runs llama, qwen2, qwen3"),
        ("config.json", '{"model_type": "qwen2"}', "has vocab_size None"),
        ("model.safetensors", "torn", "model.safetensors cannot be read"),
    ],
)
def test_a_model_that_cannot_be_served_is_found_before_the_start(tmp_path: Path, name: str, text: str, sentence: str) -> None:
    model = shutil.copytree(GEOHOP / "model", tmp_path / "model")
    (model / name).write_text(text)
    with pytest.raises(ModelError, match=sentence):
        check_model(model, "embedded", 256)


def test_a_tokenizer_that_is_missing_or_broken_is_found_before_the_start(tmp_path: Path) -> None:
    model = shutil.copytree(GEOHOP / "model", tmp_path / "model")
    (model / "tokenizer.json").write_text("{}")
    with pytest.raises(ModelError, match=r"The tokenizer in .* cannot be read"):
        check_tokenizer(model)
    (model / "tokenizer.json").unlink()
    with pytest.raises(ModelError, match="has no tokenizer"):
        check_tokenizer(model)


def test_a_model_type_of_sglang_alone_is_refused_for_the_embedded_engine(tmp_path: Path) -> None:
    model = shutil.copytree(GEOHOP / "model", tmp_path / "model")
    config = json.loads((model / "config.json").read_text(encoding="utf-8"))
    (model / "config.json").write_text(json.dumps(config | {"model_type": "mistral"}))
    assert "(mistral, all values finite)" in check_model(model, "sglang", 256)
    with pytest.raises(ModelError, match="use SGLang for others"):
        check_model(model, "embedded", 256)
    flags = SmallRun(tmp_path).flags(model__path=str(model), engine__kind="sglang")
    assert "(mistral," in up_checks(load_config(None, flags))["model"]()


def test_the_doctor_takes_a_kind_with_another_config_for_a_finding(tmp_path: Path) -> None:
    model = shutil.copytree(GEOHOP / "model", tmp_path / "model")
    config = json.loads((model / "config.json").read_text(encoding="utf-8"))
    (model / "config.json").write_text(json.dumps(config | {"model_type": "qwen2_vl"}))
    found = check_findings(up_checks(load_config(None, SmallRun(tmp_path).flags(model__path=str(model)))))
    assert [finding.subject for finding in found if "qwen2_vl" in finding.text and finding.verdict == "fail"] == ["model"]


def test_code_beside_a_model_is_not_run_and_nobody_is_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = shutil.copytree(GEOHOP / "model", tmp_path / "model")
    config = json.loads((model / "config.json").read_text(encoding="utf-8"))
    auto_map = {"AutoConfig": "other.Config", "AutoModelForCausalLM": "other.Model"}
    (model / "config.json").write_text(json.dumps(config | {"model_type": "other", "auto_map": auto_map}))
    (model / "other.py").write_text("raise SystemExit(7)")

    def asked(_question: str) -> str:
        pytest.fail("somebody is asked")

    monkeypatch.setattr("builtins.input", asked)
    with pytest.raises(ModelError, match=r"config\.json cannot be used"):
        check_model(model, "sglang", 256)
    with pytest.raises(ModelError, match="cannot be loaded"):
        load_model(model, torch.device("cpu"))


def test_files_that_are_not_there_are_named_with_their_key(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"data\.train = .*absent\.jsonl does not exist"):
        QuestionFiles(load_config(None, ["--data.train", str(tmp_path / "absent.jsonl")])).check_file("data.train")
    with pytest.raises(DataError, match=r"retriever\.corpus = .*absent\.jsonl does not exist"):
        check_corpus(tmp_path / "absent.jsonl")


def test_a_busy_port_is_named_with_its_key() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        with pytest.raises(AddressInUseError, match=rf"learner\.listen = {address} is taken"):
            check_addresses([ListenAddress("learner.listen", address)])


def test_two_parts_at_one_address_are_both_named() -> None:
    config = load_config(None, ["--learner.metrics", "127.0.0.1:40000", "--learner.listen", "127.0.0.1:40001"])
    with pytest.raises(AddressInUseError, match=r"learner\.listen and learner\.metrics .* are both 127\.0\.0\.1:40001"):
        check_addresses(learner_addresses(config))


def test_several_samplers_cannot_share_a_metrics_port() -> None:
    with pytest.raises(ConfigError, match="would be shared by 2 samplers"):
        check_sampler_metrics(load_config(None, ["--sampler.metrics", "127.0.0.1:9500"]))
    check_sampler_metrics(load_config(None, ["--sampler.metrics", "127.0.0.1:9500", "--sampler.count", "1"]))


def test_an_sglang_that_cannot_be_started_is_found_before_anything_is() -> None:
    def refused(error: type[Exception], sentence: str, *flags: str) -> None:
        config = load_config(None, ["--engine.kind", "sglang", *flags])
        with pytest.raises(error, match=sentence):
            check_engine(config, config.sampler.count)

    address = "127.0.0.1:30000"
    refused(ConfigError, r"engine\.listen = '127\.0\.0\.1' is not an address", "--engine.listen", "127.0.0.1")
    refused(ConfigError, r"engine\.listen = .* would be shared by the SGLang servers of 2 samplers", "--engine.listen", address)
    refused(ConfigError, r"engine\.urls would be shared by 2 samplers", "--engine.urls", '["http://127.0.0.1:30000"]')
    twice = '["http://127.0.0.1:30000", "http://localhost:30000/"]'
    refused(ConfigError, r"engine\.urls has one server twice, as .* and as", "--engine.urls", twice, "--sampler.count", "1")
    refused(ConfigError, r"engine\.flags has --port", "--engine.flags=--port 3")
    refused(ConfigError, r"engine\.weights_dir = /nowhere does not exist", "--engine.weights_dir", "/nowhere")
    refused(ConfigError, r"engine\.weights_dir = /proc cannot be written to", "--engine.weights_dir", "/proc")
    refused(ConfigError, "SGLang is not installed.*make sglang-cpu", "--engine.python", "/nowhere/python")
    check_engine(load_config(None, ["--engine.python", "/nowhere/python"]), 1)


def test_where_an_engine_listens_is_an_address_like_the_others() -> None:
    address = "127.0.0.1:40000"
    flags = ("--engine.listen", address, "--broker.address", address)
    assert ListenAddress("engine.listen", address) not in all_addresses(load_config(None, flags))
    with pytest.raises(AddressInUseError, match=rf"broker\.address and engine\.listen are both {address}"):
        check_addresses(all_addresses(load_config(None, ["--engine.kind", "sglang", *flags])))


async def test_the_doctor_takes_the_ports_of_a_run_that_is_up_for_no_fault(tmp_path: Path) -> None:
    small_run = SmallRun(tmp_path)
    config = load_config(None, small_run.flags())
    broker = embedded(config.broker.address)
    await broker.start()
    try:
        verdicts = {finding.subject: finding.verdict for finding in await diagnose(config)}
    finally:
        await broker.stop()
    assert (verdicts["broker"], verdicts["ports"], verdicts["learner"]) == ("ok", "warn", "warn")


def test_the_doctor_finds_every_fault_and_the_machine_fit(tmp_path: Path) -> None:
    small_run = SmallRun(tmp_path)
    small_run.corpus.write_text("{}\n")
    small_run.train.unlink()
    verdicts = {finding.subject: finding.verdict for finding in check_findings(up_checks(load_config(None, small_run.flags())))}
    assert {subject for subject, verdict in verdicts.items() if verdict == "fail"} == {"corpus", "training questions"}
    assert all(finding.verdict != "fail" for finding in machine_findings())


def test_a_run_directory_that_cannot_be_made_is_refused() -> None:
    config = Config(run=RunConfig(dir=Path("/proc/nowhere/run")))
    with pytest.raises(ConfigError, match=r"run\.dir = /proc/nowhere/run cannot be written to \(.*\); choose another directory"):
        check_run_dir(config)
