"""The contract passes its linter, and the stubs in the repository are what it generates."""

from __future__ import annotations

import subprocess
import sys
import sysconfig
from importlib import import_module
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
STUBS = Path("treegrpo") / "v1"


def sh(*command: str | Path, cwd: Path = ROOT) -> None:
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_stubs_are_current(tmp_path: Path) -> None:
    protos = sorted(str(path.relative_to(ROOT / "protos")) for path in (ROOT / "protos").rglob("*.proto"))
    outputs = [f"--{kind}_out={tmp_path}" for kind in ("python", "pyi", "grpc_python")]
    sh(sys.executable, "-m", "grpc_tools.protoc", "-I", ".", *outputs, *protos, cwd=ROOT / "protos")
    fresh = {path.name: path.read_bytes() for path in (tmp_path / STUBS).iterdir()}
    kept = {path.name: path.read_bytes() for path in (ROOT / STUBS).glob("*_pb2*")}
    assert sorted(kept) == sorted(fresh)
    assert [name for name in fresh if fresh[name] != kept[name]] == [], "run `make protos` and commit what it writes"


def test_the_contract_passes_its_linter() -> None:
    buf = Path(sysconfig.get_path("scripts")) / "buf"
    if not buf.is_file():
        pytest.skip("buf is not installed; it comes with the dev extra")
    sh(buf, "lint", "protos")


@pytest.mark.parametrize("package", ["treegrpo", "services", "learner"])
def test_the_packages_come_from_this_repository(package: str) -> None:
    found = import_module(package).__file__
    assert found is not None
    assert Path(found).parent == ROOT / package
