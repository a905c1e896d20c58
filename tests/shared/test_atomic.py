from __future__ import annotations

from pathlib import Path

import pytest

from treegrpo.storage.atomic import OWNER_ONLY, partial_path, remove_partial_files, replace_directory, write_atomically

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


def test_a_failed_write_leaves_no_partial_file(tmp_path: Path) -> None:
    path = tmp_path / "role.key"
    path.mkdir()
    with pytest.raises(IsADirectoryError):
        write_atomically(path, b"a key", OWNER_ONLY)
    assert list(tmp_path.iterdir()) == [path]


def test_files_that_crashes_have_left_are_removed(tmp_path: Path) -> None:
    kept = [tmp_path / "role.key", tmp_path / ".hidden", partial_path(tmp_path / "thesis.key"), partial_path(tmp_path / "role.d")]
    for path in kept[:3]:
        path.touch()
    kept[3].mkdir()
    partial_path(kept[0]).write_text("half a key")
    remove_partial_files(tmp_path, ["role.*", "other"])
    assert sorted(tmp_path.iterdir()) == sorted(kept)


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
