"""WeightsService: samplers fetch the files of published policy versions in chunks."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import AsyncIterator
from typing import Any, NoReturn

import grpc

from learner.intake.coordinator.version_publisher import PublishedVersion, VersionPublisher
from treegrpo.core.step import PolicyVersion
from treegrpo.net import limits
from treegrpo.observability.metrics import IntakeMetrics
from treegrpo.v1 import weights_pb2, weights_pb2_grpc
from treegrpo.wire.codec import version_from_pb, version_to_pb

CHUNK_BYTES = 1 << 20
Context = grpc.aio.ServicerContext[Any, Any]


class WeightsServicer(weights_pb2_grpc.WeightsServiceServicer):
    def __init__(self, versions: VersionPublisher, metrics: IntakeMetrics) -> None:
        self._versions = versions
        self._metrics = metrics

    async def DescribeWeights(
        self, request: weights_pb2.DescribeWeightsRequest, context: Context
    ) -> weights_pb2.DescribeWeightsResponse:
        requested = version_from_pb(request.version) if request.HasField("version") else None
        published = await self._find_or_abort(requested, context)
        return weights_pb2.DescribeWeightsResponse(
            version=version_to_pb(published.version),
            files=[
                weights_pb2.WeightFile(name=name, bytes=entry.size, sha256=bytes.fromhex(entry.sha256))
                for name, entry in published.files.items()
            ],
        )

    async def FetchWeights(
        self, request: weights_pb2.FetchWeightsRequest, context: Context
    ) -> AsyncIterator[weights_pb2.FetchWeightsResponse]:
        published = await self._find_or_abort(version_from_pb(request.version), context)
        if request.name not in published.files:
            await context.abort(
                grpc.StatusCode.NOT_FOUND, f"Version {published.version} has no file {request.name[: limits.NAME_BYTES]!r}."
            )
        if request.offset > published.files[request.name].size:
            await context.abort(
                grpc.StatusCode.OUT_OF_RANGE, f"{request.name} ends before byte {request.offset}; ask from a byte that is there."
            )
        async for data, offset in self._read_chunks(published, request.name, request.offset, context):
            self._metrics.weight_bytes.inc(len(data))
            yield weights_pb2.FetchWeightsResponse(offset=offset, data=data)

    async def _find_or_abort(self, requested: PolicyVersion | None, context: Context) -> PublishedVersion:
        """The requested version, or the newest."""
        version = requested or self._versions.newest
        if version is None:
            await context.abort(grpc.StatusCode.UNAVAILABLE, "No policy version is published yet; try again in a moment.")
        if (published := self._versions.find_version(version)) is None:
            await context.abort(
                grpc.StatusCode.NOT_FOUND, f"Version {version} is no longer served; the newest is {self._versions.newest}."
            )
        return published

    async def _read_chunks(
        self, published: PublishedVersion, name: str, offset: int, context: Context
    ) -> AsyncIterator[tuple[bytes, int]]:
        """The chunks of a file from ``offset`` on, within its published size; a file read whole is compared by its SHA-256."""
        path, entry = published.directory / name, published.files[name]
        digest, start = hashlib.sha256(), offset
        try:
            with path.open("rb") as file:
                file.seek(offset)
                while data := await asyncio.to_thread(file.read, min(CHUNK_BYTES, entry.size - offset)):
                    digest.update(data)
                    yield data, offset
                    offset += len(data)
        except OSError as error:
            await self._abort_as_damaged(published, f"{path} cannot be read: {error.strerror or error}", context)
        if offset < entry.size:
            await self._abort_as_damaged(published, f"{path} has {offset} bytes of {entry.size}", context)
        if start == 0 and digest.hexdigest() != entry.sha256:
            await self._abort_as_damaged(published, f"{path} has another SHA-256 than when it was published", context)

    async def _abort_as_damaged(self, published: PublishedVersion, reason: str, context: Context) -> NoReturn:
        """Abort the call, and have the trainer write the version again."""
        self._versions.mark_damaged(published.version, reason)
        await context.abort(grpc.StatusCode.DATA_LOSS, f"Version {published.version} is damaged; a whole one will be published.")
