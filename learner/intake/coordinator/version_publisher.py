"""Publishes policy versions: keeps which files each has, which is the newest, and whether it is still whole.

trainer ─── Publish ───► publish_version ─► files compared with their manifest ─► lease table ─► announced by MQTT
samplers ── DescribeWeights, FetchWeights ─► the newest KEEP_VERSIONS versions, by `rpc/weights_servicer.py`
trainer ◄── "damaged" ── mark_damaged ◄──── a file that differs from its manifest as it is sent
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from learner.intake.leases.lease_table import LeaseTable
from treegrpo.core.step import PolicyVersion
from treegrpo.errors import ContractError, RunFileError, describe
from treegrpo.storage import manifest
from treegrpo.storage.manifest import FileEntry
from treegrpo.wire.control import ControlPlane
from treegrpo.wire.trainer_protocol import KEEP_VERSIONS

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class PublishedVersion:
    version: PolicyVersion
    directory: Path
    files: dict[str, FileEntry]
    """By name within the directory."""


class VersionPublisher:
    def __init__(self, table: LeaseTable, control: ControlPlane) -> None:
        self._table = table
        self._control = control
        self._versions: dict[PolicyVersion, PublishedVersion] = {}
        self._damaged: PolicyVersion | None = None
        self._publishing = asyncio.Lock()
        self.on_damaged: Callable[[], None] = lambda: None
        """Called when a version is found damaged."""

    @property
    def newest(self) -> PolicyVersion | None:
        return next(reversed(self._versions), None)

    @property
    def damaged(self) -> PolicyVersion | None:
        """The newest version, if its files are not what they were when it was published."""
        return self._damaged if self._damaged == self.newest else None

    def find_version(self, version: PolicyVersion) -> PublishedVersion | None:
        """None if it was never published, or newer ones have replaced it."""
        return self._versions.get(version)

    async def publish_version(self, version: PolicyVersion, directory: Path, position: int) -> None:
        """Serve, lease with and announce a version; it becomes the newest. The groups before ``position`` made it.

        Raises ContractError: its files are not there, or not as they were written.
        """
        async with self._publishing:  # a request that is repeated while the files are read waits for the first
            await self._serve_files(version, directory)
            self._table.set_policy_version(version, position)
            await self._control.announce_version(version)

    async def _serve_files(self, version: PolicyVersion, directory: Path) -> None:
        if version == self.newest and self.damaged is None:  # repeated: a version is published once
            return
        try:
            files = await asyncio.to_thread(read_version_files, directory)
        except RunFileError as error:
            raise ContractError(f"Version {version} cannot be served: {str(error).rstrip('.')}; write it again.") from error
        except (OSError, ValueError) as error:
            reason = describe(error)[:200]
            raise ContractError(f"Version {version} cannot be served ({reason}); publish a directory that is there.") from error
        self._versions[version] = PublishedVersion(version, directory, files)
        self._damaged = None
        while len(self._versions) > KEEP_VERSIONS:
            self._versions.pop(next(iter(self._versions)))

    def mark_damaged(self, version: PolicyVersion, reason: str) -> None:
        """Have the trainer write a version again, if it is the newest."""
        if self._damaged != version:
            log.error("version %s was damaged after it was published: %s", version, reason)
            self._damaged = version
            self.on_damaged()


def read_version_files(directory: Path) -> dict[str, FileEntry]:
    """The files of a version by name, as in the manifest that the trainer wrote with them.

    Raises:
        RunFileError: a file is not as it was written.
        OSError, ValueError: there is no such directory.
    """
    if not manifest.has_manifest(directory):
        return _hash_files(directory)
    if reason := manifest.find_damage(directory, needed=()):
        raise RunFileError(f"{directory} is not as it was written: {reason}")
    return manifest.read_manifest(directory, needed=())


def _hash_files(directory: Path) -> dict[str, FileEntry]:
    """The files of a version that was written without a manifest."""
    files: dict[str, FileEntry] = {}
    for path in sorted(p for p in directory.iterdir() if p.is_file() and not p.name.startswith(".")):
        with path.open("rb") as file:
            files[path.name] = FileEntry(path.stat().st_size, hashlib.file_digest(file, "sha256").hexdigest())
    log.warning("%s has no %s: its files are served as they are now", directory, manifest.NAME)
    return files
