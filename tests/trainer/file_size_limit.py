"""A limit on file sizes (RLIMIT_FSIZE) as a stand-in for a full disk: real writes fail half-way."""

from __future__ import annotations

import resource
from collections.abc import Generator
from contextlib import contextmanager

UNLIMITED = resource.RLIM_INFINITY


def limit_files(size: int) -> None:
    """From now on no file of this process may become larger than ``size`` bytes."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, UNLIMITED))


@contextmanager
def full_beyond(size: int) -> Generator[None]:
    """`limit_files` for the time of the block."""
    limit_files(size)
    try:
        yield
    finally:
        limit_files(UNLIMITED)
