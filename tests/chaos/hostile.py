"""A sampler in wrong hands: it has a valid identity, speaks the contract, and fails, lies and floods in turns.

    python -m tests.chaos.hostile ADDRESS SEED

Its turns follow from the seed, and it rests between messages: it is to harm by what it says, not by the processor that it
takes. It brings no sound subtree: what a sampler invents within the plan cannot be told from what a bad policy samples, and
would be trained.
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
RUDE = "error: the run is over\n\x1b[31mDraining\x1b[0m [bold]$\\frac{1}{0}$"
TURN_SECONDS = 3.0
REST_SECONDS = 0.05
WANTED = 32
FLOOD = 300
CROWD = 8
EOF: Any = cast("Any", grpc.aio).EOF


@dataclass
class Hostile:
    address: str
    chance: random.Random
    foreign: list[str] = field(default_factory=lambda: ["train-0000000-0123456789abcdef"])
    """Leases that it does not hold."""

    @contextlib.asynccontextmanager
    async def stream(self) -> AsyncGenerator[Any]:
        """A stream of another incarnation, which wants more leases than it gets."""
        async with grpc.aio.insecure_channel(self.address) as channel:
            call = cast("Any", rollout_pb2_grpc.RolloutServiceStub(channel)).Rollout()
            hello = pb.Hello(sampler=NAME, incarnation=self.chance.getrandbits(60), engine="fake", leases=self.foreign[-4:])
            await call.write(pb.RolloutRequest(hello=hello))
            await call.write(pb.RolloutRequest(demand=pb.Demand(leases=WANTED)))
            yield call
            call.cancel()

    async def leases(self, answer: Callable[[Any, str], Awaitable[None]]) -> None:
        """``answer`` each lease that comes within a turn."""
        async with self.stream() as call:
            while (message := await call.read()) != EOF:
                if message.WhichOneof("kind") == "lease":
                    await answer(call, message.lease.id)
                    self.foreign.append(message.lease.id)
                    await asyncio.sleep(REST_SECONDS)

    async def end(self, call: Any, lease: str, reason: LeaseEndReason) -> None:
        await call.write(pb.RolloutRequest(lease_end=lease_end_to_pb(LeaseEnd(lease, reason, error=RUDE))))

    # ---- its turns

    async def fail(self) -> None:
        await self.leases(lambda call, lease: self.end(call, lease, LeaseEndReason.FAILED))

    async def give_back(self) -> None:
        await self.leases(lambda call, lease: self.end(call, lease, LeaseEndReason.RETURNED))

    async def claim_to_be_done(self) -> None:
        await self.leases(lambda call, lease: self.end(call, lease, LeaseEndReason.COMPLETE))

    async def lie(self) -> None:
        """Subtrees of trees that are not planned, below nothing, of no policy, of others' leases; each twice."""

        async def answer(call: Any, lease: str) -> None:
            lies = [
                chain(lease, tree=99),
                chain(lease, index=1, parent=77),
                chain(lease),
                chain(self.chance.choice(self.foreign)),
            ]
            sent = [subtree_to_pb(lie) for lie in lies]
            sent[2].steps[0].logprobs = b"\x00\x00\x80\x7f" * (len(sent[2].steps[0].logprobs) // 4)  # infinite
            for subtree in (*sent, *sent):
                await call.write(pb.RolloutRequest(subtree=subtree))
            await self.end(call, self.chance.choice(self.foreign), LeaseEndReason.COMPLETE)
            await self.end(call, lease, LeaseEndReason.COMPLETE)

        await self.leases(answer)

    async def keep(self) -> None:
        """All that it is given, and go without a word."""

        async def answer(call: Any, _lease: str) -> None:
            await call.write(pb.RolloutRequest(heartbeat=pb.Heartbeat(waits_for=RUDE, waited_seconds=1e9)))

        await self.leases(answer)

    async def flood(self) -> None:
        """Heartbeats, demands, then a second Hello, which ends the stream."""
        async with self.stream() as call:
            for number in range(FLOOD):
                await call.write(pb.RolloutRequest(heartbeat=pb.Heartbeat(waits_for=RUDE * 100)))
                await call.write(pb.RolloutRequest(demand=pb.Demand(leases=number)))
            await call.write(pb.RolloutRequest(hello=pb.Hello(sampler=NAME)))
            await call.read()

    async def crowd_in(self) -> None:
        """Many streams of one name, each of another incarnation."""
        async with contextlib.AsyncExitStack() as stack:
            for _ in range(CROWD):
                await stack.enter_async_context(self.stream())
                await asyncio.sleep(REST_SECONDS)

    async def say_half(self) -> None:
        """Messages that never end, on as many streams as there may be, and bytes that are none."""

        def strike() -> None:
            with Connection(self.address) as connection:
                for number in range(CROWD):
                    connection.call(ROLLOUT, grpc_frame(bytes(1 << 16), 1 << 30 if number else None))
                connection.pump(TURN_SECONDS / 2)

        await asyncio.to_thread(strike)

    @property
    def turns(self) -> list[Callable[[], Awaitable[None]]]:
        return [
            *(self.fail, self.give_back, self.claim_to_be_done, self.lie),
            *(self.keep, self.flood, self.crowd_in, self.say_half),
        ]

    async def run_forever(self) -> None:
        """One turn after the other, again and again."""
        order = self.turns
        self.chance.shuffle(order)
        for turn in cycle(order):
            await once(turn)
            await asyncio.sleep(self.chance.uniform(0.2, 1.0))


async def once(turn: Callable[[], Awaitable[None]]) -> None:
    """One turn; the intake may be away, or hang up."""
    with contextlib.suppress(TimeoutError, OSError, grpc.aio.AioRpcError, asyncio.InvalidStateError):
        async with asyncio.timeout(TURN_SECONDS):
            await turn()


if __name__ == "__main__":
    asyncio.run(Hostile(sys.argv[1], random.Random(int(sys.argv[2]))).run_forever())
