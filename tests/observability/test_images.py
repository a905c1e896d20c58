"""What the images are built of: packages by the hashes of their files, and images of others by digests."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from deploy import image_digests, packages

ROOT = Path(__file__).parents[2]
PIN = re.compile(r"^([\w.-]+)==(\S+)((?: \\\n    --hash=sha256:[0-9a-f]{64})+)$", re.MULTILINE)


def name(text: str) -> str:
    return re.sub(r"[-_.]+", "-", text).lower()


def lock(image: str) -> dict[str, str]:
    """Versions by package, of what is locked by hashes for ``image``."""
    text = (ROOT / "deploy" / f"requirements-{image}.lock").read_text(encoding="utf-8")
    found = {name(package): version for package, version, _ in PIN.findall(text)}
    assert len(found) == text.count("=="), "a line without a hash"
    return found


def test_each_package_of_an_image_is_known_by_its_hashes() -> None:
    pins = dict(line.split("==") for line in (ROOT / "constraints.txt").read_text(encoding="utf-8").split())
    pins = {name(package): version for package, version in pins.items()}
    learner, sampler = lock("learner"), lock("sampler")
    assert sampler.items() <= learner.items(), "the sampler's layer is below the learner's"
    differing = {package for package, version in learner.items() if pins.get(package, version) != version}
    assert not differing, "run `make lock`"
    needed = {name(re.split(r"[\[<>=~!;]", line)[0]) for line in packages.dependencies(str(ROOT / "pyproject.toml"), [])}
    assert needed - set(learner) == {"torch"}, "run `make lock`; torch's build is of another index"


@pytest.mark.parametrize("image", ["learner", "sampler"])
def test_an_image_installs_nothing_else_but_torch_and_us(image: str) -> None:
    lines = (ROOT / "deploy" / f"Dockerfile.{image}").read_text(encoding="utf-8").replace("\\\n", " ")
    for command in re.findall(r"pip install (.*?)(?: &&|$)", lines, re.MULTILINE):
        hashed, torch = "--no-deps --require-hashes -r" in command, re.search(r"-c constraints\.txt .* torch\s*$", command)
        assert hashed or torch or command.endswith("--no-deps treegrpo-*.whl"), command


def test_what_sglangs_image_lacks_is_of_our_versions(tmp_path: Path) -> None:
    (installed := tmp_path / "installed.txt").write_text("Torch==2.9\nhuggingface-hub @ file:///x\n", encoding="utf-8")
    (constraints := tmp_path / "constraints.txt").write_text(
        "aiomqtt==2.5.1\ntorch==2.13.0\nhuggingface_hub==2.4.0\n", encoding="utf-8"
    )
    program = [sys.executable, str(ROOT / "deploy" / "packages.py"), "--not-installed", str(constraints), str(installed)]
    assert subprocess.run(program, capture_output=True, text=True, check=True).stdout == "aiomqtt==2.5.1\n"
    assert "-c installed.txt -c others.txt" in (ROOT / "deploy" / "Dockerfile.sampler-sglang").read_text(encoding="utf-8")


def test_every_third_party_image_can_be_pinned_by_its_digest() -> None:
    assert set(image_digests.image_names()) == {
        f"{one}_IMAGE" for one in ("PYTHON", "SGLANG", "MOSQUITTO", "PROMETHEUS", "GRAFANA")
    }
    found = "sha256:" + "0" * 64
    assert image_digests.image_digest("python:3.11", (sys.executable, "-c", f"print('{found}')")) == found
    failing = (sys.executable, "-c", "raise SystemExit('no such host')")
    with pytest.raises(ValueError, match=r"no digest of python:3\.11 \(no such host\); check that docker reaches it"):
        image_digests.image_digest("python:3.11", failing)


def test_keys_and_passwords_get_into_no_commit_and_no_image() -> None:
    for path in (".gitignore", ".dockerignore"):
        lines = (ROOT / path).read_text(encoding="utf-8").splitlines()
        assert {"*.key", "*.pem", "*.password", "*.token"} <= {line.removeprefix("**/") for line in lines}, path
