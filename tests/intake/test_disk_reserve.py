"""Room that is kept for the journal: a full disk holds up new leases, and nothing that is under way."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator
from pathlib import Path

import pytest

from learner.intake.coordinator.batcher import Batches
from learner.intake.coordinator.journaled_leases import Clerk
from learner.intake.monitoring.recorder import RunRecorder
from learner.intake.wal import disk_reserve
from learner.intake.wal.disk_reserve import NAME, RESERVE_BYTES, DiskReserve
from learner.intake.wal.filesystem import LocalFileSystem
from learner.intake.wal.journal import Journal
from learner.intake.wal.segments import JournalEnd
from tests.intake.builders import book, chain, complete
from tests.intake.in_memory_filesystem import InMemoryFileSystem
from treegrpo.observability.metrics import IntakeMetrics
from treegrpo.timing.backoff import Backoff
from treegrpo.wire.codec import subtree_to_pb

FOLDER = Path("/run/journal")


@contextlib.asynccontextmanager
async def at_work(disk: InMemoryFileSystem, monkeypatch: pytest.MonkeyPatch) -> AsyncGenerator[Journal]:
    monkeypatch.setattr(disk_reserve, "LOOK_SECONDS", 0.01)
    disk.make_folder(FOLDER)
    with Journal.open(disk, FOLDER, JournalEnd(), backoff=Backoff((0.01,))) as journal:
        kept = DiskReserve(disk, journal)
        tasks = [asyncio.create_task(work) for work in (journal.write_forever(), kept.keep_forever())]
        yield journal
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def until(disk: InMemoryFileSystem, *, kept: bool) -> None:
    async with asyncio.timeout(10):
        while (FOLDER / NAME in disk.files) is not kept:  # noqa: ASYNC110
            await asyncio.sleep(0.001)


def fill(disk: InMemoryFileSystem) -> None:
    """Somebody else takes all that is free."""
    disk.size -= disk.free(FOLDER)


async def test_on_a_full_disk_what_is_under_way_comes_in_and_ready_groups_get_their_positions(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    disk, made = InMemoryFileSystem(), book(batch=2, max_lag=3)
    async with at_work(disk, monkeypatch) as journal:
        clerk = Clerk(made, journal, RunRecorder(IntakeMetrics(), Path("/dev/null"), window=2))
        batches = Batches(made, clerk, lambda _: None)
        while (work := made.next_lease()) is not None:
            clerk.grant(*work, "s/1")
        leases = list(made.open)[:6]
        for lease in leases[:4]:
            clerk.accept(subtree_to_pb(chain(lease)))
            clerk.end(complete(lease))
        await journal.barrier()
        await until(disk, kept=True)
        assert journal.short_since is None
        fill(disk)
        for position in (0, 2):
            assert len(batches.batch(position, 2)) == 2
            async with asyncio.timeout(5):
                await clerk.given
        assert (journal.blocked, journal.short_since is None) == (False, False)
        late = [clerk.accept(subtree_to_pb(chain(lease))) for lease in leases[4:]]
        async with asyncio.timeout(5):
            await asyncio.gather(*late)
        disk.size += 3 * RESERVE_BYTES
        await until(disk, kept=True)
        async with asyncio.timeout(5):
            while journal.short_since is not None:  # noqa: ASYNC110
                await asyncio.sleep(0.001)


async def test_when_the_reserve_is_used_up_too_the_disk_refuses_and_loses_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    disk = InMemoryFileSystem()
    async with at_work(disk, monkeypatch) as journal:
        await journal.append({"n": 0})
        await until(disk, kept=True)
        fill(disk)
        large = [journal.append({"n": n, "data": bytes(1 << 20)}) for n in range(1, 25)]
        async with asyncio.timeout(10):
            while not journal.blocked:  # noqa: ASYNC110
                await asyncio.sleep(0.001)
        assert 0 < sum(done.done() for done in large) < len(large)
        disk.size += 4 * RESERVE_BYTES
        async with asyncio.timeout(10):
            await asyncio.gather(*large)


async def test_a_reserve_takes_room_on_a_real_disk_and_gives_it_back(tmp_path: Path) -> None:
    folder = tmp_path / "journal"
    file = folder / NAME
    with Journal.open(LocalFileSystem(), folder, JournalEnd()) as journal:
        kept = DiskReserve(LocalFileSystem(), journal)
        keeping = asyncio.create_task(kept.keep_forever())
        async with asyncio.timeout(10):
            while not file.exists() or file.stat().st_blocks * 512 < RESERVE_BYTES:  # noqa: ASYNC110
                await asyncio.sleep(0.001)
        assert journal.on_full()
        assert not file.exists()
        assert not journal.on_full(), "there is no more"
        keeping.cancel()
        await asyncio.gather(keeping, return_exceptions=True)
