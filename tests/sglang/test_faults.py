"""Faults of real servers: no request is lost, every failure is counted by its type."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Callable
from pathlib import Path

import httpx
import pytest

from services.sampler.engines.sglang import SGLangEngine
from services.sampler.engines.sglang.server.timings import SGLangTimings
from services.sampler.engines.sglang.server.weight_staging import StagedVersion
from services.sampler.engines.sglang.supervision import ServerSupervisor
from tests.chaos.fault_proxy import FaultProxy, LinkFault
from tests.engines.conformance import FIRST, SECOND
from tests.sglang.faulty_proxy import FaultyProxy
from tests.sglang.sampling_harness import check, child, running, sample, until
from tests.sglang.server_harness import ServerPool, remote
from treegrpo.core.step import PolicyVersion
from treegrpo.errors import UnavailableError, WeightsError


def supervisor(engine: SGLangEngine) -> ServerSupervisor:
    assert engine.supervisor is not None
    return engine.supervisor


async def test_a_killed_child_is_restarted_with_the_version_it_served(
    endless: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log, seeds = tmp_path / "server.log", range(6)
    async with child(endless[0], log) as engine:
        await engine.load_weights(SECOND, endless[1])
        asking = asyncio.create_task(sample(engine, seeds, 400))
        await running(engine, asking)
        before = supervisor(engine).pid
        os.kill(before, signal.SIGKILL)
        completions = await asking
        assert supervisor(engine).pid != before
        assert engine.version == SECOND
        assert engine.counters.restarts == 1
        assert engine.counters.errors["UnavailableError"] > 0
        assert all(span.version == SECOND for c in completions for span in c.spans)
        check(completions, seeds, 400, *endless)
        assert log.stat().st_size > 0

        # SGLang reads a torn file a second time, to "roll back", and dies of it.
        asking = asyncio.create_task(sample(engine, seeds, 200))
        await running(engine, asking)
        with monkeypatch.context() as patch:
            spoil(patch, engine, tear)
            with pytest.raises(UnavailableError):
                await engine.load_weights(PolicyVersion(0, 2), endless[0])
        completions = await asking
        assert engine.version == SECOND
        assert engine.counters.restarts == 2
        check(completions, seeds, 200, *endless)
    with pytest.raises(ProcessLookupError):
        os.killpg(before, 0)


async def test_a_server_that_others_run_is_used_again_when_it_is_back(pool: ServerPool, endless: tuple[Path, Path]) -> None:
    """Connections are refused for as long as a start takes, about twenty seconds; it comes back with other weights."""
    path = pool.model("qwen2")
    first = await asyncio.to_thread(pool.start_server, path)
    seeds = range(8)
    async with remote(endless[0], first.url) as engine:
        asking = asyncio.create_task(sample(engine, seeds, 400))
        await running(engine, asking)
        first.kill()
        second = await asyncio.to_thread(pool.start_server, path, int(first.url.rsplit(":", 1)[1]))
        try:
            check(await asking, seeds, 400, *endless)
        finally:
            second.kill()
        assert engine.counters.errors["UnavailableError"] > 0


async def test_connections_that_are_refused_for_twenty_seconds_are_sat_out(pool: ServerPool, endless: tuple[Path, Path]) -> None:
    """With the patience of every run."""
    seeds = range(8)
    async with (
        FaultyProxy(pool.url("qwen2").removeprefix("http://")).serving() as door,
        remote(endless[0], f"http://{door.address}") as engine,
    ):
        asking = asyncio.create_task(sample(engine, seeds, 400))
        await running(engine, asking)
        await door.shut(20.0)
        assert not asking.done()
        check(await asking, seeds, 400, *endless)
        assert engine.counters.errors["UnavailableError"] > 0


async def test_slow_cut_and_garbled_answers_are_asked_for_again(pool: ServerPool, endless: tuple[Path, Path]) -> None:
    proxy, seeds = FaultProxy(pool.url("qwen2").removeprefix("http://"), seed=0), range(8)
    async with (
        proxy.serving(),
        FaultyProxy(proxy.address).serving() as door,
        remote(endless[0], f"http://{door.address}") as engine,
    ):
        for fault in (LinkFault.DELAY, LinkFault.CUT, LinkFault.RESET):
            asking = asyncio.create_task(sample(engine, seeds, 200))
            await running(engine, asking)
            await proxy.fail(fault, 1.0)
            check(await asking, seeds, 200, *endless)
        assert engine.counters.errors["UnavailableError"] > 0
        door.garbage = True
        asking = asyncio.create_task(sample(engine, seeds, 50))
        await until(lambda: engine.counters.errors.get("ContractError"))
        door.garbage = False
        check(await asking, seeds, 50, *endless)


async def test_a_request_that_is_not_answered_in_time_is_made_again(pool: ServerPool, endless: tuple[Path, Path]) -> None:
    timings = SGLangTimings(generate=5.0)
    proxy, seeds = FaultProxy(pool.url("qwen2").removeprefix("http://"), seed=0), range(4)
    async with (
        proxy.serving(),
        remote(endless[0], f"http://{proxy.address}", timings=timings) as engine,
        asyncio.TaskGroup() as tasks,
    ):
        tasks.create_task(proxy.fail(LinkFault.DROP, 7.0))
        check(await sample(engine, seeds, 20), seeds, 20, *endless)
        assert engine.counters.errors["DeadlineError"] > 0


async def test_retracted_requests_complete_and_lower_the_limit(endless: tuple[Path, Path], tmp_path: Path) -> None:
    """The server takes in more than it has room for, and puts back what does not fit."""
    seeds, put_back, limits = range(16), list[int](), list[int]()
    flags = ("--max-total-tokens", "1200", "--schedule-conservativeness", "0.1")
    async with child(endless[0], tmp_path / "server.log", *flags) as engine:
        request_limit = engine.servers[0].request_limit
        count_retractions, adjust_limit = request_limit.count_retractions, request_limit.adjust_limit

        def retracted(times: int) -> None:
            put_back.append(times)
            count_retractions(times)

        def look(usage: float, running: int) -> None:
            adjust_limit(usage, running)
            limits.append(request_limit.current)

        request_limit.count_retractions, request_limit.adjust_limit = retracted, look  # pyright: ignore[reportAttributeAccessIssue]
        check(await sample(engine, seeds, 400), seeds, 400, *endless)
        assert not engine.counters.errors
    assert sum(put_back) > 0
    assert min(limits) < limits[0]


async def test_an_update_that_the_server_refuses_leaves_the_old_version_serving(
    pool: ServerPool, endless: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    seeds = range(6)
    async with remote(endless[0], pool.url("qwen2")) as engine:
        asking = asyncio.create_task(sample(engine, seeds, 400))
        await running(engine, asking)
        with monkeypatch.context() as patch:
            spoil(patch, engine, lambda weights: weights.unlink())
            with pytest.raises(WeightsError, match=str(SECOND)):
                await engine.load_weights(SECOND, endless[1])
        assert engine.version == FIRST
        completions = await asking
        assert all(span.version == FIRST for c in completions for span in c.spans)
        check(completions, seeds, 400, *endless)
        await engine.load_weights(SECOND, endless[1])
        check(await sample(engine, range(2), 20), range(2), 20, *endless)


def spoil(patch: pytest.MonkeyPatch, engine: SGLangEngine, how: Callable[[Path], object]) -> None:
    """The next version is checked and put in place; then something happens to its file, as when a disk is full."""
    stage_weights = engine.staging.stage_weights

    def spoiled(version: PolicyVersion, weights: Path) -> StagedVersion:
        staged = stage_weights(version, weights)
        how(staged.path / "model.safetensors")
        return staged

    patch.setattr(engine.staging, "stage_weights", spoiled)


def tear(weights: Path) -> None:
    weights.unlink()  # it may be a link to what was published
    weights.write_bytes(b"torn")


async def test_updates_while_more_requests_run_than_there_are_places(pool: ServerPool, endless: tuple[Path, Path]) -> None:
    seeds = range(30)
    async with remote(endless[0], pool.url("qwen2"), max_running=8) as engine:
        asking = asyncio.create_task(sample(engine, seeds, 150))
        await running(engine, asking)
        await engine.load_weights(SECOND, endless[1])
        completions = await asking
        assert {span.version for c in completions for span in c.spans} == {FIRST, SECOND}
        check(completions, seeds, 150, *endless)
        assert not engine.counters.errors


async def test_requests_that_somebody_else_aborts_go_on(pool: ServerPool, endless: tuple[Path, Path]) -> None:
    seeds = range(4)
    async with remote(endless[0], pool.url("qwen2")) as engine:
        asking = asyncio.create_task(sample(engine, seeds, 400))
        await running(engine, asking)
        async with httpx.AsyncClient(trust_env=False) as client:
            await client.post(f"{engine.servers[0].client.url}/abort_request", json={"rid": "", "abort_all": True})
        check(await asking, seeds, 400, *endless)
