"""A real intake process with a real broker, and the two peers it talks to."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import sys
from collections.abc import AsyncGenerator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import httpx
from prometheus_client.parser import text_string_to_metric_families

from tests.intake.builders import VERSION, chain, complete
from tests.ports import free_address
from treegrpo.core.lease import LeaseEnd, LeaseEndReason
from treegrpo.core.step import PolicyVersion
from treegrpo.net.local_socket import socket_path
from treegrpo.v1 import rollout_pb2 as pb
from treegrpo.v1 import rollout_pb2_grpc
from treegrpo.wire.codec import lease_end_to_pb, subtree_to_pb, version_from_pb
from treegrpo.wire.trainer_protocol import IntakeConnection


def write_questions(path: Path, count: int, split: str) -> Path:
    rows = [
        {
            "data_source": "made",
            "prompt": [{"role": "user", "content": f"{split} {i}?"}],
            "reward_model": {"ground_truth": {"target": [str(i)]}},
            "extra_info": {"split": split, "index": i},
        }
        for i in range(count)
    ]
    path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    return path


class IntakeProcess:
    """Addresses and files of one run."""

    def __init__(self, tmp_path: Path, broker: str) -> None:
        self.run_dir = tmp_path / "run"
        self.broker, self.listen, self.metrics = broker, free_address(), free_address()
        self.name = tmp_path.name[-64:].strip("-_")
        self._train = write_questions(tmp_path / "train.jsonl", 8, "train")
        self._heldout = write_questions(tmp_path / "heldout.jsonl", 3, "test")
        self.model = tmp_path / "model"
        self.model.mkdir()
        (self.model / "config.json").write_text('{"vocab_size": 1000}', encoding="utf-8")

    @property
    def flags(self) -> list[str]:
        return [
            *("--run.name", self.name, "--run.dir", str(self.run_dir), "--broker.address", self.broker),
            *("--model.path", str(self.model)),
            *("--learner.listen", self.listen, "--learner.metrics", self.metrics),
            *("--data.train", str(self._train), "--data.heldout", str(self._heldout)),
            *("--train.batch", "2", "--train.max_lag", "1", "--train.steps", "10"),
        ]

    @contextlib.asynccontextmanager
    async def serving(self, *more: str) -> AsyncGenerator[asyncio.subprocess.Process]:
        """An intake that serves; killed at the end if it still runs."""
        process = await self.start(*more)
        try:
            async with grpc.aio.insecure_channel(self.listen) as channel:
                await asyncio.wait_for(channel.channel_ready(), 20)
            yield process
        finally:
            if process.returncode is None:
                process.kill()
            await process.wait()

    @contextlib.asynccontextmanager
    async def with_peers(self, *more: str, leases: tuple[str, ...] = ()) -> AsyncGenerator[IntakeWithPeers]:
        """An intake, a sampler that says it holds ``leases``, and a trainer."""
        async with (
            self.serving(*more) as process,
            SamplerPeer.join(self.listen, leases=leases) as sampler,
            self.trainer() as trainer,
        ):
            yield IntakeWithPeers(process, sampler, trainer)

    async def start(self, *more: str) -> asyncio.subprocess.Process:
        environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
        command = [sys.executable, "-m", "learner.intake", *self.flags, *more]
        return await asyncio.create_subprocess_exec(*command, stderr=asyncio.subprocess.PIPE, env=environment)

    @contextlib.asynccontextmanager
    async def trainer(self) -> AsyncGenerator[IntakeConnection]:
        client = IntakeConnection(socket_path(self.run_dir), deadline=20)
        try:
            yield client
        finally:
            client.close()

    async def samples(self) -> dict[str, float]:
        """The intake's metrics: name and label values, joined by slashes, to value."""
        async with httpx.AsyncClient() as client:
            text = (await client.get(f"http://{self.metrics}/metrics")).text
        families = text_string_to_metric_families(text)
        return {"/".join([s.name, *s.labels.values()]): s.value for family in families for s in family.samples}


@dataclass
class IntakeWithPeers:
    """An intake at work with both its peers."""

    process: asyncio.subprocess.Process
    sampler: SamplerPeer
    trainer: IntakeConnection


class SamplerPeer:
    """The sampler's side of a stream, by hand."""

    def __init__(self, call: Any) -> None:
        self.call = call
        self._heard: list[Any] = []
        self._versions: dict[str, PolicyVersion] = {}
        """By lease: the version that it is worked on with."""
        self._writing = asyncio.Lock()

    @classmethod
    @contextlib.asynccontextmanager
    async def join(
        cls, address: str, *, name: str = "s1", incarnation: int = 1, leases: tuple[str, ...] = ()
    ) -> AsyncGenerator[SamplerPeer]:
        async with grpc.aio.insecure_channel(address) as channel:
            call = rollout_pb2_grpc.RolloutServiceStub(channel).Rollout()
            await call.write(
                pb.RolloutRequest(hello=pb.Hello(sampler=name, incarnation=incarnation, engine="fake", leases=leases))
            )
            yield cls(call)
            call.cancel()

    async def receive(self, kind: str) -> Any:
        """The next message of ``kind``; others wait for their turn."""
        while not any(message.WhichOneof("kind") == kind for message in self._heard):
            message = await asyncio.wait_for(self.call.read(), 10)
            assert message != grpc.aio.EOF, f"the stream ended before {kind}"  # pyright: ignore[reportAttributeAccessIssue]
            self._heard.append(message)
        found = next(message for message in self._heard if message.WhichOneof("kind") == kind)
        self._heard.remove(found)
        if kind == "lease":
            self._versions[found.lease.id] = version_from_pb(found.lease.min_version)
        return getattr(found, kind)

    async def send_request(self, **message: Any) -> None:
        """Send a request. Its stream takes one at a time."""
        async with self._writing:
            await self.call.write(pb.RolloutRequest(**message))

    async def set_demand(self, leases: int) -> None:
        await self.send_request(demand=pb.Demand(leases=leases))

    async def send_chain(self, lease: str, **shape: Any) -> None:
        await self.send_request(subtree=subtree_to_pb(chain(lease, version=self._versions.get(lease, VERSION), **shape)))

    async def fail(self, lease: str, error: str) -> None:
        """End a lease without a leaf."""
        end = LeaseEnd(lease, LeaseEndReason.FAILED, error=error)
        await self.send_request(lease_end=lease_end_to_pb(end))

    async def roll_out(self, lease: str, reward: float = 1.0) -> None:
        """A whole small group: one chain, acked, and the end."""
        await self.send_chain(lease, reward=reward)
        ack = await self.receive("ack")
        assert (ack.lease, ack.tree, ack.index) == (lease, 0, 0)
        await self.send_request(lease_end=lease_end_to_pb(complete(lease)))
