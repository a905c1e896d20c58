"""Serving policy versions: the trainer writes a directory, samplers fetch its files in chunks."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc

from treegrpo import limits
from treegrpo.codec import version_from_pb, version_to_pb
from treegrpo.errors import ContractError, describe
from treegrpo.handoff import KEEP_VERSIONS
from treegrpo.step import PolicyVersion
from treegrpo.telemetry import IntakeMetrics
from treegrpo.v1 import weights_pb2, weights_pb2_grpc

CHUNK_BYTES = 1 << 20


@dataclass(frozen=True, slots=True)
class WeightFile:
    path: Path
    size: int
    sha256: bytes


def manifest(directory: Path) -> dict[str, WeightFile]:
    """The files of a version by name, with their checksums."""
    files: dict[str, WeightFile] = {}
    for path in sorted(p for p in directory.iterdir() if p.is_file()):
        with path.open("rb") as file:
            files[path.name] = WeightFile(path, path.stat().st_size, hashlib.file_digest(file, "sha256").digest())
    return files


class WeightsServer(weights_pb2_grpc.WeightsServiceServicer):
    """WeightsService over the newest versions."""

    def __init__(self, metrics: IntakeMetrics) -> None:
        self._metrics = metrics
        self._versions: dict[PolicyVersion, dict[str, WeightFile]] = {}

    @property
    def newest(self) -> PolicyVersion | None:
        return next(reversed(self._versions), None)

    async def publish(self, version: PolicyVersion, directory: Path) -> None:
        """Serve a version from now on; it becomes the newest. Raises ContractError: its files cannot be read."""
        if version == self.newest:  # the same, said again: its name was given once
            return
        try:
            self._versions[version] = await asyncio.to_thread(manifest, directory)
        except (OSError, ValueError) as error:
            said = describe(error)[:200]
            raise ContractError(f"Version {version} cannot be served ({said}); publish a directory that is there.") from error
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
        with files[request.name].path.open("rb") as file:
            file.seek(request.offset)
            offset = request.offset
            while data := await asyncio.to_thread(file.read, CHUNK_BYTES):
                self._metrics.weight_bytes.inc(len(data))
                yield weights_pb2.FetchWeightsResponse(offset=offset, data=data)
                offset += len(data)
