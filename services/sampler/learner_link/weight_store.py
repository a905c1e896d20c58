"""Downloads policy versions from the learner: files in chunks, resumed where a stream broke, checked by SHA-256."""

from __future__ import annotations

import asyncio
import hashlib
import os
import shutil
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc

from treegrpo.errors import UnavailableError, WeightsError
from treegrpo.observability.metrics import SamplerMetrics
from treegrpo.timing.backoff import Backoff
from treegrpo.v1 import weights_pb2, weights_pb2_grpc
from treegrpo.wire.codec import version_from_pb

RESUME_BACKOFF = Backoff((0.2, 1.0, 2.0, 5.0), retries=4)


@dataclass(frozen=True, slots=True)
class DownloadTimings:
    """Time limits of the weights' requests, in seconds, and how a download is resumed."""

    describe: float = 30.0
    """The longest the description of a version may take."""
    chunk: float = 60.0
    """The longest one chunk may take."""
    resume: Backoff = RESUME_BACKOFF
    """Before a file is resumed from where its stream broke."""


class WeightStore:
    """Keeps the newest two policy versions as directories, downloaded from the learner."""

    def __init__(
        self, channel: grpc.aio.Channel, root: Path, metrics: SamplerMetrics, timings: DownloadTimings | None = None
    ) -> None:
        self._stub: Any = weights_pb2_grpc.WeightsServiceStub(channel)
        self._root = root
        self._metrics = metrics
        self._timings = timings or DownloadTimings()
        self._by_checksum: dict[bytes, Path] = {}
        """Checked files of the newest directory by SHA-256."""
        self._checked: set[Path] = set()
        """Files that are complete, of versions that may not be."""
        self._kept: list[Path] = []

    async def describe_newest(self) -> weights_pb2.DescribeWeightsResponse:
        """The learner's newest version. Raises UnavailableError while it has none or does not answer."""
        try:
            return await self._stub.DescribeWeights(weights_pb2.DescribeWeightsRequest(), timeout=self._timings.describe)
        except grpc.aio.AioRpcError as error:
            raise UnavailableError(f"The learner describes no policy version ({_reason(error)}); see its log.") from error

    async def fetch_version(self, described: weights_pb2.DescribeWeightsResponse) -> Path:
        """The directory of a version, every file checked.

        Raises:
            WeightsError: a file does not have its checksum; the files that do are kept for the next attempt.
            UnavailableError: the learner did not send it.
        """
        version, began = version_from_pb(described.version), time.monotonic()
        directory = self._root / str(version)
        directory.mkdir(exist_ok=True)
        for file in described.files:
            await self._fetch_file(described.version, file, _path_inside(directory, file.name))
        self._by_checksum = {file.sha256: directory / file.name for file in described.files}
        self._remove_old(directory)
        self._metrics.fetch.observe(time.monotonic() - began)
        return directory

    async def _fetch_file(self, version: Any, file: weights_pb2.WeightFile, target: Path) -> None:
        if target in self._checked:
            return
        same = self._by_checksum.get(file.sha256)
        if same is not None and await asyncio.to_thread(_sha256, same) == file.sha256:  # it may have changed since it came
            os.link(same, target)
            self._checked.add(target)
            return
        part = target.with_name(f".{target.name}.part")
        digest = await self._download(version, file, part)
        if part.stat().st_size != file.bytes or digest != file.sha256:
            part.unlink()
            raise WeightsError(f"{file.name} of version {version_from_pb(version)} arrived with a wrong size or SHA-256.")
        part.rename(target)
        self._checked.add(target)

    async def _download(self, version: Any, file: weights_pb2.WeightFile, part: Path) -> bytes:
        """Download a file into ``part``, resuming where a stream broke; returns its SHA-256."""
        digest, offset, retries = hashlib.sha256(), 0, self._timings.resume.schedule()
        with part.open("wb") as out:
            while True:
                call = self._stub.FetchWeights(weights_pb2.FetchWeightsRequest(version=version, name=file.name, offset=offset))
                try:
                    while isinstance(
                        chunk := await asyncio.wait_for(call.read(), self._timings.chunk), weights_pb2.FetchWeightsResponse
                    ):
                        if chunk.offset != offset:
                            raise WeightsError(f"{file.name} came from byte {chunk.offset}, not from {offset} as asked.")
                        await asyncio.to_thread(_write_chunk, chunk.data, out, digest)
                        offset += len(chunk.data)
                        self._metrics.fetched_bytes.inc(len(chunk.data))
                except (grpc.aio.AioRpcError, TimeoutError) as error:
                    if _is_permanent(error) or not await retries.sleep():
                        raise UnavailableError(
                            f"The learner did not send {file.name} ({_reason(error)}); see its log."
                        ) from error
                else:
                    return digest.digest()
                finally:
                    call.cancel()

    def _remove_old(self, directory: Path) -> None:
        """Keep this version and the one before; remove everything else."""
        self._kept = [*(kept for kept in self._kept if kept != directory), directory][-2:]
        for other in self._root.iterdir():
            if other not in self._kept:
                shutil.rmtree(other)
        self._checked = {file for file in self._checked if file.parent in self._kept}


def _sha256(path: Path) -> bytes | None:
    """None if it cannot be read."""
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").digest()
    except OSError:
        return None


def _write_chunk(data: bytes, out: Any, digest: Any) -> None:
    out.write(data)
    digest.update(data)


def _path_inside(directory: Path, name: str) -> Path:
    if not name or name != Path(name).name or name.startswith("."):
        raise WeightsError(f"The learner names a weight file {name!r}, which is not a plain file name.")
    return directory / name


def _is_permanent(error: Exception) -> bool:
    """Whether retrying is useless: the version is no longer served, or the learner has found it damaged."""
    permanent = (grpc.StatusCode.NOT_FOUND, grpc.StatusCode.DATA_LOSS)
    return isinstance(error, grpc.aio.AioRpcError) and error.code() in permanent


def _reason(error: Exception) -> str:
    return f"{error.code().name}: {error.details()}" if isinstance(error, grpc.aio.AioRpcError) else "it stopped sending"
