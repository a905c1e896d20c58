"""Policy versions where servers read them: checked, and on a file system in memory.

    published files ─► shapes and values checked ─► linked or copied ─► DIR/treegrpo-sampler-…/1.42/

A server trusts what it is given: it ignores a missing tensor, serves one that is not finite, and when it fails halfway it
"rolls back" by reading the new files again. So nothing unchecked is shown to it, and the version it serves stays staged:
it is what a refused update and a restart go back to.
"""

from __future__ import annotations

import os
import shutil
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from services.sampler.engines.checkpoint import is_tied, read_tensors, read_weight_shapes
from treegrpo.core.step import PolicyVersion
from treegrpo.errors import ConfigError, WeightsError
from treegrpo.storage.temp_dir import locked_temp_dir

WEIGHTS = ".safetensors"


@dataclass(frozen=True, slots=True)
class Staged:
    """A complete model directory that holds ``version``."""

    version: PolicyVersion
    path: Path


class Stage:
    """The directory that servers read versions from; close it after use."""

    def __init__(self, parent: Path) -> None:
        """``parent``: where to make it, seen by all servers under the same path. Raises ConfigError."""
        if not parent.is_dir():
            raise ConfigError(
                f"engine.weights_dir = {parent} does not exist; name a directory in memory that the servers see too."
            )
        self._stack = ExitStack()
        self._root = self._stack.enter_context(locked_temp_dir(parent))
        self._base: Path | None = None

    def first(self, version: PolicyVersion, model: Path) -> Staged:
        """Stage the complete model directory ``model``. Raises WeightsError and ModelError."""
        self._tied = is_tied(model)
        self._shapes = read_weight_shapes(model, tied=self._tied)
        staged = self.put(version, model)
        self._base = staged.path
        return staged

    def put(self, version: PolicyVersion, weights: Path) -> Staged:
        """Stage the weights in ``weights`` beside everything else of the first version.

        Raises:
            WeightsError: they do not fit the model, cannot be read, or there is no room for them.
        """
        for _ in read_tensors(weights, self._shapes, tied=self._tied):
            pass
        path, new = self._root / str(version), self._root / f"{version}.new"
        shutil.rmtree(new, ignore_errors=True)
        new.mkdir()
        try:
            for source in filter(None, (self._base, weights)):
                for file in source.iterdir():
                    if file.is_file() and (source == weights or not _is_weights(file)):
                        _link(file, new / file.name)
            shutil.rmtree(path, ignore_errors=True)  # last, for it may be the base
            new.rename(path)
        except OSError as error:
            shutil.rmtree(new, ignore_errors=True)
            raise WeightsError(
                f"{weights} cannot be copied to {path} ({error.strerror}); make room there, or set engine.weights_dir."
            ) from error
        if self._base is None:
            self._base = path
        return Staged(version, path)

    def drop(self, staged: Staged) -> None:
        """Forget a version; the first one keeps the files that are not weights."""
        if staged.path != self._base:
            shutil.rmtree(staged.path, ignore_errors=True)
        else:
            for file in filter(_is_weights, list(staged.path.iterdir())):
                file.unlink()

    def close(self) -> None:
        self._stack.close()


def _is_weights(file: Path) -> bool:
    return file.name.endswith((WEIGHTS, f"{WEIGHTS}.index.json"))


def _link(source: Path, target: Path) -> None:
    """The same file without a copy where that is possible."""
    target.unlink(missing_ok=True)
    try:
        os.link(source, target)
    except OSError:  # another file system
        shutil.copyfile(source, target)
