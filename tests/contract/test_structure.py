"""Packages stay small and without circles, and names stay plain and unique (`python -m tests.structure` measures both)."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml

from tests.structure.names import (
    classes_named_twice,
    long_test_names,
    patched_constants,
    retired_words,
)
from tests.structure.source import AROUND, PRODUCT, Checkout, Package

ROOT = Path(__file__).resolve().parents[2]
RETIRED = Path(__file__).with_name("retired_words.toml")
MOST_LETTERS = 70
"""Of the name of a test."""
MOST_COLUMNS = 100
"""Of a line of a document."""
DOCUMENTS = sorted(path for pattern in ("*.md", "docs/**/*.md", "bench/*.md", "examples/**/*.md") for path in ROOT.glob(pattern))


@pytest.fixture(scope="module")
def product() -> Checkout:
    return Checkout.parse(ROOT)


@pytest.fixture(scope="module")
def everything() -> Checkout:
    return Checkout.parse(ROOT, PRODUCT + AROUND)


def test_the_map_of_packages_names_every_package(product: Checkout) -> None:
    text = (ROOT / "docs/architecture.md").read_text("utf-8")
    missing = [name for name in (one.name.replace(".", "/") for one in product.packages) if f"`{name}`" not in text]
    assert missing == []


def test_the_public_workflow_calls_every_stage_of_the_checks() -> None:
    script = (ROOT / ".ci/run").read_text("utf-8")
    stages = re.search(r"^STAGES=\((.+)\)$", script, re.MULTILINE)
    assert stages is not None
    workflow = yaml.safe_load((ROOT / ".github/workflows/ci.yml").read_text("utf-8"))
    assert workflow["jobs"]["stage"]["strategy"]["matrix"]["stage"] == stages[1].split()


def test_a_circle_and_its_levels_are_seen(tmp_path: Path) -> None:
    files = {
        "treegrpo/__init__.py": "",
        "treegrpo/low/__init__.py": "",
        "treegrpo/low/one.py": "from treegrpo.high import two\n",
        "treegrpo/high/__init__.py": "",
        "treegrpo/high/two.py": "import treegrpo.low.one\n",
        "treegrpo/top.py": "from treegrpo.high.two import x\n",
    }
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    found = {package.name: package for package in Checkout.parse(tmp_path).packages}
    assert found["treegrpo"] == Package("treegrpo", files=1, levels=2, arrows=3, circles=(("high", "low"),))


def test_names_that_break_the_rules_are_seen(tmp_path: Path) -> None:
    (tmp_path / "tests").mkdir()
    (tmp_path / "tests/test_it.py").write_text(
        "class Same: ...\nclass Same: ...\n"
        "def test_x(monkeypatch, module):\n"
        "    desk = monkeypatch.setattr(module, 'LIMIT_SECONDS', 1)\n"
        "    monkeypatch.setattr('a.b.LIMIT', 1)\n"
        "    module.LIMIT = 2\n"
        "    monkeypatch.setattr(module, 'method', desk)\n"
    )
    checkout = Checkout.parse(tmp_path, ("tests",))
    assert list(classes_named_twice(checkout)) == ["Same"]
    assert {found.rpartition(" ")[2] for found in patched_constants(checkout)} == {"LIMIT_SECONDS", "a.b.LIMIT", "module.LIMIT"}
    assert [found.partition(" ")[0] for found in retired_words(checkout.modules, {"desk": "coordinator"})] == [
        "tests/test_it.py:4:",
        "tests/test_it.py:7:",
    ]
    assert list(long_test_names(checkout, 5)) == ["tests/test_it.py:3: test_x (6)"]
