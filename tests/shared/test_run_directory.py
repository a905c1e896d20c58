from __future__ import annotations

import os
from pathlib import Path

import pytest

from treegrpo.runtime.run_directory import make_run_directory

pytestmark = pytest.mark.pure


def test_a_new_run_directory_is_private_and_an_existing_mode_stays(tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        make_run_directory(path := tmp_path / "runs" / "one")
    finally:
        os.umask(before)
    assert path.stat().st_mode & 0o777 == 0o700
    path.chmod(0o750)
    make_run_directory(path)
    assert path.stat().st_mode & 0o777 == 0o750
