"""Where weights are kept: gone with its sampler, however that ends, and never in use by two."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

import pytest

from treegrpo.errors import ConfigError
from treegrpo.storage.temp_dir import PREFIX, locked_temp_dir

HOLD = """
from treegrpo.storage.temp_dir import locked_temp_dir
with locked_temp_dir() as path:
    (path / "1.0").mkdir()
    (path / "1.0" / "model.safetensors").write_bytes(b"weights")
    print(path, flush=True)
    input()
"""


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:  # pyright: ignore[reportUnusedFunction]
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))


@contextmanager
def sampler(root: Path) -> Generator[tuple[subprocess.Popen[str], Path]]:
    """A process that has weights; killed at the end."""
    pipe = subprocess.PIPE
    with subprocess.Popen([sys.executable, "-c", HOLD], stdin=pipe, stdout=pipe, env={"TMPDIR": str(root)}, text=True) as process:
        assert process.stdout is not None
        yield process, Path(process.stdout.readline().strip())
        process.kill()


def test_the_directory_is_gone_afterwards() -> None:
    with locked_temp_dir() as path:
        (path / "file").touch()
    assert not path.exists()


def test_a_killed_samplers_directory_is_removed_a_running_ones_is_not(tmp_path: Path) -> None:
    with sampler(tmp_path) as (_, living):
        with sampler(tmp_path) as (process, dead):
            process.kill()
            process.wait()
            assert dead.exists()
        with locked_temp_dir() as path:
            assert sorted(tmp_path.iterdir()) == sorted([living, path])
            assert (living / "1.0" / "model.safetensors").read_bytes() == b"weights"


def test_what_is_not_a_samplers_directory_stays(tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "file").touch()
    (tmp_path / f"{PREFIX}link").symlink_to(elsewhere)
    (tmp_path / f"{PREFIX}file").touch()
    with locked_temp_dir():
        pass
    assert (elsewhere / "file").exists()
    assert (tmp_path / f"{PREFIX}file").exists()


def test_what_another_machine_uses_stays(tmp_path: Path) -> None:
    """Where several machines share a file system, none sees the locks of the others."""
    theirs = tmp_path / "treegrpo-sampler-00000000-abc"
    theirs.mkdir()
    with locked_temp_dir():
        assert theirs.exists()


def test_where_nothing_can_be_written_is_told() -> None:
    with pytest.raises(ConfigError, match=r"/proc cannot be written to .*engine\.weights_dir"), locked_temp_dir(Path("/proc")):
        pass
