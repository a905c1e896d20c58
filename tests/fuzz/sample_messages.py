"""Valid messages of every kind, from which mutations start."""

from __future__ import annotations

import io
from dataclasses import asdict, replace
from typing import Any

from learner.intake.wal.framing import encode_frame, encode_record
from tests.intake.builders import PLAN, VERSION, chain, complete, question, step
from treegrpo.core.budget import Budget, Cost
from treegrpo.core.lease import Lease, LeaseKind
from treegrpo.core.step import Leaf
from treegrpo.v1 import rollout_pb2 as pb
from treegrpo.v1 import weights_pb2
from treegrpo.wire.codec import lease_end_to_pb, lease_to_pb, plan_to_pb, question_to_pb, subtree_to_pb, version_to_pb
from treegrpo.wire.control import Member
from treegrpo.wire.trainer_protocol import Covered, Done, Evaluate, Evaluation, Publish, StepReport, Take, Taken

LEASE = "train-0000000-t"
"""The first that `tests.intake.builders.book` grants."""
HELLO = pb.Hello(sampler="s1", incarnation=1, engine="fake", capacity=4, version=version_to_pb(VERSION), leases=[LEASE])
_TOOL = replace(step(1, 0), tool="search", tool_arguments='{"query": "Kabul"}')
SUBTREES = [
    chain(LEASE),
    chain(LEASE, tree=1, reward=0.0),
    chain(LEASE, index=1, parent=1),
    replace(chain(LEASE), steps=(_TOOL, step(2, 1), step(3, 1)), leaves=(Leaf(2, {"em": 1.0}, {"f": 0.5}), Leaf(3, {"em": 0.0}))),
]
REQUESTS = [
    pb.RolloutRequest(hello=HELLO),
    pb.RolloutRequest(demand=pb.Demand(leases=3)),
    *(pb.RolloutRequest(subtree=subtree_to_pb(subtree)) for subtree in SUBTREES),
    pb.RolloutRequest(lease_end=lease_end_to_pb(replace(complete(LEASE), unaccounted=Cost(1, 2, 3, 4, 0.5), error="why"))),
    pb.RolloutRequest(heartbeat=pb.Heartbeat(version=version_to_pb(VERSION))),
]
_LEASE = Lease(LEASE, LeaseKind.TRAIN, question(0), PLAN, Budget(900, 9), 7, VERSION, (chain(LEASE),))
RESPONSES = [
    pb.RolloutResponse(welcome=pb.Welcome(run="r", version=version_to_pb(VERSION), void_leases=["x"], plan=plan_to_pb(PLAN))),
    pb.RolloutResponse(lease=lease_to_pb(_LEASE)),
    pb.RolloutResponse(ack=pb.Ack(lease=LEASE, tree=1, index=2, refusal="why")),
    pb.RolloutResponse(stop_expanding=pb.StopExpanding(lease=LEASE)),
]
ASKED = [
    weights_pb2.FetchWeightsRequest(version=version_to_pb(VERSION), name="config.json", offset=1),
    weights_pb2.DescribeWeightsRequest(version=version_to_pb(VERSION)),
]
_SAID = [
    *(Take(0, 2), Covered(2), Evaluate("1.0"), Done(), Evaluation(done=True, questions=3, em=0.5), Taken([b"x"], "running")),
    *(Publish("1.0", "weights/1.0", 0), StepReport({"step": 1, "reward_mean": 0.5})),
]
HANDOFF: list[Any] = [{"type": type(message).__name__, **asdict(message)} for message in _SAID]
GROUPS: list[Any] = [
    {
        "id": "0000000",
        "question": question_to_pb(question(0)).SerializeToString(),
        "subtrees": [subtree_to_pb(subtree).SerializeToString() for subtree in (SUBTREES[0], SUBTREES[2])],
    }
]
PRESENCE: list[Any] = [
    asdict(Member("s7", "sampler", 7, "127.0.0.1:1")),
    asdict(replace(Member("s7", "sampler", 7), alive=False)),
]
_RECORDS: list[Any] = [
    {"format": 1, "segment": 1, "after": 0},
    {"event": "accepted", "subtree": subtree_to_pb(chain(LEASE)).SerializeToString()},
    {"event": "closed", "draw": 3},
]
FRAMES = [encode_frame([encode_record(record) for record in _RECORDS[first:]]) for first in range(3)]
SEGMENT = b"".join([encode_frame([encode_record(_RECORDS[0])]), *FRAMES[1:]])
SCRAPES = [b"GET /metrics HTTP/1.1\r\nHost: a\r\nAuthorization: Bearer word\r\nAccept: */*\r\n\r\n"]
SEARCH: list[Any] = [{"queries": ["Kabul", "small town"], "topk": 3, "return_scores": True}]


def stream(data: bytes) -> io.BytesIO:
    return io.BytesIO(data)
