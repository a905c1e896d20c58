"""Liveness probes: what shows from outside that every part of a run works.

A part that only answers has not recovered: after a fault every part must have done new work.
"""

from __future__ import annotations

import asyncio
import contextlib
from pathlib import Path

import aiomqtt
import httpx
import msgpack
from prometheus_client.parser import text_string_to_metric_families

from services.cli.processes.readiness import probe_learner
from tests.chaos.chaos_run import RUN, ChaosRun
from tests.chaos.run_records import steps_written
from treegrpo.errors import UnavailableError

PROBE_SECONDS = 2.0
WORK = {"retriever": "treegrpo_retriever_queries_total", "sampler": "treegrpo_engine_tokens_total"}
"""The metric that shows a part's work, by role."""


async def scrape(address: str) -> dict[str, float]:
    """The sums of a part's metrics by name. Raises UnavailableError."""
    try:
        async with httpx.AsyncClient(timeout=PROBE_SECONDS) as client:
            text = (await client.get(f"http://{address}/metrics")).raise_for_status().text
    except httpx.HTTPError as error:
        raise UnavailableError(f"{address}/metrics does not answer ({type(error).__name__})") from error
    sums: dict[str, float] = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            sums[sample.name] = sums.get(sample.name, 0.0) + sample.value
    return sums


async def probe_control_plane(address: str, members: set[str]) -> None:
    """The broker knows state, weights, and all ``members`` as alive. Raises UnavailableError."""
    missing = {"state", "weights", *members}
    there: dict[str, set[str]] = {}
    host, _, port = address.rpartition(":")
    with contextlib.suppress(TimeoutError, aiomqtt.MqttError):
        async with asyncio.timeout(PROBE_SECONDS), aiomqtt.Client(host, int(port), timeout=PROBE_SECONDS) as client:
            await client.subscribe(f"treegrpo/{RUN}/#", qos=1)
            async for message in client.messages:
                topic = message.topic.value.removeprefix(f"treegrpo/{RUN}/")
                if not topic.startswith("members/"):
                    missing.discard(topic)
                elif message.payload:  # a name may be there twice: who was killed is said to be gone in between
                    member = msgpack.unpackb(message.payload)
                    there.setdefault(member["id"], set())
                    (there[member["id"]].add if member["alive"] else there[member["id"]].discard)(topic)
                    (missing.discard if there[member["id"]] else missing.add)(member["id"])
                if not missing:
                    return
    raise UnavailableError(f"the broker lacks {', '.join(sorted(missing))}")


class LivenessProbes:
    """The probes of a chaos run."""

    def __init__(self, run: ChaosRun) -> None:
        self._run = run
        self._progress: Path = run.run_dir / "progress.jsonl"

    async def work_done(self) -> dict[str, float]:
        """What each part has done so far, by its own count; a part that does not answer is left out."""
        done = {"trainer": float(steps_written(self._progress))}
        for part in ("retriever", *self._run.samplers):
            name = WORK.get(part, WORK["sampler"])
            with contextlib.suppress(UnavailableError):
                done[part] = (await scrape(self._run.metrics[part])).get(name, 0.0)
        return done

    async def probe_ready(self) -> None:
        """Every part answers its health check, and all samplers have a stream; the hostile one may. Raises UnavailableError."""
        run = self._run
        await probe_learner(run.address("intake"))
        for part in ("retriever", "trainer"):
            await scrape(run.metrics[part])
        streams = (await scrape(run.metrics["intake"]))["treegrpo_samplers_connected"]
        if streams < len(run.samplers):
            raise UnavailableError(f"the intake has {streams:.0f} streams of {len(run.samplers)}")
        await probe_control_plane(run.address("broker"), {*run.samplers, "learner"})

    async def probe_new_work(self, mark: dict[str, float]) -> None:
        """Everybody has worked since ``mark``, and is ready. Raises UnavailableError."""
        await self.probe_ready()
        now = await self.work_done()
        idle = [part for part in (*mark, *now) if not now.get(part) or now[part] == mark.get(part)]
        if idle:
            raise UnavailableError(f"no work yet of {', '.join(sorted(set(idle)))}")
