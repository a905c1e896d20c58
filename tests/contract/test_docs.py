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


NAMING = sorted(
    path
    for pattern in (
        "*.md",
        "docs/**/*.md",
        "bench/*.md",
        "examples/**/*.md",
        "treegrpo/*.py",
        "learner/**/*.py",
        "services/**/*.py",
    )
    for path in ROOT.glob(pattern)
    if path.name != "CHANGELOG.md"  # the past
)
"""What points to files, modules and constants of the code: documents, and the docstrings of the product."""
FILES = [
    path.relative_to(ROOT).as_posix()
    for folder in ("bench", "deploy", "docs", "examples", "learner", "protos", "services", "tests", "treegrpo")
    for path in (ROOT / folder).rglob("*.*")
]
READ = ("docker-compose.yml", ".env.example", *(name for name in FILES if name.endswith((".py", ".yml", ".yaml", ".sh"))))
CODE = "\n".join((ROOT / name).read_text(encoding="utf-8") for name in READ if name != "tests/contract/test_docs.py")


def _is_there(pointer: str) -> bool:
    """Whether what a backquoted pointer names exists; what is no pointer to the code passes."""
    if re.fullmatch(r"[\w./-]+\.(py|proto)", pointer):
        return any(f"/{name}".endswith(f"/{pointer}") for name in FILES)
    if re.fullmatch(r"[A-Z][A-Z0-9]*(_[A-Z0-9]+)+", pointer):
        return re.search(rf"\b{pointer}\b", CODE) is not None
    if re.fullmatch(r"(treegrpo|learner|services|bench|tests)(\.\w+)+", pointer) and not pointer.endswith(".internal"):
        return _is_module_or_member(ROOT, pointer.split("."))
    return True


def _is_module_or_member(folder: Path, parts: list[str]) -> bool:
    """Whether ``parts`` lead from ``folder`` to a module or package, or to a name in one."""
    name, *rest = parts
    if (folder / name).is_dir() and rest and _is_module_or_member(folder / name, rest):
        return True
    file = folder / f"{name}.py" if (folder / f"{name}.py").is_file() else folder / name / "__init__.py"
    return file.is_file() and (not rest or re.search(rf"\b{rest[0]}\b", file.read_text(encoding="utf-8")) is not None)


def test_every_file_module_and_constant_that_is_pointed_to_exists() -> None:
    stale = [
        f"{path.relative_to(ROOT)}: {pointer}"
        for path in NAMING
        for pointer in re.findall(r"`([^`\n]+)`", path.read_text(encoding="utf-8"))
        if not _is_there(pointer)
    ]
    assert stale == []


@pytest.mark.parametrize(
    "pointer", ["learner/intake/gone.py", "GONE_SECONDS", "learner.intake.gone", "learner.intake.leases.lease_table.Gone"]
)
def test_a_pointer_to_nothing_is_stale(pointer: str) -> None:
    assert not _is_there(pointer.replace("GONE_SECONDS", "GONE" + "_SECONDS_TOO"))


def test_the_documents_do_name_tests() -> None:
    """Else the one above would have nothing to find."""
    assert sum(document.read_text(encoding="utf-8").count("test_") for document in DOCUMENTS) > 50
