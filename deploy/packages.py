"""Prints requirements to install, one a line.

packages.py pyproject.toml [NAME …]                        what pyproject.toml depends on, but for the packages named
packages.py --not-installed constraints.txt installed.txt  of the constraints those on packages that are not installed
"""

import re
import sys
import tomllib
from pathlib import Path


def dependencies(project: str, without: list[str]) -> list[str]:
    listed = tomllib.loads(Path(project).read_text(encoding="utf-8"))["project"]["dependencies"]
    known = {re.split(r"[\[<>=~!;]", line)[0]: line for line in listed}
    if unknown := set(without) - set(known):
        sys.exit(f"error: {', '.join(sorted(unknown))}: no dependency in {project}; take it out of the Dockerfile.")
    return [line for name, line in known.items() if name not in without]


def not_installed(constraints: str, installed: str) -> list[str]:
    known = {_name(line) for line in Path(installed).read_text(encoding="utf-8").splitlines()}
    return [line for line in Path(constraints).read_text(encoding="utf-8").splitlines() if _name(line) not in known]


def _name(line: str) -> str:
    """Of NAME==VERSION or NAME @ URL, as package indexes compare names."""
    return re.sub(r"[-_.]+", "-", re.split(r"[\s=@;]", line.strip())[0]).lower()


if __name__ == "__main__":
    first, *rest = sys.argv[1:]
    print("\n".join(not_installed(*rest) if first == "--not-installed" else dependencies(first, rest)))
