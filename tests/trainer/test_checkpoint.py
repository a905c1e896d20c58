from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from learner.trainer.optimizer_steps import Updater
from learner.trainer.packing.model import load_model
from learner.trainer.persistence import checkpoint
from learner.trainer.persistence.checkpoint import TrainingProgress
from tests.trainer.builders import CPU, configure, forked, group, tiny
from tests.trainer.test_optimizer_steps import packs_of
from treegrpo.errors import ModelError


def saved(folder: Path, progress: TrainingProgress, keep: int = 2) -> tuple[Updater, Path]:
    """A policy one step into its training and its checkpoint."""
    config = configure(folder)
    updater = Updater(config, tiny(folder / "model"), None)
    updater.step_minibatches([packs_of([group(forked())], config)], 0)
    return updater, checkpoint.save_checkpoint(
        folder / "kept", progress, updater.model, updater.optimizer, folder / "model", keep
    )


def test_the_next_step_after_a_resume_is_the_same_bit_for_bit(tmp_path: Path) -> None:
    config = configure(tmp_path)
    first, folder = saved(tmp_path, TrainingProgress(1, 20, 640, 0.25))
    drawn = torch.rand(3)
    second = Updater(config, load_model(folder, CPU), None)
    torch.manual_seed(99)
    checkpoint.restore_optimizer(folder, second.model, second.optimizer)
    assert checkpoint.read_training_progress(folder) == TrainingProgress(1, 20, 640, 0.25)
    assert torch.equal(torch.rand(3), drawn)
    packs = packs_of([group(forked((0.3, 0.9)))], config)
    updates = [one.step_minibatches([packs], 1) for one in (first, second)]
    assert updates[0] == updates[1]
    for a, b in zip(first.model.parameters(), second.model.parameters(), strict=True):
        assert torch.equal(a, b)


def resume(folder: Path, updater: Updater) -> None:
    checkpoint.read_training_progress(folder)
    checkpoint.restore_optimizer(folder, updater.model, updater.optimizer)


@pytest.mark.parametrize("broken", ["state/.metadata", "state/__0_0.distcp", "progress.json"])
def test_a_broken_checkpoint_is_refused(tmp_path: Path, broken: str) -> None:
    updater, folder = saved(tmp_path, TrainingProgress(0, 20, 640))
    whole = (folder / broken).read_bytes()
    for content in (whole[: len(whole) // 2], b"", None):
        (folder / broken).unlink()
        if content is not None:
            (folder / broken).write_bytes(content)
        with pytest.raises(ModelError, match=r"step-000020 is broken .* remove it to resume from the one before"):
            resume(folder, updater)
        (folder / broken).touch()


def torn(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def turned(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 4
    path.write_bytes(data)


@pytest.mark.parametrize("harm", [torn, turned, Path.unlink], ids=["torn", "turned", "missing"])
def test_a_checkpoint_with_any_damaged_file_is_renamed(
    tmp_path: Path, harm: Callable[[Path], None], caplog: pytest.LogCaptureFixture
) -> None:
    root = tmp_path / "kept"
    _, before = saved(tmp_path, TrainingProgress(0, 10))
    _, folder = saved(tmp_path, TrainingProgress(0, 20))
    files = [path.relative_to(folder) for path in folder.rglob("*") if path.is_file() and path.name != "manifest.json"]
    assert {file.name for file in files} > {"model.safetensors", "config.json", "progress.json", ".metadata", "__0_0.distcp"}
    whole = tmp_path / "whole"
    folder.rename(whole)
    for number, file in enumerate(file for file in files if (whole / file).stat().st_size):
        shutil.copytree(whole, folder)
        harm(folder / file)
        assert checkpoint.newest_checkpoint(root) == before
        assert f"is damaged ({file} " in caplog.text
        assert len([*root.glob("*.damaged")]) == number + 1
    whole.rename(folder)
    assert checkpoint.newest_checkpoint(root) == folder


@pytest.mark.parametrize(
    "content", [None, b"", b'{"config.json": [1', b"{}", b"[]", b'["config.json"]', b'{"config.json": 1}', b"[" * 100_000]
)
def test_a_checkpoint_without_its_whole_manifest_is_damaged(tmp_path: Path, content: bytes | None) -> None:
    _, folder = saved(tmp_path, TrainingProgress(0, 20))
    (folder / "manifest.json").unlink()
    if content is not None:
        (folder / "manifest.json").write_bytes(content)
    with pytest.raises(ModelError, match=r"Every checkpoint in .* is damaged, step-000020.damaged the newest; restore one"):
        checkpoint.newest_checkpoint(tmp_path / "kept")


def test_an_extra_model_file_is_damage_and_an_evaluation_is_not(tmp_path: Path) -> None:
    _, before = saved(tmp_path, TrainingProgress(0, 10))
    _, folder = saved(tmp_path, TrainingProgress(0, 20))
    for name in (".DS_Store", "notes.txt~", ".nfs00012", "evaluation.json"):
        (folder / name).write_bytes(b"x")
    assert checkpoint.newest_checkpoint(tmp_path / "kept") == folder
    shutil.copy(folder / "model.safetensors", folder / "model-00001-of-00002.safetensors")
    assert checkpoint.newest_checkpoint(tmp_path / "kept") == before


def test_a_checkpoint_of_before_is_refused_with_the_way_on(tmp_path: Path) -> None:
    updater, folder = saved(tmp_path, TrainingProgress(0, 20, 640))
    shutil.rmtree(folder / "state")
    (folder / "trainer.pt").touch()
    with pytest.raises(ModelError, match=r"step-000020 is of an earlier version .* --model.path .*step-000020"):
        resume(folder, updater)


def test_a_policy_that_has_not_stepped_yet_resumes_as_one(tmp_path: Path) -> None:
    config = configure(tmp_path)
    first = Updater(config, tiny(tmp_path / "model"), None)
    folder = checkpoint.save_checkpoint(
        tmp_path / "kept", TrainingProgress(), first.model, first.optimizer, tmp_path / "model", 2
    )
    resumed, fresh = (Updater(config, load_model(folder, CPU), None) for _ in range(2))
    resume(folder, resumed)
    packs = packs_of([group(forked())], config)
    updates = [one.step_minibatches([packs], 0) for one in (first, resumed, fresh)]
    assert updates[0] == updates[1] == updates[2]
    for a, b, c in zip(*(one.model.parameters() for one in (first, resumed, fresh)), strict=True):
        assert torch.equal(a, b)
        assert torch.equal(b, c)


def test_the_newest_and_the_best_are_kept(tmp_path: Path) -> None:
    for step, em in ((10, None), (20, 0.5), (30, 0.2), (40, None), (50, 0.4)):
        saved(tmp_path, TrainingProgress(0, step, em=em))
    assert [p.name for p in sorted((tmp_path / "kept").iterdir())] == ["step-000020", "step-000040", "step-000050"]
    newest = checkpoint.newest_checkpoint(tmp_path / "kept")
    assert newest is not None
    assert newest.name == "step-000050"


def test_a_damaged_one_is_never_the_best(tmp_path: Path) -> None:
    for step, em in ((10, 0.9), (20, 0.5)):
        saved(tmp_path, TrainingProgress(0, step, em=em))
    (tmp_path / "kept" / "step-000010").rename(tmp_path / "kept" / "step-000010.damaged")
    for step in (30, 40):
        saved(tmp_path, TrainingProgress(0, step), keep=1)
    assert [p.name for p in sorted((tmp_path / "kept").iterdir())] == ["step-000010.damaged", "step-000020", "step-000040"]


def test_what_became_known_of_a_policy_later_counts_too(tmp_path: Path) -> None:
    _, folder = saved(tmp_path, TrainingProgress(0, 10))
    checkpoint.write_evaluation(tmp_path / "kept", TrainingProgress(3, 10, em=0.5))
    assert checkpoint.newest_checkpoint(tmp_path / "kept") == folder
    for step in (20, 30):
        saved(tmp_path, TrainingProgress(0, step, em=0.1), keep=1)
    assert [p.name for p in sorted((tmp_path / "kept").iterdir())] == ["step-000010", "step-000030"]


def test_its_records_come_with_a_checkpoint(tmp_path: Path) -> None:
    config = configure(tmp_path)
    updater = Updater(config, tiny(tmp_path / "model"), None)
    records = [{"step": 1, "loss": 0.1, "group_ids": ["0000001"]}, {"step": 2}]
    policy = (updater.model, updater.optimizer)
    folder = checkpoint.save_checkpoint(tmp_path / "kept", TrainingProgress(), *policy, tmp_path / "model", 2, records=records)
    assert checkpoint.read_records(folder) == records


def test_a_half_written_checkpoint_is_never_the_newest(tmp_path: Path) -> None:
    assert checkpoint.newest_checkpoint(tmp_path / "kept") is None
    _, folder = saved(tmp_path, TrainingProgress(0, 20))
    (tmp_path / "kept" / ".step-000040.partial").mkdir()
    assert checkpoint.newest_checkpoint(tmp_path / "kept") == folder
