"""Files of a run that another program has touched: each damage heals, or ends what reads it with a sentence of ours."""

from __future__ import annotations

import asyncio
import shutil
import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, cast

import pytest

from learner.intake.coordinator.version_publisher import read_version_files
from learner.intake.monitoring.recorder import RunRecorder
from learner.intake.persistence.recovery import has_recorded_events, recover_state
from learner.intake.persistence.run_lock import lock_run
from learner.intake.persistence.snapshot import SnapshotStore
from learner.intake.rpc.trainer_socket import serve_trainer
from learner.intake.wal.filesystem import LocalFileSystem
from learner.intake.wal.journal import Journal
from learner.trainer.loop import Trainer
from services.cli.reports.run_alerts import RunAlerts
from services.cli.reports.run_history import describe_finished_run, describe_start
from services.cli.reports.summary import summary_lines
from services.cli.up import lock_run_for_command
from tests.cli.progress_rows import eval_row, step_row, write
from tests.intake.builders import make_table
from tests.intake.crash_harness import CrashableIntake, History, play
from tests.intake.in_memory_filesystem import InMemoryFileSystem
from tests.intake.process_harness import write_questions
from tests.intake.test_recovery import FIRST, SECOND
from tests.trainer.builders import configure, write_tiny
from tests.trainer.trainer_harness import intake_for, train
from treegrpo.config.fingerprint import check_fingerprint, record_fingerprint
from treegrpo.config.schema import Config
from treegrpo.errors import ModelError, RunFileError, TreeGrpoError
from treegrpo.observability.metrics import IntakeMetrics, TrainerMetrics
from treegrpo.security.credentials import OPEN
from treegrpo.storage import manifest
from treegrpo.storage.run_files import FILES, FOLDERS, check_run_files


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a run's directory after two steps, made by trainer and intake, and all that its configuration names."""
    folder = tmp_path_factory.mktemp("whole")
    write_tiny(folder / "model")
    config = config_of(folder)
    run_dir = config.run.dir
    run_dir.mkdir()
    record_fingerprint(config, begun=False)
    with intake_for(config):
        train(config)
    (run_dir / "intake.sock").unlink()
    for path, inode in asyncio.run(journaled()).files.items():
        target = folder / path.relative_to("/")
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(inode.data)
    write(run_dir, eval_row(0, 0.1), step_row(1), step_row(2), eval_row(2, 0.3))
    (run_dir / "set_aside.jsonl").write_text('{"kind": "set_aside", "lease": "train-1"}\n', encoding="utf-8")
    for name in ("paused", "intake.lock", "up.lock", "journal/reserve"):
        (run_dir / name).touch()
    (run_dir / "logs").mkdir()
    (run_dir / "logs" / "intake.log").write_text("said\n", encoding="utf-8")
    return folder


async def journaled() -> InMemoryFileSystem:
    """Journal and snapshots of an intake that has worked for a while."""
    disk = InMemoryFileSystem()
    play(CrashableIntake(disk, History()), [*FIRST, ("compact",), *SECOND, ("compact",), ("grant",), ("commit",)])
    return disk


def config_of(folder: Path) -> Config:
    config = configure(folder, steps=2, checkpoint_every=1)
    rows, held_out = (write_questions(folder / f"{split}.jsonl", 2, split) for split in ("train", "test"))
    return config.model_copy(update={"data": config.data.model_copy(update={"train": rows, "heldout": held_out})})


async def start_intake(config: Config) -> None:
    """What the intake reads and holds before it serves, and the first things that it writes."""
    run_dir, disk = config.run.dir, LocalFileSystem()
    check_run_files(run_dir)
    with lock_run(run_dir):
        metrics = IntakeMetrics()
        recorder = RunRecorder(metrics, run_dir / "progress.jsonl", window=2)
        record_fingerprint(config, begun=has_recorded_events(run_dir))
        snapshots = SnapshotStore(disk, run_dir / "snapshots")
        recovered = recover_state(disk, run_dir / "journal", snapshots, known := make_table(batch=2, questions=6), recorder)
        with Journal.open_journal(disk, run_dir / "journal", recovered.end) as journal:
            recorder.export_journal(journal)
            journal.append_record({"event": "closed", "draw": 0})
            journal.commit_next()
        recorder.record_step({"step": 3, "version": "0.3", "position": 6}, known)
        snapshots.prune_generations()
        async with serve_trainer(cast("Any", None), str(run_dir / "intake.sock")):
            pass


class Alone:
    """What the trainer hears of an intake that drains."""

    draining = True

    def __init__(self) -> None:
        self.stop = threading.Event()

    def nothing(self, *_: object) -> None:
        pass

    request_publish = report_step = take_groups = await_evaluation = nothing


def start_trainer(config: Config) -> Trainer:
    """What the trainer reads before its first step."""
    check_run_files(config.run.dir)
    check_fingerprint(config, ["train.batch"])
    return Trainer(config, cast("Any", Alone()), TrainerMetrics())


def train_on(config: Config) -> None:
    """And what it writes when the run drains at once."""
    start_trainer(config).train()


def look(config: Config) -> None:
    """What the commands read."""
    with lock_run_for_command(config.run.dir):
        describe_start(config)
        describe_finished_run(config)
        summary_lines(config.run.dir, 2, None, ("up",))
        RunAlerts(config, OPEN, print).update_alerts({})


PARTS: dict[str, Callable[[Config], object]] = {
    "intake": lambda config: asyncio.run(start_intake(config)),
    "trainer": train_on,
    "commands": look,
}


def empty(path: Path) -> None:
    path.write_bytes(b"")


def torn(path: Path) -> None:
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2])


def rubbish(path: Path) -> None:
    path.write_bytes(bytes(range(256)) * 8)


def marked(path: Path) -> None:
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())


def a_list(path: Path) -> None:
    path.write_bytes(b'[{"kind": ["step"], "step": [1]}]\n{"kind": "step", "step": [1], "time": 1}\n')


def other_types(path: Path) -> None:
    path.write_bytes(b'{"kind": "eval", "version": 7, "model.path": 3, "config.json": "x", "step": "x", "em": "high"}\n')


def nested(path: Path) -> None:
    path.write_bytes(b"[" * 50_000)


def turned(path: Path) -> None:
    data = bytearray(path.read_bytes() or b"x")
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def a_directory(path: Path) -> None:
    path.unlink()
    path.mkdir()
    (path / "within").touch()


def a_link_to_nothing(path: Path) -> None:
    path.unlink()
    path.symlink_to("nowhere")


DAMAGES = (Path.unlink, empty, torn, turned, a_directory, a_link_to_nothing)
OF_TEXT = (rubbish, marked, a_list, other_types, nested)


def files(run_dir: Path) -> list[Path]:
    return sorted(path.relative_to(run_dir) for path in run_dir.rglob("*") if path.is_file())


def copies(whole: Path, folder: Path, damages: Iterator[Any]) -> Iterator[tuple[Any, Config]]:
    """A fresh copy of the whole folder for each damage, with its configuration."""
    for damage in damages:
        copy = folder / "copy"
        shutil.copytree(whole, copy, symlinks=True)
        yield damage, config_of(copy)
        shutil.rmtree(copy)


def attempt(part: str, config: Config) -> TreeGrpoError | None:
    """What a part of the run ends with; anything but a sentence of ours fails the test."""
    try:
        PARTS[part](config)
    except TreeGrpoError as error:
        return error
    return None


def test_the_run_is_whole_before_anything_is_touched(whole: Path, tmp_path: Path) -> None:
    shutil.copytree(whole, tmp_path / "copy")
    config = config_of(tmp_path / "copy")
    names = {path.parts[0] for path in files(config.run.dir)}
    assert names >= {*(name for name in FILES if "/" not in name), *FOLDERS, "run.json"}
    assert [attempt(part, config) for part in PARTS] == [None] * 3


def cases(whole: Path, *, checkpoints: bool) -> Iterator[tuple[Path, Callable[[Path], object]]]:
    """The files that the trainer alone reads, of its newest checkpoint, or all others; with each damage."""
    newest = max((whole / "run" / "checkpoints").glob("step-*")).relative_to(whole / "run")
    for file in files(whole / "run"):
        if file.name == "evaluation.json":
            continue
        if file.is_relative_to(newest) if checkpoints else file.parts[0] not in {"checkpoints", "weights", "logs"}:
            text = file.suffix in {".json", ".jsonl"} and not checkpoints
            yield from ((file, damage) for damage in (*DAMAGES, *(OF_TEXT if text else ())))


@pytest.mark.parametrize("part", ["intake", "commands"])
def test_each_file_of_a_run_with_each_damage_heals_or_is_named(whole: Path, tmp_path: Path, part: str) -> None:
    found = (case for case in cases(whole, checkpoints=False) if part == "intake" or case[0].name == "progress.jsonl")
    for (file, damage), config in copies(whole, tmp_path, found):
        damage(config.run.dir / file)
        error = attempt(part, config)
        if error is not None:
            assert not error.is_transient, (file, damage)
            assert any(name in str(error) for name in (*file.parts, "run.dir")), (file, damage, str(error))


def test_a_damaged_checkpoint_is_never_trained_from(whole: Path, tmp_path: Path) -> None:
    for (file, damage), config in copies(whole, tmp_path, cases(whole, checkpoints=True)):
        damage(config.run.dir / file)
        assert start_trainer(config).progress.step == 1, (file, damage)
        assert (config.run.dir / "checkpoints" / f"{file.parts[1]}{manifest.DAMAGED}").is_dir()


@pytest.mark.parametrize("folder", ["final", "weights"])
def test_damaged_weights_are_never_served_or_loaded(whole: Path, tmp_path: Path, folder: str) -> None:
    of_weights = max((whole / "run" / "weights").iterdir())
    source = whole / "run" / "checkpoints" / "final" if folder == "final" else of_weights
    for damage in (Path.unlink, torn, turned, a_directory, a_link_to_nothing):
        for name in (path.name for path in source.iterdir() if path.name != manifest.NAME):
            copy = tmp_path / "copy"
            shutil.copytree(source, copy)
            damage(copy / name)
            with pytest.raises(ModelError, match=f"is damaged .*{name}"):
                manifest.check_model_files(copy)
            with pytest.raises(RunFileError, match=f"is not as it was written: {name}"):
                read_version_files(copy)
            shutil.rmtree(copy)


@pytest.mark.parametrize("name", [*FOLDERS, *FILES, "intake.sock"])
def test_what_is_in_the_way_is_named_at_once(whole: Path, tmp_path: Path, name: str) -> None:
    shutil.copytree(whole, tmp_path / "copy")
    config = config_of(tmp_path / "copy")
    path = config.run.dir / name
    shutil.rmtree(path, ignore_errors=True)
    path.unlink(missing_ok=True)
    path.mkdir() if name not in FOLDERS else path.touch()
    for part in PARTS:
        error = attempt(part, config)
        assert isinstance(error, RunFileError)
        assert str(error).startswith(f"{path} is a {'file' if name in FOLDERS else 'directory'}, and the run keeps a ")
        assert str(error).endswith("move it away.")


def test_files_of_other_programs_beside_ours_are_left_alone(whole: Path, tmp_path: Path) -> None:
    shutil.copytree(whole, tmp_path / "copy")
    config = config_of(tmp_path / "copy")
    run_dir = config.run.dir
    foreign_files = (".DS_Store", ".nfs0000000000", "00000001.log~", "3.log", "٣٣٣٣٣٣٣٣.log", "#notes#", "00000099 (copy).log")
    kept = [run_dir / folder for folder in ("journal", "snapshots", "weights", "checkpoints")]
    for folder in (*kept, *(run_dir / "snapshots").iterdir()):
        for name in foreign_files:
            (folder / name).write_bytes(b"x")
        (folder / "Thumbs").mkdir()
    assert [attempt(part, config) for part in PARTS] == [None] * 3
    assert all((folder / name).exists() for folder in kept for name in foreign_files)


def test_a_stale_socket_of_a_dead_intake_is_taken_over(whole: Path, tmp_path: Path) -> None:
    shutil.copytree(whole, tmp_path / "copy")
    config = config_of(tmp_path / "copy")
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(config.run.dir / "intake.sock"))
    assert attempt("intake", config) is None
    assert not (config.run.dir / "intake.sock").exists()
