from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch.distributed.checkpoint.state_dict_saver import save

from learner.trainer.distributed.ranks import SINGLE_RANK
from learner.trainer.persistence.atomic_directory import replace_directory_on_ranks
from tests.trainer.file_size_limit import full_beyond
from treegrpo.errors import DiskError

pytestmark = pytest.mark.pure


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
@pytest.mark.parametrize("size", [64, 300, 700, 1500, 4000, 9000, 20000])
def test_a_full_disk_is_detected_at_any_point_of_a_checkpoint(size: int, tmp_path: Path) -> None:
    """torch's writer complains about the end of the file, and keeps to itself that a write failed."""
    state = {f"weight.{number}": torch.ones(400) for number in range(30)}
    target = tmp_path / "step-000002"
    with (
        pytest.raises(DiskError, match="step-000002 could not be written"),
        replace_directory_on_ranks(target, SINGLE_RANK) as folder,
        full_beyond(size),
    ):
        save(state, checkpoint_id=folder / "state")
    assert list(tmp_path.iterdir()) == []


def test_other_errors_of_a_writer_stay_what_they_are(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="another"), replace_directory_on_ranks(tmp_path / "step-000002", SINGLE_RANK):
        raise RuntimeError("another")
