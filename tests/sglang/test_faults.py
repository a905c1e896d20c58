"""What goes wrong with real servers: nothing is lost, every failure is counted by its type."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import AsyncGenerator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import httpx
import pytest

from services.sampler.engines.base import Completion, Sampling
from services.sampler.engines.sglang import Place, SGLangEngine, open_child
from services.sampler.engines.sglang.stage import Staged
from services.sampler.engines.sglang.watch import Keeper
from services.sampler.gate import Gate
from services.sampler.outage import Outage
from services.sampler.retries import Retries
from tests.chaos.proxy import Mode, Proxy
from tests.engines import builders
from tests.engines.conformance import FIRST, SECOND, check_spans
from tests.sglang.door import Door
from tests.sglang.servers import PYTHON, Pool, demands, remote
from treegrpo.errors import EngineError, UnavailableError, WeightsError
from treegrpo.step import PolicyVersion
from treegrpo.telemetry import SamplerMetrics

LAUNCH = {"cache_tokens": 8192, "dtype": "float32", "threads": 1, "seed": 0}


@pytest.fixture(scope="module")
def endless(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Two versions of a model that never ends a sequence."""
    paths = tmp_path_factory.mktemp("endless0"), tmp_path_factory.mktemp("endless1")
    for seed, path in enumerate(paths):
        builders.make_model("qwen2", seed + 10).save_pretrained(path)
        builders.save_tokenizer(path, end=None)
    return paths


@asynccontextmanager
async def child(path: Path, log: Path, *flags: str) -> AsyncGenerator[SGLangEngine]:
    place = Place("127.0.0.1", 0, log)
    engine = await open_child(demands(path, max_running=16), place, PYTHON, ("--log-level", "warning", *flags), **LAUNCH)
    async with engine:
        yield engine


async def sample(engine: SGLangEngine, seeds: range, tokens: int) -> list[Completion]:
    """Ask as the sampler does: what is away is waited for."""
    metrics = SamplerMetrics()
    outage, retries = Outage(engine.health, metrics), Retries(2, metrics)

    async def one(seed: int) -> Completion:
        return await retries.run(lambda: engine.generate(builders.prompt(seed, 20), Sampling(tokens)), outage, Gate())

    return await asyncio.gather(*(one(seed) for seed in seeds))


def check(completions: list[Completion], seeds: range, tokens: int, *models: Path) -> None:
    """All are complete, and each token has the log-probability that its version's weights give it."""
    references = dict(zip((FIRST, SECOND), map(builders.open_reference, models), strict=False))
    for seed, completion in zip(seeds, completions, strict=True):
        assert len(completion.ids) == tokens
        check_spans(builders.prompt(seed, 20), completion, references)


async def until(is_so: Callable[[], object]) -> None:
    """Wait for something that servers do in their own time; the test's time limit ends it."""
    while not is_so():  # noqa: ASYNC110
        await asyncio.sleep(0.05)


async def running(engine: SGLangEngine) -> None:
    """Wait until the server says that it computes."""
    await until(lambda: engine.counters.running)


def keeper(engine: SGLangEngine) -> Keeper:
    assert engine.keeper is not None
    return engine.keeper


async def test_a_child_that_is_killed_is_started_again_with_the_version_it_served(
    endless: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("services.sampler.outage.PATIENCE_SECONDS", 240.0)  # two slow cores take longer than a GPU machine
    log, seeds = tmp_path / "server.log", range(6)
    async with child(endless[0], log) as engine:
        await engine.load(SECOND, endless[1])
        asking = asyncio.create_task(sample(engine, seeds, 400))
        await running(engine)
        before = keeper(engine).pid
        os.kill(before, signal.SIGKILL)
        completions = await asking
        assert keeper(engine).pid != before
        assert engine.version == SECOND
        assert engine.counters.restarts == 1
        assert engine.counters.errors["UnavailableError"] > 0
        assert all(span.version == SECOND for c in completions for span in c.spans)
        check(completions, seeds, 400, *endless)
        assert log.stat().st_size > 0

        # SGLang reads a torn file a second time, to "roll back", and dies of it.
        asking = asyncio.create_task(sample(engine, seeds, 200))
        await running(engine)
        with monkeypatch.context() as patch:
            spoil(patch, engine, tear)
            with pytest.raises(UnavailableError):
                await engine.load(PolicyVersion(0, 2), endless[0])
        completions = await asking
        assert engine.version == SECOND
        assert engine.counters.restarts == 2
        check(completions, seeds, 200, *endless)
    with pytest.raises(ProcessLookupError):
        os.killpg(before, 0)


async def test_a_server_that_others_run_is_used_again_when_it_is_back(
    pool: Pool, endless: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Connections are refused for as long as a start takes, about twenty seconds; it comes back with other weights."""
    monkeypatch.setattr("services.sampler.outage.PATIENCE_SECONDS", 240.0)
    path = builders.save_model(tmp_path / "other", "qwen2", seed=77)
    first = await asyncio.to_thread(pool.start, path)
    seeds = range(8)
    async with remote(endless[0], first.url) as engine:
        asking = asyncio.create_task(sample(engine, seeds, 400))
        await running(engine)
        first.stop()
        second = await asyncio.to_thread(pool.start, path, int(first.url.rsplit(":", 1)[1]))
        try:
            check(await asking, seeds, 400, *endless)
        finally:
            second.stop()
        assert engine.counters.errors["UnavailableError"] > 0


async def test_slow_cut_and_garbled_answers_are_asked_for_again(pool: Pool, endless: tuple[Path, Path]) -> None:
    proxy, seeds = Proxy(pool.url("qwen2").removeprefix("http://"), seed=0), range(8)
    async with proxy.serving(), Door(proxy.address).serving() as door, remote(endless[0], f"http://{door.address}") as engine:
        for fault in (Mode.DELAY, Mode.CUT, Mode.RESET):
            asking = asyncio.create_task(sample(engine, seeds, 200))
            await running(engine)
            await proxy.fail(fault, 1.0)
            check(await asking, seeds, 200, *endless)
        assert engine.counters.errors["UnavailableError"] > 0
        door.garbage = True
        asking = asyncio.create_task(sample(engine, seeds, 50))
        await until(lambda: engine.counters.errors.get("ContractError"))
        door.garbage = False
        check(await asking, seeds, 50, *endless)


async def test_an_update_that_the_server_refuses_leaves_the_old_version_serving(
    pool: Pool, endless: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    seeds = range(6)
    async with remote(endless[0], pool.url("qwen2")) as engine:
        asking = asyncio.create_task(sample(engine, seeds, 200))
        await running(engine)
        with monkeypatch.context() as patch:
            spoil(patch, engine, lambda weights: weights.unlink())
            with pytest.raises(WeightsError, match=str(SECOND)):
                await engine.load(SECOND, endless[1])
        assert engine.version == FIRST
        completions = await asking
        assert all(span.version == FIRST for c in completions for span in c.spans)
        check(completions, seeds, 200, *endless)
        await engine.load(SECOND, endless[1])
        check(await sample(engine, range(2), 20), range(2), 20, *endless)


def spoil(patch: pytest.MonkeyPatch, engine: SGLangEngine, how: Callable[[Path], object]) -> None:
    """The next version is checked and put in place; then something happens to its file, as when a disk is full."""
    put = engine.stage.put

    def spoiled(version: PolicyVersion, weights: Path) -> Staged:
        staged = put(version, weights)
        how(staged.path / "model.safetensors")
        return staged

    patch.setattr(engine.stage, "put", spoiled)


def tear(weights: Path) -> None:
    weights.unlink()  # it may be a link to what was published
    weights.write_bytes(b"torn")


async def test_updates_while_more_requests_run_than_there_are_places(pool: Pool, endless: tuple[Path, Path]) -> None:
    seeds = range(30)
    async with remote(endless[0], pool.url("qwen2"), max_running=8) as engine:
        asking = asyncio.create_task(sample(engine, seeds, 150))
        await running(engine)
        await engine.load(SECOND, endless[1])
        completions = await asking
        assert {span.version for c in completions for span in c.spans} == {FIRST, SECOND}
        check(completions, seeds, 150, *endless)
        assert not engine.counters.errors


async def test_requests_that_somebody_else_aborts_go_on(pool: Pool, endless: tuple[Path, Path]) -> None:
    seeds = range(4)
    async with remote(endless[0], pool.url("qwen2")) as engine:
        asking = asyncio.create_task(sample(engine, seeds, 400))
        await running(engine)
        async with httpx.AsyncClient(trust_env=False) as client:
            await client.post(f"{engine.servers[0].api.url}/abort_request", json={"rid": "", "abort_all": True})
        check(await asking, seeds, 400, *endless)


async def test_two_servers_share_the_work_and_one_goes_on_when_the_other_dies(
    pool: Pool, endless: tuple[Path, Path], tmp_path: Path
) -> None:
    seeds = range(16)
    path = builders.save_model(tmp_path / "other", "qwen2", seed=78)
    doomed = await asyncio.to_thread(pool.start, path)
    try:
        async with remote(endless[0], pool.url("qwen2"), doomed.url, max_running=16) as engine:
            await until(lambda: all(server.up for server in engine.servers))
            asking = asyncio.create_task(sample(engine, seeds, 300))
            await until(lambda: all(server.taken for server in engine.servers))
            doomed.stop()
            check(await asking, seeds, 300, *endless)
            await engine.health()
    finally:
        doomed.stop()


async def test_a_server_that_ends_at_once_is_told_in_its_own_words(tmp_path: Path, endless: tuple[Path, Path]) -> None:
    with pytest.raises(EngineError, match="unrecognized arguments: --no-such-flag"):
        async with child(endless[0], tmp_path / "server.log", "--no-such-flag"):
            pass


async def test_a_model_it_refuses_is_told_in_its_own_words(tmp_path: Path) -> None:
    path = builders.save_model(tmp_path / "model", "qwen2")
    config = (path / "config.json").read_text(encoding="utf-8")
    (path / "config.json").write_text(config.replace("Qwen2ForCausalLM", "NoSuchModel"), encoding="utf-8")
    with pytest.raises(EngineError, match="NoSuchModel"):
        async with child(path, tmp_path / "server.log"):
            pass


async def test_where_no_server_is_that_is_said(endless: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("services.sampler.engines.sglang.open.ANSWER_SECONDS", 0.5)
    with pytest.raises(ConnectionError, match=r"engine\.urls"):
        async with remote(endless[0], "http://127.0.0.1:9"):
            pass
