from __future__ import annotations

import errno
import json
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel

from learner.trainer.distributed.ranks import SINGLE_RANK
from learner.trainer.packing.model import load_model
from learner.trainer.persistence.atomic_directory import replace_directory_on_ranks
from learner.trainer.persistence.policy_versions import export_model, list_versions, prune_versions, write_version
from tests.trainer.builders import CPU, tiny
from tests.trainer.file_size_limit import full_beyond
from treegrpo.core.step import PolicyVersion
from treegrpo.errors import DiskError, RunFileError

pytestmark = pytest.mark.pure


class Crash(Exception):  # noqa: N818  # it stands for the end of a process
    pass


def crash_halfway(target: Path) -> None:
    with replace_directory_on_ranks(target, SINGLE_RANK) as partial:
        (partial / "config.json").write_text("{")
        raise Crash


@pytest.fixture
def policy(tmp_path: Path) -> PreTrainedModel:
    return tiny(tmp_path / "model")


def same(a: PreTrainedModel, b: PreTrainedModel) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters(), strict=True))


def test_a_version_is_a_model_directory_with_its_tokenizer(policy: PreTrainedModel, tmp_path: Path) -> None:
    folder = write_version(policy, tmp_path / "weights", PolicyVersion(1, 42), tmp_path / "model", "float32")
    assert folder == tmp_path / "weights" / "1.42"
    names = {file.name for file in folder.iterdir()}
    assert names == {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "manifest.json"}
    assert same(load_model(folder, CPU), policy)


def test_a_bfloat16_version_says_so(policy: PreTrainedModel, tmp_path: Path) -> None:
    folder = write_version(policy, tmp_path / "weights", PolicyVersion(), tmp_path / "model", "bfloat16")
    assert json.loads((folder / "config.json").read_text(encoding="utf-8"))["dtype"] == "bfloat16"
    sizes = [(f / "model.safetensors").stat().st_size for f in (folder, tmp_path / "model")]
    assert sizes[0] < 0.6 * sizes[1]
    assert policy.dtype == torch.float32


def test_a_crash_leaves_no_half_version(policy: PreTrainedModel, tmp_path: Path) -> None:
    weights = tmp_path / "weights"
    with pytest.raises(Crash):
        crash_halfway(weights / "0.1")
    assert list_versions(weights) == []
    assert not (weights / "0.1").exists()
    write_version(policy, weights, PolicyVersion(0, 1), tmp_path / "model", "float32")
    assert [p.name for p in weights.iterdir()] == ["0.1"]


def test_a_crash_leaves_what_was_there_before(policy: PreTrainedModel, tmp_path: Path) -> None:
    final = tmp_path / "final"
    export_model(policy, final, tmp_path / "model", "float32")
    with pytest.raises(Crash):
        crash_halfway(final)
    assert same(load_model(final, CPU), policy)
    with torch.no_grad():
        next(policy.parameters()).add_(1)
    export_model(policy, final, tmp_path / "model", "float32")
    assert same(load_model(final, CPU), policy)


def test_a_full_disk_is_told_from_other_errors_and_leaves_what_was_there(policy: PreTrainedModel, tmp_path: Path) -> None:
    final = tmp_path / "final"
    export_model(policy, final, tmp_path / "model", "float32")
    for size in (20_000, 100):
        with (
            full_beyond(size),
            pytest.raises(DiskError, match=r"final could not be written \(File too large\); free space") as caught,
        ):
            export_model(policy, final, tmp_path / "model", "float32")
        assert caught.value.errno == errno.EFBIG
    assert same(load_model(final, CPU), policy)
    assert [p.name for p in tmp_path.iterdir() if p.name.startswith(".")] == []
    (tmp_path / "weights").touch()
    with pytest.raises(RunFileError, match=r"weights/0\.0 could not be written \(File exists\)"):
        write_version(policy, tmp_path / "weights", PolicyVersion(), tmp_path / "model", "float32")


def test_the_newest_versions_are_kept_across_lineages(tmp_path: Path) -> None:
    for name in ("0.9", "0.10", "1.3", "1.4", "notes", ".1.5.partial"):
        (tmp_path / name).mkdir()
    prune_versions(tmp_path, 3)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["0.10", "1.3", "1.4", "notes"]
    assert list_versions(tmp_path) == [PolicyVersion(0, 10), PolicyVersion(1, 3), PolicyVersion(1, 4)]
