"""deploy/kubernetes as kubectl renders it, with certificates as `treegrpo certs` makes them."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from services.certs.issue import make_certificates

DEPLOY = Path(__file__).parents[2] / "deploy"
pytestmark = pytest.mark.skipif(shutil.which("kubectl") is None, reason="there is no kubectl here; Debian's 1.20 is too old")


@pytest.fixture(scope="module")
def rendered(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("deploy")
    for name in ("kubernetes", "mosquitto"):
        shutil.copytree(DEPLOY / name, folder / name, ignore=shutil.ignore_patterns("certs"))
    make_certificates(folder / "kubernetes" / "certs", ["learner", "mosquitto", "retriever"], [])
    done = subprocess.run(["kubectl", "kustomize", "kubernetes"], cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def pods(rendered: str) -> dict[str, dict[str, Any]]:
    """The pod of each workload, by name."""
    return {
        one["metadata"]["name"]: one["spec"]["template"]["spec"]
        for one in yaml.safe_load_all(rendered)
        if "template" in one.get("spec", {})
    }


def test_every_pod_is_restricted_and_bounded(pods: dict[str, dict[str, Any]]) -> None:
    assert set(pods) == {"learner", "sampler", "retriever", "mosquitto"}
    for name, pod in pods.items():
        assert pod["securityContext"]["runAsNonRoot"], name
        for container in pod["containers"]:
            assert container["securityContext"]["readOnlyRootFilesystem"], name
            assert container["securityContext"]["capabilities"] == {"drop": ["ALL"]}, name
            assert container["resources"]["limits"]["memory"], name
            assert container["readinessProbe"], name
            assert ":" in container["image"], name
        for volume in pod["volumes"]:
            assert "emptyDir" not in volume or volume["emptyDir"]["sizeLimit"], name


def test_every_pod_is_reached_by_those_alone_who_need_it(rendered: str) -> None:
    policies = {one["metadata"]["name"]: one["spec"] for one in yaml.safe_load_all(rendered) if one["kind"] == "NetworkPolicy"}
    assert policies["nobody"] == {"podSelector": {}, "policyTypes": ["Ingress", "Egress"]}
    assert reached(policies["learner"]) == {(50051, "sampler"), (9400, "monitoring"), (9401, "monitoring")}
    assert reached(policies["sampler"]) == {(9402, "monitoring")}
    assert reached(policies["retriever"]) == {(8765, "sampler"), (8765, "monitoring")}
    assert reached(policies["mosquitto"]) == {(8883, "learner"), (8883, "sampler")}
    for caller, called in (("learner", "mosquitto"), ("sampler", "learner"), ("sampler", "mosquitto"), ("sampler", "retriever")):
        allowed = {(port, name) for port, name in reached(policies[caller], "egress", "to") if name == called}
        assert allowed == {(port, called) for port, name in reached(policies[called]) if name == caller}, (caller, called)


def reached(policy: dict[str, Any], direction: str = "ingress", peer: str = "from") -> set[tuple[int, str]]:
    """Ports, and the name of the pods or of the namespace at the other end."""
    return {
        (port["port"], name)
        for rule in policy.get(direction, ())
        for port in rule["ports"]
        for end in rule[peer]
        for selector in end.values()
        for name in selector["matchLabels"].values()
    }


def test_every_pod_has_the_secrets_of_its_role_alone(pods: dict[str, dict[str, Any]]) -> None:
    roles = {"mosquitto": "broker"}
    for name, pod in pods.items():
        secrets = [volume["secret"]["secretName"] for volume in pod["volumes"] if "secret" in volume]
        assert len(secrets) == 1
        assert secrets[0].startswith(f"{roles.get(name, name)}-"), name


def test_kubernetes_own_schemas_accept_it(rendered: str, tmp_path: Path) -> None:
    """With kubernetes-validate, whose program KUBERNETES_VALIDATE names."""
    if not (program := os.environ.get("KUBERNETES_VALIDATE")):
        pytest.skip("KUBERNETES_VALIDATE names no kubernetes-validate; .ci/run installs one")
    (path := tmp_path / "all.yaml").write_text(rendered, encoding="utf-8")
    done = subprocess.run([program, "--strict", "--quiet", str(path)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
