"""Atomic directories written by all ranks together: there completely or not at all, also on a disk that is full."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from learner.trainer.distributed.ranks import Ranks
from learner.trainer.persistence.disk_errors import translate_disk_errors
from treegrpo.storage.atomic import replace_directory


@contextmanager
def replace_directory_on_ranks(target: Path, ranks: Ranks) -> Generator[Path]:
    """`replace_directory` for all ranks: rank 0 creates the directory, and renames it when every rank has written.

    Raises:
        DiskError: the disk is full or fails for now.
        RunFileError: a permanent error of the file system.
    """
    with ExitStack() as stack:

        def create() -> Path:
            stack.enter_context(translate_disk_errors(target))
            return stack.enter_context(replace_directory(target))

        yield ranks.run_on_first(create)
        ranks.barrier()
        ranks.run_on_first(stack.close)
