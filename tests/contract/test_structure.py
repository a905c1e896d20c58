"""Packages stay small and without circles, and names stay plain and unique (`python -m tests.structure` measures both)."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest
import yaml

from tests.structure.harnesses import PAGE, with_list
from tests.structure.names import (
    bare_verbs,
    classes_named_twice,
    long_test_names,
    missing_replacements,
    patched_constants,
    retired_words,
)
from tests.structure.report import MOST_CLASSES, MOST_FILES, MOST_LEVELS
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


def test_no_package_is_too_large(product: Checkout) -> None:
    def is_too_large(package: Package) -> bool:
        return package.files > MOST_FILES or package.levels > MOST_LEVELS

    assert [package for package in product.packages if is_too_large(package)] == []


def test_no_packages_import_each_other_in_a_circle(product: Checkout) -> None:
    assert [package for package in product.packages if package.circles] == []


def test_no_class_has_the_name_of_another(everything: Checkout) -> None:
    assert classes_named_twice(everything) == {}


def test_no_bare_verb_is_a_method_of_many_classes(product: Checkout) -> None:
    assert {verb: owners for verb, owners in bare_verbs(product).items() if len(owners) > MOST_CLASSES} == {}


def test_no_retired_word_is_an_identifier(everything: Checkout) -> None:
    words = tomllib.loads(RETIRED.read_text("utf-8"))
    assert list(retired_words(everything.modules, words["replaced"], words["parts"])) == []


def test_each_replacement_of_a_retired_word_exists(everything: Checkout) -> None:
    retired = tomllib.loads(RETIRED.read_text("utf-8"))["replaced"]
    assert list(missing_replacements(everything.modules, retired)) == []


def test_tests_patch_no_constants() -> None:
    assert list(patched_constants(Checkout.parse(ROOT, ("tests", "bench")))) == []


def test_names_of_tests_are_short(everything: Checkout) -> None:
    assert list(long_test_names(everything, MOST_LETTERS)) == []


def test_the_map_of_packages_is_true(product: Checkout) -> None:
    text = (ROOT / "docs/architecture.md").read_text("utf-8").partition("## Packages")[2].partition("## ")[0]
    packages = {one.name.replace(".", "/") for one in product.packages if one.files}
    mapped = {name for name in re.findall(r"`([a-z_/]+)`", text) if "/" in name}
    assert packages <= mapped | {"treegrpo", "learner", "services"}
    assert mapped <= packages


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_a_document_wraps(document: Path) -> None:
    """But for what cannot be broken: a link, a span of code, and a line of a mermaid drawing."""
    wide = [line for line in document.read_text("utf-8").splitlines() if len(line) > MOST_COLUMNS and " " in _breakable(line)]
    assert wide == []


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_relative_links_lead_somewhere(document: Path) -> None:
    broken: list[str] = []
    for target in re.findall(r"\]\(([^)\s]+)\)", document.read_text("utf-8")):
        name, _, anchor = target.partition("#")
        path = document.parent / name if name else document
        if re.match(r"[a-z]+:", target):
            continue
        if not path.exists() or (anchor and path.suffix == ".md" and anchor not in _anchors(path)):
            broken.append(target)
    assert broken == []


def _anchors(document: Path) -> set[str]:
    """What a link to a place in a document may name."""
    text = document.read_text("utf-8")
    headings = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", one.lower()).replace(" ", "-") for one in headings} | set(re.findall(r'id="([^"]+)"', text))


def _breakable(line: str) -> str:
    """The line without what has to stay on one line."""
    return re.sub(r"`[^`]+`|\]\([^)]+\)|^ *(- |\d+\. )", "", line).strip()


def test_the_public_workflow_calls_every_stage_of_the_checks() -> None:
    script = (ROOT / ".ci/run").read_text("utf-8")
    stages = re.search(r"^STAGES=\((.+)\)$", script, re.MULTILINE)
    assert stages is not None
    workflow = yaml.safe_load((ROOT / ".github/workflows/ci.yml").read_text("utf-8"))
    assert workflow["jobs"]["stage"]["strategy"]["matrix"]["stage"] == stages[1].split()


def test_the_page_lists_every_harness() -> None:
    page = PAGE.read_text("utf-8")
    assert page == with_list(page), "run `python -m tests.structure.harnesses --write docs/testing.md`"
