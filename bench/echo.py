"""An echo server of the rollout contract: sends leases and acks of the same size as the intake's, validates and stores nothing.

`python -m bench.echo ADDRESS` serves until it is stopped.
"""

from __future__ import annotations

import asyncio
import sys
from itertools import count
from typing import Any, cast

import grpc

from bench.traffic import PLAN, VERSION
from learner.intake.rpc.server import OPTIONS
from treegrpo.core.lease import Lease, LeaseKind
from treegrpo.core.question import Message, Question
from treegrpo.v1 import rollout_pb2 as pb
from treegrpo.v1 import rollout_pb2_grpc
from treegrpo.wire.codec import lease_to_pb
from treegrpo.wire.size_limits import message_bytes

QUESTION = Question("bench/train/0", "bench", (Message("user", "Which river ends in the capital of the country?"),), ("none",))
EOF: Any = cast("Any", grpc.aio).EOF


class Echo(rollout_pb2_grpc.RolloutServiceServicer):
    """Answers each subtree with its ack, each end with another lease."""

    def __init__(self) -> None:
        self._serial = count()

    def _lease(self) -> pb.RolloutResponse:
        name = f"train-{next(self._serial):07d}-abcd"
        return pb.RolloutResponse(lease=lease_to_pb(Lease(name, LeaseKind.TRAIN, QUESTION, PLAN, PLAN.grant, 1, VERSION)))

    async def Rollout(self, request_iterator: object, context: Any) -> None:  # noqa: ARG002 - named by the contract
        demand = held = 0
        while (request := await context.read()) != EOF:
            match request.WhichOneof("kind"):
                case "hello":
                    await context.write(pb.RolloutResponse(welcome=pb.Welcome(run="bench")))
                case "demand":
                    demand = request.demand.leases
                case "subtree":
                    sent = request.subtree
                    await context.write(pb.RolloutResponse(ack=pb.Ack(lease=sent.lease, tree=sent.tree, index=sent.index)))
                case _:
                    held -= request.WhichOneof("kind") == "lease_end"
            while held < demand:
                held += 1
                await context.write(self._lease())


async def serve(address: str) -> None:
    server = grpc.aio.server(options=[*OPTIONS, ("grpc.max_receive_message_length", message_bytes(PLAN))])
    rollout_pb2_grpc.add_RolloutServiceServicer_to_server(Echo(), server)
    server.add_insecure_port(address)
    await server.start()
    await server.wait_for_termination()


if __name__ == "__main__":
    asyncio.run(serve(sys.argv[1]))
