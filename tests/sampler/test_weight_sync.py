"""Policy versions: fetched, checked, linked where unchanged, loaded; only the newest matters."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path

import pytest

from services.sampler.learner_link.weight_store import DownloadTimings, WeightStore
from services.sampler.learner_link.weight_sync import SyncTimings, WeightSync, fetch_first_version
from tests.sampler.fake_learner import FakeLearner, serving
from tests.sampler.fakes import FakeEngine, deep
from treegrpo.core.step import PolicyVersion
from treegrpo.errors import DeadlineError, UnavailableError, WeightsError
from treegrpo.observability.metrics import SamplerMetrics
from treegrpo.timing.backoff import Backoff

V1, V2, V3, V4, V5 = (PolicyVersion(1, step) for step in range(1, 6))
CONFIG = b'{"a": 1}'


DOWNLOAD = DownloadTimings(resume=Backoff((0.0,), retries=4))
TIMINGS = SyncTimings(update=Backoff((0.0,)))
FIRST_VERSION = Backoff((0.0,), seconds=60.0)


def files(step: int) -> dict[str, bytes]:
    return {"config.json": CONFIG, "model.safetensors": f"weights of step {step}".encode()}


@asynccontextmanager
async def store_of(learner: FakeLearner, root: Path, metrics: SamplerMetrics | None = None) -> AsyncGenerator[WeightStore]:
    async with serving(learner) as channel:
        yield WeightStore(channel, root, metrics or SamplerMetrics(), DOWNLOAD)


@asynccontextmanager
async def following(
    learner: FakeLearner, root: Path, timings: SyncTimings = TIMINGS
) -> AsyncGenerator[tuple[WeightSync, FakeEngine, SamplerMetrics]]:
    metrics, engine = SamplerMetrics(), FakeEngine(deep(1))
    async with store_of(learner, root, metrics) as store, asyncio.TaskGroup() as tasks:
        weight_sync = WeightSync(store, engine, metrics, timings)
        task = tasks.create_task(weight_sync.follow_versions())
        yield weight_sync, engine, metrics
        task.cancel()


def names(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


def content(directory: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in directory.iterdir()}


async def test_a_version_arrives_whole_and_in_its_own_directory(tmp_path: Path) -> None:
    learner = FakeLearner()
    learner.versions[V1] = files(1)
    async with store_of(learner, tmp_path) as store:
        assert content(await store.fetch_version(await store.describe_newest())) == files(1)
        assert names(tmp_path) == ["1.1"]


async def test_unchanged_files_are_linked_not_fetched(tmp_path: Path) -> None:
    learner, metrics = FakeLearner(), SamplerMetrics()
    async with store_of(learner, tmp_path, metrics) as store:
        for version in (V1, V2):
            learner.versions[version] = files(version.step)
            directory = await store.fetch_version(await store.describe_newest())
        assert content(directory) == files(2)
        assert [(version, name) for version, name, _ in learner.fetched if name == "config.json"] == [(V1, "config.json")]
        assert (tmp_path / "1.1" / "config.json").samefile(tmp_path / "1.2" / "config.json")
        fetched = metrics.registry.get_sample_value("treegrpo_weights_fetched_bytes_total")
        assert fetched == len(CONFIG) + 2 * len(files(1)["model.safetensors"])


async def test_two_directories_are_kept(tmp_path: Path) -> None:
    learner = FakeLearner()
    async with store_of(learner, tmp_path) as store:
        for version in (V1, V2, V3, V4):
            learner.versions[version] = files(version.step)
            await store.fetch_version(await store.describe_newest())
        assert names(tmp_path) == ["1.3", "1.4"]


async def test_a_broken_stream_goes_on_where_it_broke(tmp_path: Path) -> None:
    learner = FakeLearner()
    learner.versions[V1] = files(1)
    learner.interrupt = ["model.safetensors"]
    async with store_of(learner, tmp_path) as store:
        assert content(await store.fetch_version(await store.describe_newest())) == files(1)
    assert [offset for _, name, offset in learner.fetched if name == "model.safetensors"] == [0, 4]


async def test_a_wrong_checksum_is_refused_and_only_that_file_is_fetched_again(tmp_path: Path) -> None:
    learner = FakeLearner()
    learner.versions[V1] = files(1)
    learner.corrupt = ["model.safetensors"]
    async with store_of(learner, tmp_path) as store:
        described = await store.describe_newest()
        with pytest.raises(WeightsError, match=r"model\.safetensors of version 1\.1"):
            await store.fetch_version(described)
        assert content(tmp_path / "1.1") == {"config.json": CONFIG}
        assert content(await store.fetch_version(described)) == files(1)
    assert [name for _, name, _ in learner.fetched] == ["config.json", "model.safetensors", "model.safetensors"]


@pytest.mark.parametrize("name", ["../escape", "/etc/passwd", "", ".hidden", "a/b"])
async def test_a_file_name_that_leads_elsewhere_is_refused(tmp_path: Path, name: str) -> None:
    learner = FakeLearner()
    learner.versions[V1] = {name: b"x"}
    async with store_of(learner, tmp_path / ".") as store:
        with pytest.raises(WeightsError, match="not a plain file name"):
            await store.fetch_version(await store.describe_newest())
    assert learner.fetched == []


async def test_a_version_the_learner_no_longer_has_is_given_up_at_once(tmp_path: Path) -> None:
    learner = FakeLearner()
    learner.forgotten = {V1}
    learner.versions[V1] = files(1)
    async with store_of(learner, tmp_path) as store:
        with pytest.raises(UnavailableError, match="NOT_FOUND: gone"):
            await store.fetch_version(await store.describe_newest())
    assert len(learner.fetched) == 1


async def test_the_engine_loads_what_is_announced(tmp_path: Path) -> None:
    learner = FakeLearner()
    learner.versions[V1] = files(1)
    async with following(learner, tmp_path) as (weight_sync, engine, metrics):
        weight_sync.note_announcement(V1)
        await weight_sync.wait_for_version(V1)
        assert engine.loaded == [(V1, files(1))]
        assert metrics.registry.get_sample_value("treegrpo_engine_version_step") == 1


async def test_a_corrupt_version_is_counted_and_tried_again(tmp_path: Path) -> None:
    learner = FakeLearner()
    learner.versions[V1] = files(1)
    learner.corrupt = ["model.safetensors"] * 2
    async with following(learner, tmp_path) as (weight_sync, engine, metrics):
        weight_sync.note_announcement(V1)
        await weight_sync.wait_for_version(V1)
        assert engine.loaded == [(V1, files(1))]
        for name in ("treegrpo_sampler_errors_total", "treegrpo_weights_updates_failed_total"):
            assert metrics.registry.get_sample_value(name, {"type": "WeightsError"}) == 2


async def test_versions_that_are_overtaken_are_skipped(tmp_path: Path) -> None:
    learner, loading, go_on = FakeLearner(), asyncio.Event(), asyncio.Event()
    learner.versions[V1] = files(1)
    async with following(learner, tmp_path) as (weight_sync, engine, _):
        load = engine.load_weights

        async def slowly(version: PolicyVersion, path: Path) -> None:
            loading.set()
            await go_on.wait()
            await load(version, path)

        engine.load_weights = slowly
        weight_sync.note_announcement(V1)
        await loading.wait()
        for version in (V2, V3, V4, V5):
            learner.versions[version] = files(version.step)
            weight_sync.note_announcement(version)
        go_on.set()
        await weight_sync.wait_for_version(V5)
        assert [version for version, _ in engine.loaded] == [V1, V5]


async def test_an_engine_that_refuses_a_version_gets_the_next(tmp_path: Path) -> None:
    learner = FakeLearner()
    learner.versions[V1] = files(1)
    async with following(learner, tmp_path) as (weight_sync, engine, _):
        engine.refused = {V1}
        refused = asyncio.Event()
        load = engine.load_weights

        async def noticed(version: PolicyVersion, path: Path) -> None:
            refused.set()
            await load(version, path)

        engine.load_weights = noticed
        weight_sync.note_announcement(V1)
        await refused.wait()
        learner.versions[V2] = files(2)
        await weight_sync.wait_for_version(V2)
        assert [version for version, _ in engine.loaded] == [V2]


async def test_a_refused_version_is_not_offered_again_until_there_is_another(tmp_path: Path) -> None:
    """Whatever is heard meanwhile: a lease may name an older version than the one that was refused."""
    learner = FakeLearner()
    learner.versions[V2] = files(2)
    async with following(learner, tmp_path) as (weight_sync, engine, metrics):
        engine.refused = {V2}
        offered, load = list[PolicyVersion](), engine.load_weights

        async def noted(version: PolicyVersion, path: Path) -> None:
            offered.append(version)
            await load(version, path)

        engine.load_weights = noted
        weight_sync.note_announcement(V2)
        for _ in range(2):  # it is refused between the two
            await learner.described.get()
        weight_sync.note_announcement(V1)
        await learner.described.get()
        learner.versions[V3] = files(3)
        await weight_sync.wait_for_version(V3)
        assert offered == [V2, V3]
        assert metrics.registry.get_sample_value("treegrpo_weights_updates_failed_total", {"type": "WeightsError"}) == 1


async def test_a_version_that_is_refused_is_offered_again_much_later(tmp_path: Path) -> None:
    timings = replace(TIMINGS, refused=Backoff((0.05,)))
    learner = FakeLearner()
    learner.versions[V1] = files(1)
    async with following(learner, tmp_path, timings) as (weight_sync, engine, _):
        engine.refused, load = {V1}, engine.load_weights

        async def refused_once(version: PolicyVersion, path: Path) -> None:
            try:
                await load(version, path)
            finally:
                engine.refused = set()

        engine.load_weights = refused_once
        await weight_sync.wait_for_version(V1)
        assert [version for version, _ in engine.loaded] == [V1]


async def test_an_announcement_left_over_from_another_run_loads_nothing(tmp_path: Path) -> None:
    """The retained announcement may be stale: the learner's own word counts."""
    learner = FakeLearner()
    learner.versions[PolicyVersion(1, 0)] = files(0)
    async with following(learner, tmp_path) as (weight_sync, engine, _):
        weight_sync.note_announcement(PolicyVersion(1, 50))
        await learner.described.get()
        learner.versions[V1] = files(1)
        weight_sync.note_announcement(V1)
        await weight_sync.wait_for_version(V1)
        assert [version for version, _ in engine.loaded] == [V1]
        assert {version for version, _, _ in learner.fetched} == {V1}
        assert learner.described.qsize() == 1


async def test_a_learner_that_went_back_to_another_lineage_is_followed(tmp_path: Path) -> None:
    learner = FakeLearner()
    back = PolicyVersion(2, 3)
    learner.versions[back] = files(3)
    async with following(learner, tmp_path) as (weight_sync, engine, _):
        engine.version = PolicyVersion(1, 9)
        weight_sync.note_announcement(back)
        await weight_sync.wait_for_version(back)
        assert engine.version == back


async def test_a_version_that_never_comes_is_a_deadline_with_a_reason(tmp_path: Path) -> None:
    timings = replace(TIMINGS, version_wait=0.05)
    learner = FakeLearner()
    learner.versions[PolicyVersion(1, 0)] = files(0)
    async with following(learner, tmp_path, timings) as (weight_sync, _, _metrics):
        with pytest.raises(DeadlineError, match=r"version 1\.0, not 1\.5"):
            await weight_sync.wait_for_version(V5)


async def test_the_first_version_is_waited_for(tmp_path: Path) -> None:
    learner = FakeLearner()
    learner.versions[V1] = files(1)
    learner.late = 3
    async with store_of(learner, tmp_path) as store:
        version, path = await fetch_first_version(store, FIRST_VERSION)
    assert version == V1
    assert content(path) == files(1)


async def test_a_first_version_that_does_not_come_names_the_learner_s_reason(tmp_path: Path) -> None:
    async with store_of(FakeLearner(), tmp_path) as store:
        with pytest.raises(UnavailableError, match="no policy version yet"):
            await fetch_first_version(store, Backoff((0.0,), retries=0))
