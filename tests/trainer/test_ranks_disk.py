"""Two ranks write together: what one of them cannot write, none has written, and all know."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path

import pytest
from torch.optim import Optimizer
from transformers import PreTrainedModel

from learner.trainer.distributed.ranks import Ranks
from learner.trainer.optimizer_steps import Updater
from learner.trainer.packing.model import load_model
from learner.trainer.persistence import checkpoint
from learner.trainer.persistence.checkpoint import TrainingProgress
from tests.trainer.builders import CPU, configure, write_tiny
from tests.trainer.file_size_limit import full_beyond
from tests.trainer.rank_pair_harness import WORLD, RankPair
from treegrpo.config.schema import Config
from treegrpo.errors import DiskError

pytestmark = pytest.mark.xdist_group("ranks")
MIDDLE = 120_000
"""Bytes: the weights fit, a rank's moments do not."""


def attempt(ranks: Ranks, config: Config, policy: tuple[PreTrainedModel, Optimizer], *, full: bool) -> str:
    try:
        with full_beyond(MIDDLE) if full else nullcontext():
            checkpoint.save_checkpoint(config.run.dir / "kept", TrainingProgress(0, 1), *policy, config.model.path, 2, ranks)
    except DiskError as error:
        return str(error) if ranks.reports_error(error) or not ranks.is_first else "nobody says it"
    return "written"


def attempts(ranks: Ranks, config: Config, rank: int) -> list[str]:
    """A checkpoint written while the disk of ``rank`` is full, and once more when it is not."""
    updater = Updater(config, load_model(config.model.path, CPU), None, ranks)
    policy = updater.model, updater.optimizer
    return [attempt(ranks, config, policy, full=full) for full in (ranks.rank == rank, False)]


@pytest.mark.parametrize("rank", range(WORLD))
def test_the_full_disk_of_one_rank_is_known_to_all_and_leaves_nothing(pair: RankPair, tmp_path: Path, rank: int) -> None:
    write_tiny(tmp_path / "model")
    config = configure(tmp_path)
    folder = config.run.dir / "kept" / "step-000001"
    for said in pair(attempts, config, rank):
        assert said == [f"{folder} could not be written (File too large); free space on its disk.", "written"]
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]
    assert checkpoint.newest_checkpoint(folder.parent) == folder
