"""What an intake at work does when another program touches the files it serves, listens at, or writes."""

from __future__ import annotations

import asyncio
import contextlib
import shutil
from collections.abc import AsyncGenerator
from pathlib import Path
from typing import Any, cast

import grpc
import pytest

from learner.intake.coordinator.version_publisher import VersionPublisher
from learner.intake.persistence.directory_monitor import DirectoryMonitor
from learner.intake.persistence.snapshot import SnapshotStore
from learner.intake.rpc.trainer_socket import serve_trainer
from learner.intake.rpc.weights_servicer import WeightsServicer
from learner.intake.wal.filesystem import LocalFileSystem
from learner.intake.wal.journal import Journal
from learner.intake.wal.segments import JournalEnd
from services.sampler.learner_link.weight_store import WeightStore
from tests.intake.server_harness import no_versions
from treegrpo.core.step import PolicyVersion
from treegrpo.errors import ContractError, RunError, UnavailableError
from treegrpo.observability.metrics import IntakeMetrics, SamplerMetrics
from treegrpo.storage import manifest
from treegrpo.v1 import weights_pb2_grpc
from treegrpo.wire.trainer_protocol import IntakeConnection

VERSION = PolicyVersion(1, 4)


def written(folder: Path, byte: bytes = b"w") -> Path:
    """A version as the trainer writes it."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    (folder / "model.safetensors").write_bytes(byte * 3_000_000)
    (folder / "config.json").write_text("{}", encoding="utf-8")
    manifest.write_manifest(folder)
    (folder / ".DS_Store").write_bytes(b"x")
    return folder


@contextlib.asynccontextmanager
async def served(folder: Path) -> AsyncGenerator[tuple[VersionPublisher, WeightStore]]:
    """The version in ``folder`` behind a real server, and a sampler's store that fetches it."""
    versions, server = no_versions(), grpc.aio.server()
    await versions.publish_version(VERSION, folder, 0)
    weights_pb2_grpc.add_WeightsServiceServicer_to_server(WeightsServicer(versions, IntakeMetrics()), server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    store = folder.parent / "store"
    store.mkdir()
    try:
        async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
            yield versions, WeightStore(channel, store, SamplerMetrics())
    finally:
        await server.stop(0)


@pytest.mark.parametrize("damage", ["turned", "torn", "missing"])
async def test_weights_damaged_after_publishing_are_not_served(tmp_path: Path, damage: str) -> None:
    """The sampler gets an error, the trainer is asked for the version again, and what it writes then is served."""
    folder, notified = written(tmp_path / "1.4"), list[str]()
    async with served(folder) as (versions, store):
        versions.on_damaged = lambda: notified.append("damaged")
        file = folder / "model.safetensors"
        data = file.read_bytes()
        file.unlink()
        if damage != "missing":
            file.write_bytes(data[:-1] + b"v" if damage == "turned" else data[:-1])
        described = await store.describe_newest()
        assert [one.name for one in described.files] == ["config.json", "model.safetensors"]
        with pytest.raises(UnavailableError, match=r"DATA_LOSS: Version 1\.4 is damaged; a whole one will be published"):
            await store.fetch_version(described)
        assert (notified, versions.damaged) == (["damaged"], VERSION)
        with pytest.raises(ContractError, match=r"Version 1\.4 cannot be served: .*model\.safetensors .*; write it again"):
            await versions.publish_version(VERSION, folder, 0)
        await versions.publish_version(VERSION, written(folder), 0)
        assert versions.damaged is None
        assert (await store.fetch_version(await store.describe_newest()) / "model.safetensors").read_bytes() == data


async def test_a_damaged_file_in_the_samplers_store_is_fetched_again(tmp_path: Path) -> None:
    async with served(written(tmp_path / "1.4")) as (versions, store):
        kept = await store.fetch_version(await store.describe_newest())
        (kept / "model.safetensors").write_bytes(b"v" * 3_000_000)
        await versions.publish_version(PolicyVersion(1, 5), written(tmp_path / "1.5"), 0)
        fetched = await store.fetch_version(await store.describe_newest())
        assert (fetched / "model.safetensors").read_bytes() == b"w" * 3_000_000


def connected(path: Path) -> IntakeConnection:
    """A client, as soon as somebody listens."""
    while True:
        with contextlib.suppress(UnavailableError):
            return IntakeConnection(str(path))


async def test_a_removed_socket_is_bound_again(tmp_path: Path) -> None:
    path = tmp_path / "intake.sock"
    async with serve_trainer(cast("Any", None), str(path), rebind_check_seconds=0.01), asyncio.timeout(20):
        path.unlink()
        (await asyncio.to_thread(connected, path)).close()
    assert not path.exists()


async def test_a_directory_in_place_of_the_socket_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "intake.sock"
    async with serve_trainer(cast("Any", None), str(path)):
        path.unlink()
        path.mkdir()
    assert path.is_dir()


@contextlib.contextmanager
def watched(run_dir: Path) -> Any:
    """A journal with one segment, and who watches its directory."""
    disk, folder = LocalFileSystem(), run_dir / "journal"
    run_dir.mkdir()
    with Journal.open_journal(disk, folder, JournalEnd()) as journal:
        journal.append_record({"event": "closed", "draw": 0})
        journal.commit_next()
        yield DirectoryMonitor(disk, journal, SnapshotStore(disk, run_dir / "snapshots"), run_dir)


async def test_a_removed_segment_is_replaced_by_a_snapshot(tmp_path: Path) -> None:
    asked: list[int] = []
    with watched(tmp_path / "run") as watch:
        watch.check_directories(lambda: asked.append(1))
        assert asked == []
        (tmp_path / "run" / "journal" / "00000001.log").unlink()
        for _ in range(2):
            watch.check_directories(lambda: asked.append(1))
    assert asked == [1]


@pytest.mark.parametrize("gone", ["run", "run/journal"])
async def test_a_removed_directory_ends_the_run(tmp_path: Path, gone: str) -> None:
    with watched(tmp_path / "run") as watch:
        (tmp_path / gone).rename(tmp_path / "elsewhere")
        (tmp_path / gone).mkdir()
        with pytest.raises(RunError, match=f"The directory {tmp_path / gone} was removed or replaced while the run went on"):
            watch.check_directories(lambda: None)
