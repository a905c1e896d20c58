"""Prints lines for .env that pin every third-party image by its digest: ``make image-digests >> .env``. Asks the registries.

A tag may be moved, a digest is the content. The lines take the place of the tags in docker-compose.yml and in the Dockerfiles;
a registry of your own comes before the name, as in .env.example.
"""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).parents[1]
IMAGE = re.compile(r"\$\{(\w+_IMAGE):-([^}]+)\}")
INSPECT = ("docker", "buildx", "imagetools", "inspect", "--format", "{{.Manifest.Digest}}")


def image_names() -> dict[str, str]:
    """The images of docker-compose.yml by the variable that replaces them."""
    return dict(IMAGE.findall((ROOT / "docker-compose.yml").read_text(encoding="utf-8")))


def image_digest(image: str, inspect: Sequence[str] = INSPECT) -> str:
    """The present digest of ``image`` in its registry, by the command ``inspect``. Raises ValueError."""
    done = subprocess.run([*inspect, image], capture_output=True, text=True, check=False)  # noqa: S603 - our own words
    found = done.stdout.strip()
    if done.returncode or not re.fullmatch(r"sha256:[0-9a-f]{64}", found):
        raise ValueError(
            f"the registry says no digest of {image} ({(done.stderr or found).strip()}); check that docker reaches it."
        )
    return found


if __name__ == "__main__":
    try:
        print("\n".join(f"{name}={image}@{image_digest(image)}" for name, image in image_names().items()))
    except (OSError, ValueError) as error:
        sys.exit(f"error: {error}")
