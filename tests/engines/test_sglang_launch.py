"""What an SGLang server is started with: a version on a file system in memory, and a command line."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

from services.sampler.engines.sglang.server.launch_command import (
    CPU_FLAGS,
    ServerLaunch,
    SGLangInstallation,
    check_installed,
    find_installation,
    parse_extra_flags,
)
from services.sampler.engines.sglang.server.weight_staging import WeightStaging
from tests.engines import builders
from tests.engines.sglang_stub import installed
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
    staging = WeightStaging(tmp_path)
    first = staging.stage_model(FIRST, model)
    second = staging.stage_weights(SECOND, weights)
    assert {file.name for file in second.path.iterdir()} == {file.name for file in first.path.iterdir()}
    assert (second.path / "model.safetensors").read_bytes() == (other / "model.safetensors").read_bytes()
    staging.remove_version(first)
    assert not (first.path / "model.safetensors").exists()
    third = staging.stage_weights(PolicyVersion(0, 2), weights)
    assert (third.path / "config.json").is_file()
    again = staging.stage_weights(FIRST, weights)
    assert {file.name for file in again.path.iterdir()} == {file.name for file in third.path.iterdir()}
    staging.remove_directory()
    assert not third.path.exists()


def test_weights_of_another_model_are_not_staged(tmp_path: Path, model: Path) -> None:
    other = builders.save_model(tmp_path / "other", "qwen2", hidden_size=16, num_attention_heads=2)
    staging = WeightStaging(tmp_path)
    first = staging.stage_model(FIRST, model)
    with pytest.raises(WeightsError, match="shape"):
        staging.stage_weights(SECOND, other)
    assert [path.name for path in first.path.parent.iterdir()] == ["0.0"]
    staging.remove_directory()


def test_a_directory_that_does_not_exist_is_named() -> None:
    with pytest.raises(ConfigError, match=r"engine\.weights_dir = /nowhere"):
        WeightStaging(Path("/nowhere"))


# ---- the command


def test_what_the_configuration_says_comes_last_and_a_cpu_gets_its_flags() -> None:
    shape: dict[str, Any] = {
        "context": 512,
        "max_running": 8,
        "cache_tokens": 1000,
        "dtype": "float32",
        "threads": 1,
        "seed": 3,
        "flags": parse_extra_flags("--schedule-policy fcfs"),
    }
    on_cpu = ServerLaunch(SGLangInstallation(Path("/py"), cuda=False), **shape)
    command = on_cpu.command_line(Path("/model"), "1.2", "127.0.0.1", 30000)
    assert command[-2:] == ["--schedule-policy", "fcfs"]
    assert set(CPU_FLAGS) <= set(command)
    assert on_cpu.environment()["SGLANG_USE_CPU_ENGINE"] == "1"
    on_gpu = ServerLaunch(SGLangInstallation(Path("/py"), cuda=True), **shape)
    assert not set(CPU_FLAGS) & set(on_gpu.command_line(Path("/model"), "1.2", "127.0.0.1", 30000))
    assert "SGLANG_USE_CPU_ENGINE" not in on_gpu.environment()


SHORT = ("--hos 0.0.0.0", "--por=5", "--api-k x", "--model-p /x", "--config x.yaml", "--skip-tok")
"""What argparse takes for one of them, and what would say one of them."""


@pytest.mark.parametrize("flags", ["--port 3", "--model-path=x", "--weight-version 1", "--api-key x", "--ssl-certfile=x", *SHORT])
def test_flags_that_follow_from_the_configuration_are_refused(flags: str) -> None:
    with pytest.raises(ConfigError, match="leave it out"):
        parse_extra_flags(flags)


@pytest.mark.parametrize("version", ["0.4.9", "0.5.20", "0.6.0", "1.0"])
def test_unsupported_versions_are_refused_and_supported_ones_named(version: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=rf"SGLang {version} in .*bin/python cannot be used; install 0\.5\.21 or 0\.5\.23"):
        find_installation(installed(tmp_path, version=version))


def test_supported_versions_are_returned(tmp_path: Path) -> None:
    for version in ("0.5.21", "0.5.23", "0.5.23.post1"):
        assert check_installed(installed(tmp_path / version, version=version)) == version


def test_a_missing_sglang_is_an_error_that_says_how_to_install_it(tmp_path: Path) -> None:
    for python in (tmp_path / "none", Path(sys.executable)):
        with pytest.raises(ConfigError, match=rf"SGLang is not installed.*{python}.*make sglang-cpu"):
            find_installation(python)
    broken = tmp_path / "broken"
    for text, sentence in (
        ("", "is not an executable program; install it"),
        ("no program", "cannot be used .*Exec format error"),
        ("#!/bin/sh\necho about >&2\necho out of order >&2\nexit 3\n", r"ended with code 3 \(out of order\); install it"),
        ("#!/bin/sh\necho hello\n", "reports an invalid version .'hello'.; install it"),
    ):
        broken.write_text(text)
        broken.chmod(0o755 if text else 0o644)
        with pytest.raises(ConfigError, match=rf"engine\.python = .*broken.*{sentence}"):
            find_installation(broken)
