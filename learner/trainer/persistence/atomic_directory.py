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
        yield ranks.run_on_first(lambda: stack.enter_context(_replace_directory(target)))
        ranks.barrier()
        ranks.run_on_first(stack.close)


@contextmanager
def _replace_directory(target: Path) -> Generator[Path]:
    """`replace_directory` with translated errors, also of the creation: all ranks raise the same."""
    with translate_disk_errors(target), replace_directory(target) as partial:
        yield partial
