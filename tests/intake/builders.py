"""Small makers of questions, leases and subtrees."""

from __future__ import annotations

import asyncio

import msgpack
import numpy as np

from learner.intake.coordinator.journaled_leases import JournaledLeases
from learner.intake.leases.lease_table import LeaseTable
from learner.intake.leases.question_queue import QuestionQueue
from learner.intake.leases.rollout_group import RolloutGroup
from learner.intake.leases.staleness import FINISHING_SECONDS, StalenessBound
from learner.intake.leases.subtree_validation import lease_not_open
from learner.intake.wal.framing import Record
from treegrpo.core.budget import Cost
from treegrpo.core.lease import LeaseEnd, LeaseEndReason, Plan
from treegrpo.core.question import Message, Question
from treegrpo.core.step import Leaf, PolicyVersion, Step, StepStatus, Subtree, VersionSpan
from treegrpo.v1 import tree_pb2
from treegrpo.wire.codec import subtree_from_pb

PLAN = Plan(trees=2, rounds=1, expansions=2, max_turns=3, max_action_tokens=16, max_context=128, temperature=1.0)
VERSION = PolicyVersion(1, 0)
VOCABULARY = 50


def question(index: int) -> Question:
    return Question(f"made/train/{index}", "made", (Message("user", f"Question {index}?"),), (f"answer {index}",))


def step(
    node: int,
    parent: int,
    *,
    actions: int = 4,
    observations: int = 3,
    status: StepStatus = StepStatus.OK,
    version: PolicyVersion = VERSION,
) -> Step:
    return Step(
        node=node,
        parent=parent,
        action=np.arange(actions, dtype=np.uint32),
        logprobs=np.full(actions, -0.5, np.float32),
        observation=np.arange(observations, dtype=np.uint32),
        spans=(VersionSpan(version, 0, actions),) if actions else (),
        status=status,
        cost=Cost(prefilled=10, cached=2, decoded=actions, tool_calls=1, seconds=0.1),
    )


def chain(
    lease: str,
    tree: int = 0,
    index: int = 0,
    parent: int = 0,
    reward: float = 1.0,
    *,
    fails: bool = False,
    version: PolicyVersion = VERSION,
) -> Subtree:
    """Two steps below ``parent``, the second a leaf unless the expansion ``fails``."""
    first, second = 1 + 10 * index, 2 + 10 * index
    last = step(second, first, observations=0, status=StepStatus.TOOL_ERROR if fails else StepStatus.OK, version=version)
    leaves = () if fails else (Leaf(second, {"em": reward}, {"em": reward}),)
    prompt = np.arange(7, dtype=np.uint32) if index == 0 else np.zeros(0, np.uint32)
    return Subtree(lease, tree, index, parent, (step(first, parent, version=version), last), leaves, prompt)


class MemoryEventLog:
    """A journal that is a list; nothing in it ever becomes durable."""

    def __init__(self) -> None:
        self.records: list[Record] = []

    def append_record(self, record: bytes) -> asyncio.Future[int]:
        self.records.append(msgpack.unpackb(record))
        return self.durable_so_far()

    def durable_so_far(self) -> asyncio.Future[int]:
        return asyncio.Future(loop=_LOOP)


_LOOP = asyncio.new_event_loop()


def kept(group: RolloutGroup) -> list[Subtree]:
    """The subtrees of a group, also of one that has a position."""
    return [subtree_from_pb(tree_pb2.Subtree.FromString(encoded)) for encoded in group.encoded]


def complete(lease: str) -> LeaseEnd:
    return LeaseEnd(lease, LeaseEndReason.COMPLETE)


def make_table(*, questions: int = 10, batch: int = 2, max_lag: int = 1, total: int = 100, **more: int) -> LeaseTable:
    table = LeaseTable(
        QuestionQueue([question(i) for i in range(questions)], seed=0),
        PLAN,
        seed=0,
        batch=batch,
        max_lag=max_lag,
        total=total,
        vocabulary=VOCABULARY,
        mark="t",
        **more,
    )
    table.version = VERSION
    return table


def accept(table: LeaseTable, subtree: Subtree) -> bool:
    """Look the group of a subtree up, and add it, as the coordinator does."""
    group = table.find_group(subtree.lease)
    if group is None:
        raise lease_not_open(subtree.lease)
    return table.accept_subtree(group, subtree)


def bound(
    table: LeaseTable, leases: JournaledLeases | None = None, finishing_seconds: float = FINISHING_SECONDS
) -> StalenessBound:
    """The staleness bound of a table, whose samplers do not hear of it."""
    close_group = leases.close_group if leases else table.close_group
    return StalenessBound(table, close_group, lambda _: None, finishing_seconds=finishing_seconds)


def grant(table: LeaseTable, holder: str = "s1/1") -> str:
    """Grant the next lease and return its id."""
    work = table.next_lease()
    assert work is not None
    table.grant_lease(*work, holder, now=0.0)
    return work[0].id
