"""docker-compose.yml as a text: what every service of it has to have, whatever engine runs it."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from learner.__main__ import GRACE_SECONDS
from learner.trainer.distributed.rank_launcher import DRAIN_SECONDS as TRAINER_SECONDS
from services.sampler.service import DRAIN_SECONDS as SAMPLER_SECONDS
from treegrpo.config.schema import Config

ROOT = Path(__file__).parents[2]
COMPOSE = (ROOT / "docker-compose.yml").read_text(encoding="utf-8")
FILE = yaml.safe_load(COMPOSE)
SERVICES: dict[str, dict[str, Any]] = FILE["services"]
ONE_SHOT = {"init", "operator", "gpu-check"}
"""They end by themselves: their exit code is their health."""
LASTING = sorted(set(SERVICES) - ONE_SHOT)
THEIRS = {"mosquitto", "prometheus", "grafana"}
"""Images that are not ours."""


def seconds(text: str) -> int:
    number, unit = re.fullmatch(r"(\d+)([sm])", text).groups()  # pyright: ignore[reportOptionalMemberAccess]
    return int(number) * {"s": 1, "m": 60}[unit]


@pytest.mark.parametrize("name", sorted(SERVICES))
def test_every_service_is_bounded_and_without_rights(name: str) -> None:
    service = SERVICES[name]
    assert service["mem_limit"]
    assert 0 < service["pids_limit"] <= 8192
    assert service["cap_drop"] == ["ALL"]
    assert service["security_opt"] == ["no-new-privileges:true"]
    assert service["read_only"] or name == "sampler-gpu", "SGLang compiles kernels into its own folders"
    assert service["logging"]["options"] == {"max-size": "10m", "max-file": "5"}
    assert "container_name" not in service
    assert not service.get("user", "10001").startswith("0")
    assert ("user" in service) == (name in THEIRS), "our images name their user themselves"


@pytest.mark.parametrize("name", LASTING)
def test_every_lasting_service_has_health_check_restart_and_dependencies(name: str) -> None:
    service = SERVICES[name]
    assert service["healthcheck"]["test"][0] == "CMD", "there may be no shell"
    assert service["restart"] == ("on-failure" if name.startswith("learner") else "unless-stopped")
    conditions = {
        needed: {"service_completed_successfully"} if needed in ONE_SHOT else {"service_healthy"}
        for needed in service["depends_on"]
    }
    assert conditions == {needed: {how["condition"]} for needed, how in service["depends_on"].items()}


@pytest.mark.parametrize("name", ["learner", "learner-gpu", "sampler", "sampler-gpu"])
def test_a_stop_takes_longer_than_a_drain(name: str) -> None:
    drain = TRAINER_SECONDS + GRACE_SECONDS if name.startswith("learner") else SAMPLER_SECONDS
    assert seconds(SERVICES[name]["stop_grace_period"]) > drain


def test_only_the_two_pages_are_published_and_only_here() -> None:
    published = {name: service["ports"] for name, service in SERVICES.items() if "ports" in service}
    assert published == {
        "prometheus": ["127.0.0.1:${PROMETHEUS_PORT:-9090}:9090"],
        "grafana": ["127.0.0.1:${GRAFANA_PORT:-3000}:3000"],
    }


def test_every_image_is_of_one_version() -> None:
    bases = [line for path in (ROOT / "deploy").glob("Dockerfile.*") for line in path.read_text(encoding="utf-8").splitlines()]
    named = [service["image"] for service in SERVICES.values()]
    named += [line.partition("=")[2] for line in bases if re.match(r"ARG \w+_IMAGE=", line)]
    assert len(named) == len(SERVICES) + 4 - 1
    for image in named:
        default = re.sub(r"\$\{\w+:-(.*)\}", r"\1", image)
        assert re.fullmatch(r"[a-z0-9/-]+:v?\d[\w.-]*", default), image


def test_every_key_of_the_configuration_that_is_set_is_one() -> None:
    named = re.findall(r"\bTREEGRPO_[A-Z_]+", COMPOSE + (ROOT / ".env.example").read_text(encoding="utf-8"))
    named += re.findall(r"TREEGRPO_[A-Z_]+", (ROOT / "deploy" / "kubernetes" / "kustomization.yaml").read_text(encoding="utf-8"))
    keys = {name.removeprefix("TREEGRPO_").lower() for name in named} - {"section__key"}
    known = {f"{section}__{key}" for section, field in Config.model_fields.items() for key in fields(field.annotation)}
    assert len(keys) > 12
    assert keys <= known


def fields(section: Any) -> set[str]:
    """The keys of a section."""
    return set(section.model_fields)


def test_kubernetes_takes_the_same_images() -> None:
    images = yaml.safe_load((ROOT / "deploy" / "kubernetes" / "kustomization.yaml").read_text(encoding="utf-8"))["images"]
    for image in images:
        assert any(f"{image['name']}:{image['newTag']}" in service["image"] for service in SERVICES.values()), image


def test_what_a_run_needs_to_go_on_is_in_volumes_that_down_keeps() -> None:
    places = {"run": "/var/lib/treegrpo", "journal": "/var/lib/treegrpo/journal", "weights": "/var/lib/treegrpo/weights"}
    for learner in ("learner", "learner-gpu"):
        assert {f"{volume}:{place}" for volume, place in places.items()} <= set(SERVICES[learner]["volumes"])
    assert "metrics:/prometheus" in SERVICES["prometheus"]["volumes"]
    assert {*places, "metrics"} <= set(FILE["volumes"])


def test_no_password_is_in_the_environment() -> None:
    for name, service in SERVICES.items():
        for key, value in service.get("environment", {}).items():
            assert not re.search("PASSWORD|TOKEN|SECRET", key) or str(value).startswith("/secrets/"), f"{name}: {key}"


def test_profiles_share_what_is_of_no_profile() -> None:
    profiles = {name: service["profiles"] for name, service in SERVICES.items() if "profiles" in service}
    assert profiles == {
        "learner": ["cpu"],
        "sampler": ["cpu"],
        "operator": ["tools"],
        "gpu-check": ["gpu"],
        "learner-gpu": ["gpu"],
        "sampler-gpu": ["gpu"],
    }
    for name in ("learner-gpu", "sampler-gpu"):
        (device,) = SERVICES[name]["deploy"]["resources"]["reservations"]["devices"]
        assert device == {"driver": "nvidia", "count": "all", "capabilities": ["gpu"]}
        assert "gpus:/gpus" in SERVICES[name]["volumes"], "where they agree on who has which"


def test_the_example_of_the_environment_names_what_the_file_asks_for() -> None:
    asked = set(re.findall(r"(?<!\$)\$\{(\w+)", COMPOSE))
    example = (ROOT / ".env.example").read_text(encoding="utf-8")
    assert "\nCOMPOSE_PROFILES=cpu\n" in example
    shown = set(re.findall(r"^#?([A-Z_]+)=", example, re.MULTILINE))
    assert shown - asked == {"TREEGRPO_TRAIN__STEPS"}
    assert asked - shown == {"ENV_FILE"}, "which tests set"
    for image in re.findall(r"^#\w+_IMAGE=registry.example.org/(.*)$", example, re.MULTILINE):
        assert any(f":-{image}}}" in line for line in COMPOSE.splitlines()), image
