"""Serving policy versions: the trainer writes a directory, samplers fetch its files in chunks."""

from __future__ import annotations

import asyncio
import hashlib
import logging
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import grpc

from treegrpo.core.step import PolicyVersion
from treegrpo.errors import ContractError, RunFileError, describe
from treegrpo.net import limits
from treegrpo.observability.metrics import IntakeMetrics
from treegrpo.storage import manifest
from treegrpo.v1 import weights_pb2, weights_pb2_grpc
from treegrpo.wire.codec import version_from_pb, version_to_pb
from treegrpo.wire.trainer_protocol import KEEP_VERSIONS

log = logging.getLogger(__name__)
CHUNK_BYTES = 1 << 20


@dataclass(frozen=True, slots=True)
class WeightFile:
    path: Path
    size: int
    sha256: bytes


def files_of(directory: Path) -> dict[str, WeightFile]:
    """The files of a version by name, as the manifest names them, which the trainer wrote with them.

    Raises:
        RunFileError: a file is not as it was written.
        OSError, ValueError: there is no such directory.
    """
    if not manifest.exists(directory):
        return _as_they_are(directory)
    if reason := manifest.damage(directory, needed=()):
        raise RunFileError(f"{directory} is not as it was written: {reason}")
    entries = manifest.read(directory, needed=())
    return {name: WeightFile(directory / name, one.size, bytes.fromhex(one.sha256)) for name, one in entries.items()}


def _as_they_are(directory: Path) -> dict[str, WeightFile]:
    """Of a trainer that writes no manifest."""
    files: dict[str, WeightFile] = {}
    for path in sorted(p for p in directory.iterdir() if p.is_file() and not p.name.startswith(".")):
        with path.open("rb") as file:
            files[path.name] = WeightFile(path, path.stat().st_size, hashlib.file_digest(file, "sha256").digest())
    log.warning("%s has no %s: its files are taken for what they are now", directory, manifest.NAME)
    return files


class WeightsServicer(weights_pb2_grpc.WeightsServiceServicer):
    """WeightsService over the newest versions."""

    def __init__(self, metrics: IntakeMetrics) -> None:
        self._metrics = metrics
        self._versions: dict[PolicyVersion, dict[str, WeightFile]] = {}
        self._damaged: PolicyVersion | None = None
        self.on_damaged: Callable[[], None] = lambda: None
        """Called when the newest version is found damaged."""

    @property
    def newest(self) -> PolicyVersion | None:
        return next(reversed(self._versions), None)

    @property
    def damaged(self) -> PolicyVersion | None:
        """The newest version, if its files are not what they were when it was published."""
        return self._damaged if self._damaged == self.newest else None

    async def publish(self, version: PolicyVersion, directory: Path) -> None:
        """Serve a version from now on; it becomes the newest. Raises ContractError: its files are not as they were written."""
        if version == self.newest and self.damaged is None:  # the same, said again: its name was given once
            return
        try:
            self._versions[version] = await asyncio.to_thread(files_of, directory)
        except RunFileError as error:
            raise ContractError(f"Version {version} cannot be served: {str(error).rstrip('.')}; write it again.") from error
        except (OSError, ValueError) as error:
            said = describe(error)[:200]
            raise ContractError(f"Version {version} cannot be served ({said}); publish a directory that is there.") from error
        self._damaged = None
        while len(self._versions) > KEEP_VERSIONS:
            self._versions.pop(next(iter(self._versions)))

    async def _files(
        self, asked: PolicyVersion | None, context: grpc.aio.ServicerContext[Any, Any]
    ) -> tuple[PolicyVersion, dict[str, WeightFile]]:
        version = asked or self.newest
        if version is None:
            await context.abort(grpc.StatusCode.UNAVAILABLE, "No policy version is published yet; try again in a moment.")
        if version not in self._versions:
            await context.abort(grpc.StatusCode.NOT_FOUND, f"Version {version} is no longer served; the newest is {self.newest}.")
        return version, self._versions[version]

    async def DescribeWeights(
        self, request: weights_pb2.DescribeWeightsRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> weights_pb2.DescribeWeightsResponse:
        asked = version_from_pb(request.version) if request.HasField("version") else None
        version, files = await self._files(asked, context)
        return weights_pb2.DescribeWeightsResponse(
            version=version_to_pb(version),
            files=[weights_pb2.WeightFile(name=name, bytes=f.size, sha256=f.sha256) for name, f in files.items()],
        )

    async def FetchWeights(
        self, request: weights_pb2.FetchWeightsRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> AsyncIterator[weights_pb2.FetchWeightsResponse]:
        version, files = await self._files(version_from_pb(request.version), context)
        if request.name not in files:
            await context.abort(
                grpc.StatusCode.NOT_FOUND, f"Version {version} has no file {request.name[: limits.NAME_BYTES]!r}."
            )
        if request.offset > files[request.name].size:
            await context.abort(
                grpc.StatusCode.OUT_OF_RANGE, f"{request.name} ends before byte {request.offset}; ask from a byte that is there."
            )
        async for data, offset in self._read(version, files[request.name], request.offset, context):
            self._metrics.weight_bytes.inc(len(data))
            yield weights_pb2.FetchWeightsResponse(offset=offset, data=data)

    async def _read(
        self, version: PolicyVersion, file: WeightFile, offset: int, context: grpc.aio.ServicerContext[Any, Any]
    ) -> AsyncIterator[tuple[bytes, int]]:
        """The chunks of a file from ``offset`` on, never more than it had; if it is read whole, it is compared."""
        digest, begin = hashlib.sha256(), offset
        try:
            with file.path.open("rb") as opened:
                opened.seek(offset)
                while data := await asyncio.to_thread(opened.read, min(CHUNK_BYTES, file.size - offset)):
                    digest.update(data)
                    yield data, offset
                    offset += len(data)
        except OSError as error:
            await self._is_damaged(version, f"{file.path} cannot be read: {error.strerror or error}", context)
        if offset < file.size:
            await self._is_damaged(version, f"{file.path} has {offset} bytes of {file.size}", context)
        if begin == 0 and digest.digest() != file.sha256:
            await self._is_damaged(version, f"{file.path} has another SHA-256 than when it was published", context)

    async def _is_damaged(self, version: PolicyVersion, reason: str, context: grpc.aio.ServicerContext[Any, Any]) -> NoReturn:
        """End the call, and have the trainer write the version again, if it is the newest."""
        if self._damaged != version:
            log.error("version %s was damaged after it was published: %s", version, reason)
            self._damaged = version
            self.on_damaged()
        await context.abort(grpc.StatusCode.DATA_LOSS, f"Version {version} is damaged; a whole one will be published.")
