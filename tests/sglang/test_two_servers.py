"""Two real servers behind one sampler: trees stick, branches spill over, one goes on without the other."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from pathlib import Path

import numpy as np

from services.sampler.engines.base import SamplingParams
from services.sampler.engines.sglang import SGLangEngine
from tests.engines import builders
from tests.sglang.sampling_harness import check, sample, until
from tests.sglang.server_harness import RunningServer, ServerPool, remote

TREES, TREE_TOKENS, BRANCHES = 6, 64, 12


@asynccontextmanager
async def two(pool: ServerPool, path: Path) -> AsyncGenerator[tuple[SGLangEngine, RunningServer]]:
    """The engine on two servers with eight places each, and the one that may die."""
    other = await asyncio.to_thread(pool.start_server, pool.model("qwen2"))
    try:
        async with remote(path, pool.url("qwen2"), other.url, max_running=16) as engine:
            await until(lambda: all(server.up for server in engine.servers))
            yield engine, other
    finally:
        other.kill()


async def test_trees_stay_on_a_server_and_spilled_branches_where_they_went(pool: ServerPool, endless: tuple[Path, Path]) -> None:
    roots = [builders.prompt(seed, TREE_TOKENS) for seed in range(TREES)]
    async with two(pool, endless[0]) as (engine, _):
        begun = await asyncio.gather(*(engine.generate(root, SamplingParams(16)) for root in roots))
        for root, first in zip(roots, begun, strict=True):
            turn = np.concatenate((root, first.ids, builders.prompt(100, 5)))
            # The last sampled token was never an input.
            assert (await engine.generate(turn, SamplingParams(4))).cached == len(root) + len(first.ids) - 1

        assert max(server.request_limit.current for server in engine.servers) < BRANCHES
        prefixes = [np.concatenate((roots[0], builders.prompt(200 + n, 9))) for n in range(BRANCHES)]
        branches = await asyncio.gather(*(engine.generate(prefix, SamplingParams(48)) for prefix in prefixes))
        away = [branch for branch in branches if branch.cached < TREE_TOKENS]
        assert len(away) == 1  # the first that spilled over; the others find there what it has computed
        for prefix, branch in zip(prefixes, branches, strict=True):
            turn = np.concatenate((prefix, branch.ids, builders.prompt(300, 5)))
            assert (await engine.generate(turn, SamplingParams(4))).cached == len(prefix) + len(branch.ids) - 1


async def test_two_servers_share_the_work_and_one_goes_on_when_the_other_dies(
    pool: ServerPool, endless: tuple[Path, Path]
) -> None:
    seeds = range(16)
    async with two(pool, endless[0]) as (engine, doomed):
        asking = asyncio.create_task(sample(engine, seeds, 300))
        await until(lambda: all(server.slots_taken for server in engine.servers))
        doomed.kill()
        check(await asking, seeds, 300, *endless)
        await engine.check_health()
