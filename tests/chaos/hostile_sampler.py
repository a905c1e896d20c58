"""A hostile sampler: it has a valid identity, speaks the protocol, and fails, sends invalid subtrees and floods in turns.

    python -m tests.chaos.hostile_sampler ADDRESS SEED

Its attacks follow from the seed, and it pauses between messages: it is to harm by what it sends, not by the CPU that it uses.
It sends no valid subtree: what a sampler invents within the plan cannot be told from what a bad policy samples, and would be
trained.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import sys
from collections.abc import AsyncGenerator, Awaitable, Callable
from dataclasses import dataclass, field
from itertools import cycle
from typing import Any, cast

import grpc

from bench.http2 import Connection, grpc_frame
from tests.intake.builders import chain
from treegrpo.core.lease import LeaseEnd, LeaseEndReason
from treegrpo.v1 import rollout_pb2 as pb
from treegrpo.v1 import rollout_pb2_grpc
from treegrpo.wire.codec import lease_end_to_pb, subtree_to_pb

NAME = "hostile"
ROLLOUT = "/treegrpo.v1.RolloutService/Rollout"
HOSTILE_TEXT = "error: the run is over\n\x1b[31mDraining\x1b[0m [bold]$\\frac{1}{0}$"
ATTACK_SECONDS = 3.0
PAUSE_SECONDS = 0.05
DEMAND = 32
MESSAGES = 300
STREAMS = 8
EOF: Any = cast("Any", grpc.aio).EOF


@dataclass
class HostileSampler:
    address: str
    chance: random.Random
    foreign_leases: list[str] = field(default_factory=lambda: ["train-0000000-0123456789abcdef"])
    """Leases that it does not hold."""
    attack_seconds: float = ATTACK_SECONDS
    """For one attack."""
    pause_seconds: float = PAUSE_SECONDS
    """Between messages."""

    @contextlib.asynccontextmanager
    async def stream(self) -> AsyncGenerator[Any]:
        """A stream of another incarnation, which asks for more leases than it gets."""
        async with grpc.aio.insecure_channel(self.address) as channel:
            call = cast("Any", rollout_pb2_grpc.RolloutServiceStub(channel)).Rollout()
            hello = pb.Hello(
                sampler=NAME, incarnation=self.chance.getrandbits(60), engine="fake", leases=self.foreign_leases[-4:]
            )
            await call.write(pb.RolloutRequest(hello=hello))
            await call.write(pb.RolloutRequest(demand=pb.Demand(leases=DEMAND)))
            yield call
            call.cancel()

    async def answer_leases(self, answer: Callable[[Any, str], Awaitable[None]]) -> None:
        """Call ``answer`` for each lease that comes within an attack."""
        async with self.stream() as call:
            while (message := await call.read()) != EOF:
                if message.WhichOneof("kind") == "lease":
                    await answer(call, message.lease.id)
                    self.foreign_leases.append(message.lease.id)
                    await asyncio.sleep(self.pause_seconds)

    async def end_lease(self, call: Any, lease: str, reason: LeaseEndReason) -> None:
        await call.write(pb.RolloutRequest(lease_end=lease_end_to_pb(LeaseEnd(lease, reason, error=HOSTILE_TEXT))))

    # ---- its attacks

    async def fail_leases(self) -> None:
        await self.answer_leases(lambda call, lease: self.end_lease(call, lease, LeaseEndReason.FAILED))

    async def return_leases(self) -> None:
        await self.answer_leases(lambda call, lease: self.end_lease(call, lease, LeaseEndReason.RETURNED))

    async def complete_without_work(self) -> None:
        await self.answer_leases(lambda call, lease: self.end_lease(call, lease, LeaseEndReason.COMPLETE))

    async def send_invalid_subtrees(self) -> None:
        """Subtrees of unplanned trees, without a parent, with infinite logprobs, of others' leases; each twice."""

        async def answer(call: Any, lease: str) -> None:
            invalid = [
                chain(lease, tree=99),
                chain(lease, index=1, parent=77),
                chain(lease),
                chain(self.chance.choice(self.foreign_leases)),
            ]
            sent = [subtree_to_pb(subtree) for subtree in invalid]
            sent[2].steps[0].logprobs = b"\x00\x00\x80\x7f" * (len(sent[2].steps[0].logprobs) // 4)  # infinite
            for subtree in (*sent, *sent):
                await call.write(pb.RolloutRequest(subtree=subtree))
            await self.end_lease(call, self.chance.choice(self.foreign_leases), LeaseEndReason.COMPLETE)
            await self.end_lease(call, lease, LeaseEndReason.COMPLETE)

        await self.answer_leases(answer)

    async def keep_leases(self) -> None:
        """Keep all leases, and disconnect."""

        async def answer(call: Any, _lease: str) -> None:
            await call.write(pb.RolloutRequest(heartbeat=pb.Heartbeat(waits_for=HOSTILE_TEXT, waited_seconds=1e9)))

        await self.answer_leases(answer)

    async def flood_stream(self) -> None:
        """Heartbeats, demands, then a second Hello, which ends the stream."""
        async with self.stream() as call:
            for number in range(MESSAGES):
                await call.write(pb.RolloutRequest(heartbeat=pb.Heartbeat(waits_for=HOSTILE_TEXT * 100)))
                await call.write(pb.RolloutRequest(demand=pb.Demand(leases=number)))
            await call.write(pb.RolloutRequest(hello=pb.Hello(sampler=NAME)))
            await call.read()

    async def open_many_streams(self) -> None:
        """Many streams of one name, each of another incarnation."""
        async with contextlib.AsyncExitStack() as stack:
            for _ in range(STREAMS):
                await stack.enter_async_context(self.stream())
                await asyncio.sleep(self.pause_seconds)

    async def send_partial_messages(self) -> None:
        """Messages that never end, on as many streams as there may be, and bytes that are no message."""

        def attack() -> None:
            with Connection(self.address) as connection:
                for number in range(STREAMS):
                    connection.call(ROLLOUT, grpc_frame(bytes(1 << 16), 1 << 30 if number else None))
                connection.pump(self.attack_seconds / 2)

        await asyncio.to_thread(attack)

    @property
    def attacks(self) -> list[Callable[[], Awaitable[None]]]:
        return [
            *(self.fail_leases, self.return_leases, self.complete_without_work, self.send_invalid_subtrees),
            *(self.keep_leases, self.flood_stream, self.open_many_streams, self.send_partial_messages),
        ]

    async def run_forever(self) -> None:
        """One attack after the other, again and again."""
        order = self.attacks
        self.chance.shuffle(order)
        for attack in cycle(order):
            await self.run_attack(attack)
            await asyncio.sleep(self.chance.uniform(0.2, 1.0))

    async def run_attack(self, attack: Callable[[], Awaitable[None]]) -> None:
        """One attack; the intake may be away, or disconnect."""
        with contextlib.suppress(TimeoutError, OSError, grpc.aio.AioRpcError, asyncio.InvalidStateError):
            async with asyncio.timeout(self.attack_seconds):
                await attack()


if __name__ == "__main__":
    asyncio.run(HostileSampler(sys.argv[1], random.Random(int(sys.argv[2]))).run_forever())
