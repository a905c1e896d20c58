from __future__ import annotations

from pathlib import Path

import pytest

from treegrpo.storage.atomic import OWNER_ONLY, partial_path, replace_directory, write_atomically

pytestmark = pytest.mark.pure


def test_a_file_is_replaced_with_the_mode_that_is_asked_for(tmp_path: Path) -> None:
    path = tmp_path / "run.json"
    path.write_text("before")
    partial_path(path).write_text("what a crash has left")
    write_atomically(path, b"after", OWNER_ONLY)
    assert (path.read_bytes(), path.stat().st_mode & 0o777) == (b"after", OWNER_ONLY)
    assert list(tmp_path.iterdir()) == [path]


def test_a_file_that_cannot_be_written_stays_as_it_was(tmp_path: Path) -> None:
    path = tmp_path / "run.json"
    path.write_text("before")
    partial_path(path).mkdir()
    with pytest.raises(OSError, match=r"\.run\.json\.partial"):
        write_atomically(path, b"after")
    assert path.read_text() == "before"


def test_a_directory_is_replaced_when_the_block_ends_well(tmp_path: Path) -> None:
    target = tmp_path / "weights" / "1.2"
    for content in ("one", "two"):
        with replace_directory(target) as folder:
            assert list(folder.iterdir()) == []
            (folder / "model").write_text(content)
    assert (target / "model").read_text() == "two"
    assert list(target.parent.iterdir()) == [target]


def test_a_block_that_raises_leaves_the_directory_as_it_was(tmp_path: Path) -> None:
    target = tmp_path / "1.2"
    with replace_directory(target) as folder:
        (folder / "model").write_text("one")

    def fail() -> None:
        with replace_directory(target) as folder:
            (folder / "model").write_text("two")
            raise RuntimeError("half way")

    with pytest.raises(RuntimeError, match="half way"):
        fail()
    assert (target / "model").read_text() == "one"
    assert list(tmp_path.iterdir()) == [target]
