"""Lists the files of tests/ that hold no tests: harnesses, fakes and builders, by the first line of their docstring.

python -m tests.structure.harnesses [--write docs/testing.md]
"""

from __future__ import annotations

import argparse
import ast
import textwrap
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs/testing.md"
MARK = "## The harnesses\n"
"""What follows this heading is generated."""
COLUMNS = 100


def harnesses() -> str:
    """The list, as Markdown: a heading for each folder, a line for each file."""
    parts = list[str]()
    for folder in sorted(path for path in (ROOT / "tests").rglob("*") if path.is_dir()):
        lines = [entry for path in sorted(folder.glob("*.py")) if (entry := _entry(path))]
        if lines:
            parts.append(f"### tests/{folder.relative_to(ROOT / 'tests').as_posix()}\n\n{''.join(lines)}")
    return "\n".join(parts)


def with_list(page: str) -> str:
    """``page`` with the list as it is now."""
    return f"{page.partition(MARK)[0]}{MARK}\n{harnesses()}"


def _entry(path: Path) -> str:
    if path.name.startswith("test_") or path.name == "__init__.py":
        return ""
    tree = ast.parse(path.read_text("utf-8"))
    first = " ".join((ast.get_docstring(tree) or "").partition("\n\n")[0].split())
    classes = [f"`{node.name}`" for node in tree.body if isinstance(node, ast.ClassDef) and not node.name.startswith("_")]
    text = f"`{path.name}`: {first}" if first else f"`{path.name}`"
    text += f" Classes: {', '.join(classes)}." if classes else ""
    return textwrap.fill(text, COLUMNS, initial_indent="- ", subsequent_indent="  ", break_on_hyphens=False) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.structure.harnesses")
    parser.add_argument("--write", type=Path, help="the page whose list is to be brought up to date")
    options = parser.parse_args()
    if options.write:
        options.write.write_text(with_list(options.write.read_text("utf-8")), encoding="utf-8")
    else:
        print(harnesses())


if __name__ == "__main__":
    main()
