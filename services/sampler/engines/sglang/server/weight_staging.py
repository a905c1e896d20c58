"""Weight staging: policy versions, checked, in a directory in memory that servers read.

    published files ─► shapes and values checked ─► linked or copied ─► DIR/treegrpo-sampler-…/1.42/

A server does not check its weights: it ignores a missing tensor, serves one that is not finite, and when it fails half-way
it "rolls back" by reading the new files again. So it only gets checked files, and the version it serves stays staged: a
refused update and a restart go back to it.
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

WEIGHTS_SUFFIX = ".safetensors"


@dataclass(frozen=True, slots=True)
class StagedVersion:
    """A complete model directory that holds ``version``."""

    version: PolicyVersion
    path: Path


class WeightStaging:
    """The directory that servers read versions from; call `remove_directory` after use."""

    def __init__(self, parent: Path) -> None:
        """``parent``: where to make it, seen by all servers under the same path. Raises ConfigError."""
        if not parent.is_dir():
            raise ConfigError(
                f"engine.weights_dir = {parent} does not exist; name a directory in memory that the servers see too."
            )
        self._stack = ExitStack()
        self._root = self._stack.enter_context(locked_temp_dir(parent))
        self._base: Path | None = None

    def stage_model(self, version: PolicyVersion, model: Path) -> StagedVersion:
        """Stage the complete model directory ``model``. Raises WeightsError and ModelError."""
        self._tied = is_tied(model)
        self._shapes = read_weight_shapes(model, tied=self._tied)
        staged = self.stage_weights(version, model)
        self._base = staged.path
        return staged

    def stage_weights(self, version: PolicyVersion, weights: Path) -> StagedVersion:
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
                f"{weights} cannot be copied to {path} ({error.strerror}); free space there, or set engine.weights_dir."
            ) from error
        if self._base is None:
            self._base = path
        return StagedVersion(version, path)

    def remove_version(self, staged: StagedVersion) -> None:
        """Remove a version; the first one keeps the files that are not weights."""
        if staged.path != self._base:
            shutil.rmtree(staged.path, ignore_errors=True)
        else:
            for file in filter(_is_weights, list(staged.path.iterdir())):
                file.unlink()

    def remove_directory(self) -> None:
        self._stack.close()


def _is_weights(file: Path) -> bool:
    return file.name.endswith((WEIGHTS_SUFFIX, f"{WEIGHTS_SUFFIX}.index.json"))


def _link(source: Path, target: Path) -> None:
    """Hard-link the file, or copy it where that is not possible."""
    target.unlink(missing_ok=True)
    try:
        os.link(source, target)
    except OSError:  # another file system
        shutil.copyfile(source, target)
