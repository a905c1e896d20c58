"""docs/reliability.md names tests that are there."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

pytestmark = pytest.mark.pure

ROOT = Path(__file__).parents[2]
NAMED = re.compile(r"`(?:(?P<file>\w+/test_\w+\.py))?(?:::(?P<begin>\w+)…)?(?P<more>…\w+…)?`")


def test_every_test_that_the_page_names_is_there() -> None:
    text, source = "", ""
    count = 0
    for found in NAMED.finditer((ROOT / "docs" / "reliability.md").read_text(encoding="utf-8")):
        file, begin, more = found["file"], found["begin"], found["more"]
        if file:
            text, source = (ROOT / "tests" / file).read_text(encoding="utf-8"), file
        if begin or more:
            named = f"def {begin}" if begin else more.strip("…")
            assert named in text, f"{source} has no test {named}…"
        count += bool(file or begin or more)
    assert count > 20
