"""The sampler as a process: a real intake, a real broker, the embedded engine."""

from __future__ import annotations

import asyncio
import contextlib
import sys
from collections.abc import AsyncGenerator
from pathlib import Path

import httpx
import pytest

from tests.engines.builders import save_model
from tests.intake.process_harness import IntakeProcess
from tests.ports import free_address
from tests.sampler.sampler_harness import ROLLOUT
from treegrpo.core.step import StepStatus
from treegrpo.core.tree import Group
from treegrpo.runtime.entrypoint import TRANSIENT
from treegrpo.wire.control import RunState, publish_state
from treegrpo.wire.trainer_protocol import Done, Evaluate, Evaluation, IntakeConnection, Publish, Take, Taken, unpack_group


@contextlib.asynccontextmanager
async def sampler(intake: IntakeProcess, name: str, *more: str) -> AsyncGenerator[asyncio.subprocess.Process]:
    """A sampler process; killed at the end if it still runs."""
    command = [sys.executable, "-m", "services.sampler", *intake.flags, *ROLLOUT, "--sampler.id", name, *more]
    process = await asyncio.create_subprocess_exec(*command, stderr=asyncio.subprocess.PIPE)
    try:
        yield process
    finally:
        if process.returncode is None:
            process.kill()
        await process.wait()


async def publish(intake: IntakeProcess, trainer: IntakeConnection, step: int) -> None:
    directory = save_model(intake.run_dir / "weights" / f"1.{step}", seed=step)
    await asyncio.to_thread(trainer.ask, Publish(f"1.{step}", str(directory), 2 * step), Done)


async def take(trainer: IntakeConnection, position: int) -> list[Group]:
    while True:
        taken = await asyncio.to_thread(trainer.ask, Take(position, 2), Taken)
        if taken.groups:
            return [unpack_group(group) for group in taken.groups]


async def connected(intake: IntakeProcess, samplers: int) -> None:
    """Wait until the intake counts so many samplers; the test's time limit ends it."""
    while (await intake.samples())["treegrpo_samplers_connected"] != samplers:  # noqa: ASYNC110
        await asyncio.sleep(0.05)


async def value(metrics: str, name: str) -> float:
    """A sampler's metric."""
    async with httpx.AsyncClient() as client:
        text = (await client.get(f"http://{metrics}/metrics")).text
    return next(float(line.split()[1]) for line in text.splitlines() if line.startswith(f"{name} "))


def versions(groups: list[Group]) -> set[int]:
    return {span.version.step for group in groups for span in group.spans()}


async def ended(process: asyncio.subprocess.Process) -> str:
    """What a process that ends well has said."""
    _, said = await asyncio.wait_for(process.communicate(), 30)
    assert process.returncode == 0, said.decode()
    return said.decode()


@pytest.mark.whole_run
async def test_questions_become_trees_under_the_newest_weights_until_a_drain(intake: IntakeProcess) -> None:
    metrics = free_address()
    async with contextlib.AsyncExitStack() as stack:
        await stack.enter_async_context(intake.serving(*ROLLOUT))
        trainer = await stack.enter_async_context(intake.trainer())
        stays = await stack.enter_async_context(sampler(intake, "stays", "--sampler.metrics", metrics))
        leaves = await stack.enter_async_context(sampler(intake, "leaves"))
        await publish(intake, trainer, 0)
        groups = await take(trainer, 0)
        assert [len(list(group.leaves())) for group in groups] == [6, 6]
        steps = [step for group in groups for tree in group.trees.values() for step in tree.steps.values()]
        assert {step.status for step in steps} <= {StepStatus.OK, StepStatus.TRUNCATED}
        assert all(len(step.logprobs) == len(step.action) > 0 for step in steps)
        assert versions(groups) == {0}
        assert any(step.cost.cached for step in steps)

        await connected(intake, 2)
        leaves.terminate()  # which finishes and leaves; the other goes on
        assert "all work is delivered" in await ended(leaves)

        await publish(intake, trainer, 1)
        position = 0
        while versions(groups) != {1}:
            position += 2
            groups = await take(trainer, position)
        while not (evaluation := await asyncio.to_thread(trainer.ask, Evaluate("1.1"), Evaluation)).done:
            pass
        assert (evaluation.questions, evaluation.failed) == (3, 0)
        assert await value(metrics, "treegrpo_engine_version_step") == 1
        assert await value(metrics, "treegrpo_engine_cache_size_tokens") == 65536

        await publish_state(intake.broker, intake.name, RunState.DRAINING)
        assert "all work is delivered" in await ended(stays)
        await connected(intake, 0)
        samples = await intake.samples()
        assert samples["treegrpo_leases_outstanding/train"] == 0
        assert samples["treegrpo_leases_ended_total/train/lost"] == 0


async def test_a_broker_that_is_not_there_is_one_sentence(tmp_path: Path) -> None:
    intake = IntakeProcess(tmp_path, free_address())
    async with sampler(intake, "alone") as process:
        _, errors = await asyncio.wait_for(process.communicate(), 30)
    assert process.returncode == TRANSIENT
    assert f"error: No MQTT broker answers at broker.address = {intake.broker}" in errors.decode().splitlines()[-1]
    assert b"Traceback" not in errors
