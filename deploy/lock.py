"""Writes the lock files of the images, each package with the hashes of its files: ``python deploy/lock.py``.

    requirements-sampler.lock   the packages of a sampler; both images begin with it
    requirements-learner.lock   all packages

The versions are those of constraints.txt. torch and what belongs to its build (CUDA's libraries, triton) are left out: which
build it is says TORCH_INDEX, and an index of builds has other files than the package index. Needs the program uv.
"""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
DEPLOY = ROOT / "deploy"
NOT_ON_SAMPLERS = ("amqtt", "bm25s", "matplotlib", "pyarrow", "rich", "starlette", "uvicorn")
OF_A_BUILD = re.compile(r"(torch|triton|(nvidia|cuda)-[\w-]+)==")
UV = (
    *("uv", "pip", "compile", "-", "--quiet", "--no-header", "--no-annotate", "--generate-hashes"),
    *("--python-version", "3.11", "--python-platform", "x86_64-unknown-linux-gnu"),
)


def lock_requirements(without: tuple[str, ...]) -> str:
    """The lock of our dependencies but for those named, with all that they need."""
    listed = [sys.executable, str(DEPLOY / "packages.py"), str(ROOT / "pyproject.toml"), *without]
    requirements = subprocess.run(listed, capture_output=True, text=True, check=True).stdout  # noqa: S603 - our own words
    command = [*UV, "--constraint", str(ROOT / "constraints.txt")]
    found = subprocess.run(command, input=requirements, capture_output=True, text=True, check=True).stdout  # noqa: S603 - our own words
    return "".join(block for block in re.findall(r"^\S.*\n(?:[ \t].*\n)*", found, re.MULTILINE) if not OF_A_BUILD.match(block))


if __name__ == "__main__":
    for name, without in (("sampler", NOT_ON_SAMPLERS), ("learner", ())):
        (DEPLOY / f"requirements-{name}.lock").write_text(lock_requirements(without), encoding="utf-8")
