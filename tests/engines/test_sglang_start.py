"""What an SGLang server is started with: a version on a file system in memory, and a command line."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

from services.sampler.engines.sglang.api.launch_command import CPU, Installed, Launch, check_installed, find, own_flags
from services.sampler.engines.sglang.weight_staging import Stage
from tests.engines import builders
from tests.engines.stubs import installed
from treegrpo.core.step import PolicyVersion
from treegrpo.errors import ConfigError, WeightsError

FIRST, SECOND = PolicyVersion(0, 0), PolicyVersion(0, 1)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return builders.save_model(tmp_path_factory.mktemp("model"), "qwen2", seed=2)


# ---- versions


def test_a_staged_version_is_complete_and_the_one_before_can_go(tmp_path: Path, model: Path) -> None:
    weights = tmp_path / "weights"
    weights.mkdir()
    other = builders.save_model(tmp_path / "other", "qwen2", seed=3)
    (weights / "model.safetensors").write_bytes((other / "model.safetensors").read_bytes())
    stage = Stage(tmp_path)
    first = stage.first(FIRST, model)
    second = stage.put(SECOND, weights)
    assert {file.name for file in second.path.iterdir()} == {file.name for file in first.path.iterdir()}
    assert (second.path / "model.safetensors").read_bytes() == (other / "model.safetensors").read_bytes()
    stage.drop(first)
    assert not (first.path / "model.safetensors").exists()
    third = stage.put(PolicyVersion(0, 2), weights)
    assert (third.path / "config.json").is_file()
    again = stage.put(FIRST, weights)
    assert {file.name for file in again.path.iterdir()} == {file.name for file in third.path.iterdir()}
    stage.close()
    assert not third.path.exists()


def test_weights_of_another_model_are_not_staged(tmp_path: Path, model: Path) -> None:
    other = builders.save_model(tmp_path / "other", "qwen2", hidden_size=16, num_attention_heads=2)
    stage = Stage(tmp_path)
    first = stage.first(FIRST, model)
    with pytest.raises(WeightsError, match="shape"):
        stage.put(SECOND, other)
    assert [path.name for path in first.path.parent.iterdir()] == ["0.0"]
    stage.close()


def test_a_directory_that_does_not_exist_is_named() -> None:
    with pytest.raises(ConfigError, match=r"engine\.weights_dir = /nowhere"):
        Stage(Path("/nowhere"))


# ---- the command


def test_what_the_configuration_says_comes_last_and_a_cpu_gets_its_flags() -> None:
    shape: dict[str, Any] = {
        "context": 512,
        "max_running": 8,
        "cache_tokens": 1000,
        "dtype": "float32",
        "threads": 1,
        "seed": 3,
        "flags": own_flags("--schedule-policy fcfs"),
    }
    on_cpu = Launch(Installed(Path("/py"), cuda=False), **shape)
    command = on_cpu.command(Path("/model"), "1.2", "127.0.0.1", 30000)
    assert command[-2:] == ["--schedule-policy", "fcfs"]
    assert set(CPU) <= set(command)
    assert on_cpu.environment()["SGLANG_USE_CPU_ENGINE"] == "1"
    on_gpu = Launch(Installed(Path("/py"), cuda=True), **shape)
    assert not set(CPU) & set(on_gpu.command(Path("/model"), "1.2", "127.0.0.1", 30000))
    assert "SGLANG_USE_CPU_ENGINE" not in on_gpu.environment()


SHORT = ("--hos 0.0.0.0", "--por=5", "--api-k x", "--model-p /x", "--config x.yaml", "--skip-tok")
"""What argparse takes for one of them, and what would say one of them."""


@pytest.mark.parametrize("flags", ["--port 3", "--model-path=x", "--weight-version 1", "--api-key x", "--ssl-certfile=x", *SHORT])
def test_flags_that_follow_from_the_configuration_are_refused(flags: str) -> None:
    with pytest.raises(ConfigError, match="leave it out"):
        own_flags(flags)


@pytest.mark.parametrize("version", ["0.4.9", "0.5.20", "0.6.0", "1.0"])
def test_versions_that_cannot_be_used_are_refused_with_those_that_can(version: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=rf"SGLang {version} in .*bin/python cannot be used; install 0\.5\.21 or 0\.5\.23"):
        find(installed(tmp_path, version=version))


def test_versions_that_can_be_used_are_told(tmp_path: Path) -> None:
    for version in ("0.5.21", "0.5.23", "0.5.23.post1"):
        assert check_installed(installed(tmp_path / version, version=version)) == version


def test_without_sglang_how_to_install_it_is_said(tmp_path: Path) -> None:
    for python in (tmp_path / "none", Path(sys.executable)):
        with pytest.raises(ConfigError, match=rf"SGLang is not installed.*{python}.*make sglang-cpu"):
            find(python)
    broken = tmp_path / "broken"
    for text, sentence in (
        ("", "is no program that may be run; install it"),
        ("no program", "cannot be used .*Exec format error"),
        ("#!/bin/sh\necho about >&2\necho out of order >&2\nexit 3\n", r"ended with code 3 \(out of order\); install it"),
        ("#!/bin/sh\necho hello\n", "of its SGLang is no version .'hello'.; install it"),
    ):
        broken.write_text(text)
        broken.chmod(0o755 if text else 0o644)
        with pytest.raises(ConfigError, match=rf"engine\.python = .*broken.*{sentence}"):
            find(broken)
