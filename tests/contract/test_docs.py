"""What the documents name is there."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
TESTS = {
    str(path.relative_to(ROOT)): re.findall(r"^(?:async )?def (test_\w+)", path.read_text(encoding="utf-8"), re.MULTILINE)
    for path in (ROOT / "tests").rglob("test_*.py")
}
DOCUMENTS = sorted((ROOT / "docs").glob("*.md"))


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_every_test_that_a_document_names_is_there(document: Path) -> None:
    """As ``area/test_file.py::test_name…``, ``::test_name``, or ``test_name``; "…" stands for the rest of a name."""
    missing: list[str] = []
    for named in re.findall(r"`([^`\n]*test_[^`\n]*)`", document.read_text(encoding="utf-8")):
        match = re.fullmatch(r"(?:(?:tests/)?(?P<file>[\w/]+\.py))?(?:::)?(?P<name>…?test_\w*…?|…\w+…)?", named)
        if match is None:
            continue
        file, name = match["file"], match["name"]
        files = [names for path, names in TESTS.items() if not file or f"/{path}".endswith(f"/{file}")]
        pattern = re.compile((name or "…").replace("…", r"\w*"))
        if not any(pattern.fullmatch(one) for names in files for one in names):
            missing.append(named)
    assert missing == []


def test_the_documents_do_name_tests() -> None:
    """Else the one above would have nothing to find."""
    assert sum(document.read_text(encoding="utf-8").count("test_") for document in DOCUMENTS) > 50
