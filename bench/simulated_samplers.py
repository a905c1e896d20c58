"""Simulated samplers in one process: each has a connection and a stream to both servers, and answers leases at once.

    python -m bench.simulated_samplers '{"servers": {"intake": ["127.0.0.1:1", 123], "echo": [...]}, "samplers": 16, ...}'

The servers alternate: in a slice of time all samplers send to one server as fast as it accepts, then the open leases are
finished, then the other server follows. Prints one JSON object, server → slices.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import sys
import time
from collections.abc import Generator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import grpc

from bench.traffic import SIZES, Script, Slice, encoded, percentile
from treegrpo.core.lease import HEARTBEAT_SECONDS
from treegrpo.timing.notifier import Notifier
from treegrpo.v1 import rollout_pb2 as pb

METHOD = "/treegrpo.v1.RolloutService/Rollout"
TURNS = 5
"""Slices of each server; the first is left out, it warms up."""
READY_SECONDS = 120.0


@dataclass
class SamplerWork:
    """The state of the samplers of one server: leases held, acks awaited."""

    script: Script
    samplers: int
    joined: int = 0
    held: int = 0
    unacked: dict[tuple[str, int, int], float] = field(default_factory=dict[tuple[str, int, int], float])
    """time.perf_counter of the write."""
    waited: list[float] = field(default_factory=list[float])
    """Seconds of every ack of this slice."""
    refused: str = ""
    changed: Notifier = field(default_factory=Notifier)

    @property
    def idle(self) -> bool:
        return self.joined == self.samplers and not self.held and not self.unacked

    def notify_if_idle(self) -> None:
        """Notify those who wait for the end."""
        if self.idle:
            self.changed.notify()


class SimulatedSampler:
    """One stream, read and written by two independent tasks."""

    def __init__(self, name: str, call: Any, work: SamplerWork) -> None:
        self._name, self._call, self._work = name, call, work
        self._line: asyncio.Queue[str | bytes] = asyncio.Queue()

    def queue_request(self, request: bytes) -> None:
        """Queue a request behind those not yet sent."""
        self._line.put_nowait(request)

    async def send_requests(self) -> None:
        hello = pb.Hello(sampler=self._name, incarnation=1, engine="bench", capacity=64)
        await self._call.write(encoded(hello=hello))
        while True:
            queued = await self._line.get()
            if isinstance(queued, bytes):
                await self._call.write(queued)
                continue
            *subtrees, end = self._work.script.requests(queued)
            for key, request in zip(self._work.script.keys, subtrees, strict=True):
                self._work.unacked[(queued, *key)] = time.perf_counter()
                await self._call.write(request)
            await self._call.write(end)
            self._work.held -= 1
            self._work.notify_if_idle()

    async def receive_responses(self) -> None:
        work = self._work
        while True:
            message = await self._call.read()
            match message.WhichOneof("kind"):
                case "ack":
                    ack = message.ack
                    work.waited.append(time.perf_counter() - work.unacked.pop((ack.lease, ack.tree, ack.index)))
                    work.refused = work.refused or ack.refusal
                case "lease":
                    work.held += 1
                    self._line.put_nowait(message.lease.id)
                case "welcome":
                    work.joined += 1
                case _:
                    pass
            work.notify_if_idle()


class SamplerGroup:
    """All samplers of one server."""

    def __init__(self, address: str, pid: int, script: Script, samplers: int, leases: int) -> None:
        self._address, self._pid, self._leases = address, pid, leases
        self.work = SamplerWork(script, samplers)
        self._samplers: list[SimulatedSampler] = []

    async def open_streams(self, tasks: asyncio.TaskGroup, stack: contextlib.AsyncExitStack) -> list[asyncio.Task[None]]:
        """Open every stream; the tasks that serve them."""
        running: list[asyncio.Task[None]] = []
        for number in range(self.work.samplers):
            options = [("grpc.use_local_subchannel_pool", 1)]  # a connection each, as samplers have
            channel = await stack.enter_async_context(grpc.aio.insecure_channel(self._address, options=options))
            call: Any = channel.stream_stream(METHOD, None, pb.RolloutResponse.FromString)()
            sampler = SimulatedSampler(f"bench-{number}", call, self.work)
            self._samplers.append(sampler)
            running += [tasks.create_task(sampler.send_requests()), tasks.create_task(sampler.receive_responses())]
        running.append(tasks.create_task(self._beat()))
        async with asyncio.timeout(READY_SECONDS):
            while not self.work.idle:
                await self.work.changed.wait()
        return running

    async def measure_slice(self, seconds: float) -> Slice:
        """Work for ``seconds``, then finish what is in flight."""
        self.work.waited.clear()
        began, cpu = time.perf_counter(), cpu_seconds(self._pid)
        self._want(self._leases)
        await asyncio.sleep(seconds)
        took, spent, waited = time.perf_counter() - began, cpu_seconds(self._pid) - cpu, list(self.work.waited)
        self._want(0)
        async with asyncio.timeout(READY_SECONDS):
            while not self.work.idle:
                await self.work.changed.wait()
        if self.work.refused:
            raise SystemExit(f"a subtree was refused: {self.work.refused}")
        return Slice(len(waited), took, spent, percentile(waited, 0.99), resident(self._pid))

    def _want(self, leases: int) -> None:
        self._say(encoded(demand=pb.Demand(leases=leases)))

    async def _beat(self) -> None:
        """Send heartbeats: a silent sampler loses its leases."""
        while True:
            await asyncio.sleep(HEARTBEAT_SECONDS)
            self._say(encoded(heartbeat=pb.Heartbeat()))

    def _say(self, request: bytes) -> None:
        for sampler in self._samplers:
            sampler.queue_request(request)


def cpu_seconds(pid: int) -> float:
    """User and system time of a process so far."""
    fields = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def resident(pid: int) -> int:
    """Bytes of a process in memory."""
    return int(Path(f"/proc/{pid}/statm").read_text(encoding="utf-8").split()[1]) * os.sysconf("SC_PAGE_SIZE")


@contextlib.contextmanager
def cancelled(tasks: list[asyncio.Task[None]]) -> Generator[None]:
    yield
    for task in tasks:
        task.cancel()


async def run(servers: dict[str, tuple[str, int]], *, samplers: int, leases: int, size: str, seconds: float, seed: int) -> None:
    script = Script(SIZES[size], seed)
    groups = {name: SamplerGroup(address, pid, script, samplers, leases) for name, (address, pid) in servers.items()}
    slices: dict[str, list[dict[str, float]]] = {name: [] for name in groups}
    async with contextlib.AsyncExitStack() as stack, asyncio.TaskGroup() as tasks:
        running: list[asyncio.Task[None]] = []
        for group in groups.values():
            running += await group.open_streams(tasks, stack)
        with cancelled(running):
            for _ in range(TURNS):
                for name, group in groups.items():
                    slices[name].append(asdict(await group.measure_slice(seconds)))
    print(json.dumps({name: rows[1:] for name, rows in slices.items()}))


if __name__ == "__main__":
    asyncio.run(run(**json.loads(sys.argv[1])))
