"""Policy versions on their way into the engine: described, fetched in chunks, checked, loaded.

announced ─► describe the newest ─► fetch what changed ─► SHA-256 ─► engine.load ─► served
   ▲                                   └─ unchanged files are linked      │
   └──────────── versions that were overtaken meanwhile are skipped ◄─────┘
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import os
import shutil
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc

from services.sampler.engines.base import Engine
from services.sampler.expansion.stall_monitor import Want
from treegrpo.core.step import PolicyVersion
from treegrpo.errors import DeadlineError, UnavailableError, WeightsError, describe
from treegrpo.observability.metrics import SamplerMetrics
from treegrpo.timing.backoff import Backoff
from treegrpo.timing.notifier import Notifier
from treegrpo.v1 import weights_pb2, weights_pb2_grpc
from treegrpo.wire.codec import version_from_pb

log = logging.getLogger(__name__)
DESCRIBE_SECONDS = 30.0
CHUNK_SECONDS = 60.0
"""The longest that one chunk may take."""
FIRST_VERSION = Backoff((0.5,), seconds=300.0)
"""How a sampler waits for a learner that has no version yet."""


@dataclass(frozen=True, slots=True)
class WeightTimings:
    """Time limits and back-offs on the weights' way into the engine."""

    resume: Backoff = Backoff((0.2, 1.0, 2.0, 5.0), retries=4)
    """Before a file is resumed from where its stream broke."""
    update: Backoff = Backoff((0.2, 1.0, 2.0, 5.0, 10.0))
    """Before the newest version is asked for again, after an update failed."""
    refused: Backoff = Backoff((5.0, 60.0, 300.0))
    """Before a version that the engine refused is offered to it again. Its files arrived whole, so most likely it is refused for
    what they are, and each offer makes the engine pause for nothing; but a file system that servers share may show them late,
    and memory come free."""
    served_seconds: float = 600.0
    """The longest a lease waits for the version it needs."""


TIMINGS = WeightTimings()


class WeightStore:
    """The newest two policy versions as directories, fetched from the learner."""

    def __init__(self, channel: grpc.aio.Channel, root: Path, metrics: SamplerMetrics, timings: WeightTimings = TIMINGS) -> None:
        self._stub: Any = weights_pb2_grpc.WeightsServiceStub(channel)
        self._root = root
        self._timings = timings
        self._metrics = metrics
        self._known: dict[bytes, Path] = {}
        """Checked files of the newest directory by SHA-256."""
        self._checked: set[Path] = set()
        """Files that are complete, of versions that may not be."""
        self._kept: list[Path] = []

    async def describe(self) -> weights_pb2.DescribeWeightsResponse:
        """The learner's newest version. Raises UnavailableError while it has none or does not answer."""
        try:
            return await self._stub.DescribeWeights(weights_pb2.DescribeWeightsRequest(), timeout=DESCRIBE_SECONDS)
        except grpc.aio.AioRpcError as error:
            raise UnavailableError(f"The learner describes no policy version ({_said(error)}); see its log.") from error

    async def fetch(self, described: weights_pb2.DescribeWeightsResponse) -> Path:
        """The directory of a version, every file checked.

        Raises:
            WeightsError: a file is not what its checksum says; what was right is kept for the next attempt.
            UnavailableError: the learner did not send it.
        """
        version, began = version_from_pb(described.version), time.monotonic()
        directory = self._root / str(version)
        directory.mkdir(exist_ok=True)
        for file in described.files:
            await self._file(described.version, file, _inside(directory, file.name))
        self._known = {file.sha256: directory / file.name for file in described.files}
        self._keep(directory)
        self._metrics.fetch.observe(time.monotonic() - began)
        return directory

    async def _file(self, version: Any, file: weights_pb2.WeightFile, target: Path) -> None:
        if target in self._checked:
            return
        same = self._known.get(file.sha256)
        if same is not None and await asyncio.to_thread(_sha256, same) == file.sha256:  # it may have changed since it came
            os.link(same, target)
            self._checked.add(target)
            return
        part = target.with_name(f".{target.name}.part")
        digest = await self._download(version, file, part)
        if part.stat().st_size != file.bytes or digest != file.sha256:
            part.unlink()
            raise WeightsError(f"{file.name} of version {version_from_pb(version)} arrived broken: its SHA-256 is another one.")
        part.rename(target)
        self._checked.add(target)

    async def _download(self, version: Any, file: weights_pb2.WeightFile, part: Path) -> bytes:
        """Fetch a file into ``part``, going on from where a stream broke; returns its SHA-256."""
        digest, offset, retries = hashlib.sha256(), 0, self._timings.resume.schedule()
        with part.open("wb") as out:
            while True:
                call = self._stub.FetchWeights(weights_pb2.FetchWeightsRequest(version=version, name=file.name, offset=offset))
                try:
                    while isinstance(
                        chunk := await asyncio.wait_for(call.read(), CHUNK_SECONDS), weights_pb2.FetchWeightsResponse
                    ):
                        if chunk.offset != offset:
                            raise WeightsError(f"{file.name} came from byte {chunk.offset}, not from {offset} as asked.")
                        await asyncio.to_thread(_take, chunk.data, out, digest)
                        offset += len(chunk.data)
                        self._metrics.fetched_bytes.inc(len(chunk.data))
                except (grpc.aio.AioRpcError, TimeoutError) as error:
                    if _gone(error) or not await retries.sleep():
                        raise UnavailableError(f"The learner did not send {file.name} ({_said(error)}); see its log.") from error
                else:
                    return digest.digest()
                finally:
                    call.cancel()

    def _keep(self, directory: Path) -> None:
        """Keep this version and the one before, nothing else."""
        self._kept = [*(kept for kept in self._kept if kept != directory), directory][-2:]
        for other in self._root.iterdir():
            if other not in self._kept:
                shutil.rmtree(other)
        self._checked = {file for file in self._checked if file.parent in self._kept}


class Follower:
    """Keeps the engine at the newest version it hears of."""

    def __init__(self, store: WeightStore, engine: Engine, metrics: SamplerMetrics, timings: WeightTimings = TIMINGS) -> None:
        self._store = store
        self._timings = timings
        self._engine = engine
        self._metrics = metrics
        self._newest = engine.version
        self._refused: PolicyVersion | None = None
        """What the engine last said no to."""
        self._refusals = 0
        """Times it had said so before."""
        self._again = 0.0
        """When it is offered again, in time.monotonic."""
        self._heard = Notifier()
        self._loaded = Notifier()
        self._waiting: dict[object, Want] = {}
        """Of each lease that needs a later version, the oldest first."""
        metrics.version.set(engine.version.step)

    def hear(self, version: PolicyVersion | None) -> None:
        """Somebody says that ``version`` is the newest. Hearing it twice changes nothing."""
        if version is not None and version != self._newest:
            self._newest = version
            self._heard.notify()

    @property
    def want(self) -> Want | None:
        """What a lease waits for, for the longest time."""
        return next(iter(self._waiting.values()), None)

    async def serves(self, version: PolicyVersion) -> None:
        """Return once the engine serves ``version`` or a later one. Raises DeadlineError after `WeightTimings.served_seconds`."""
        if self._engine.version < version:
            self.hear(version)
        began, lease, limit = time.monotonic(), object(), self._timings.served_seconds
        self._waiting[lease] = Want("weights", f"policy version {version} from the learner", began)
        try:
            while self._engine.version < version:
                if not await self._loaded.wait(began + limit):
                    raise DeadlineError(
                        f"The engine still serves version {self._engine.version}, not {version}, after {limit:.0f} s; "
                        "see this sampler's log for why the weights do not arrive."
                    )
        finally:
            del self._waiting[lease]

    async def run(self) -> None:
        """Follow for ever. An update that fails is counted, and tried again with whatever is newest then."""
        attempt = 0
        while True:
            if self._newest == self._engine.version:
                await self._heard.wait()
            try:
                await self.update()
                attempt = 0
            except (WeightsError, UnavailableError, OSError) as error:  # the last: a disk that is full
                wait = self._timings.update.delay(attempt)
                attempt += 1
                self._metrics.errors.labels(type(error).__name__).inc()
                self._metrics.not_updated.labels(type(error).__name__).inc()
                log.warning("no new weights, looking again in %.1f s: %s", wait, describe(error))
                await asyncio.sleep(wait)

    async def update(self) -> None:
        """Load the learner's newest version. What was announced tells when to ask, the learner tells which it is."""
        asked = self._newest
        described = await self._store.describe()
        version = version_from_pb(described.version)
        if self._newest == asked:  # else something was announced meanwhile, and is asked for next
            self._newest = version
        if version == self._refused and time.monotonic() < self._again:
            if self._newest == version:
                await self._heard.wait(self._again)
        elif version != self._engine.version:
            await self._load(version, await self._store.fetch(described))

    async def _load(self, version: PolicyVersion, path: Path) -> None:
        try:
            with self._metrics.swap.time():
                await self._engine.load(version, path)
        except WeightsError:
            self._refusals = self._refusals + 1 if version == self._refused else 0
            rest = self._timings.refused.delay(self._refusals)
            self._refused, self._again = version, time.monotonic() + rest
            log.warning("version %s is refused, and offered again in %.0f s; a newer one at once", version, rest)
            raise
        self._metrics.version.set(version.step)
        log.info("serving version %s", version)
        self._loaded.notify()


async def first_version(store: WeightStore, backoff: Backoff = FIRST_VERSION) -> tuple[PolicyVersion, Path]:
    """Wait for the learner's first version and fetch it. Raises the last error once ``backoff`` ends."""
    retries, said = backoff.schedule(), ""
    while True:
        try:
            described = await store.describe()
            return version_from_pb(described.version), await store.fetch(described)
        except (WeightsError, UnavailableError) as error:
            if (delay := retries.next_delay()) is None:
                raise
            if str(error) != said:
                said = str(error)
                log.info("waiting for the first policy version: %s", said)
            await asyncio.sleep(delay)


def _sha256(path: Path) -> bytes | None:
    """None if it cannot be read."""
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").digest()
    except OSError:
        return None


def _take(data: bytes, out: Any, digest: Any) -> None:
    out.write(data)
    digest.update(data)


def _inside(directory: Path, name: str) -> Path:
    if not name or name != Path(name).name or name.startswith("."):
        raise WeightsError(f"The learner names a weight file {name!r}, which is no plain file name.")
    return directory / name


def _gone(error: Exception) -> bool:
    """The file cannot be had from this version: it is served no more, or the learner has found it damaged."""
    gone = (grpc.StatusCode.NOT_FOUND, grpc.StatusCode.DATA_LOSS)
    return isinstance(error, grpc.aio.AioRpcError) and error.code() in gone


def _said(error: Exception) -> str:
    return f"{error.code().name}: {error.details()}" if isinstance(error, grpc.aio.AioRpcError) else "it fell silent"
