"""Directories that are there completely or not at all."""

from __future__ import annotations

import os
import shutil
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def whole(target: Path) -> Generator[Path]:
    """Yield an empty sibling of ``target`` to write into; it takes the place of ``target`` when the block ends well.

    Its files are on the disk before it gets its name. What a crash leaves behind has a name that begins with a dot,
    is never read, and is removed by the next attempt. When the block raises, ``target`` is as it was.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    partial, old = (target.with_name(f".{target.name}.{kind}") for kind in ("partial", "old"))
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    yield partial
    for file in [*partial.rglob("*"), partial]:
        _sync(file)
    shutil.rmtree(old, ignore_errors=True)
    if target.exists():
        target.rename(old)
    partial.rename(target)
    _sync(target.parent)
    shutil.rmtree(old, ignore_errors=True)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
