"""Requests of simulated samplers: the messages of one lease are encoded once, and only the id of the lease is replaced."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from treegrpo.core.budget import Cost
from treegrpo.core.lease import LeaseEnd, LeaseEndReason, Plan
from treegrpo.core.step import ROOT, Leaf, PolicyVersion, Step, Subtree, VersionSpan
from treegrpo.v1 import rollout_pb2 as pb
from treegrpo.wire.codec import lease_end_to_pb, subtree_to_pb

VOCABULARY = 32000
STEPS = 3
PLAN = Plan(trees=2, rounds=1, expansions=2, max_turns=4, max_action_tokens=256, max_context=4096, temperature=1.0)
"""Six subtrees a lease, the paper's."""
VERSION = PolicyVersion(1, 1 << 20)
"""Later than the version of any lease of the run."""
_BYTES = 2
"""Protobuf's wire type of what has a length."""


@dataclass(frozen=True, slots=True)
class SubtreeSize:
    """Tokens of a step, and of the prompt, which goes with the first chain of each tree."""

    action: int
    observation: int
    prompt: int


SIZES = {
    "1500 tokens": SubtreeSize(action=150, observation=350, prompt=200),
    "geohop": SubtreeSize(action=14, observation=30, prompt=60),
}


def subtree(size: SubtreeSize, tree: int, index: int, rng: np.random.Generator) -> Subtree:
    """`STEPS` steps to a leaf; an expansion hangs below the first step of its tree."""

    def ids(count: int) -> np.ndarray[tuple[int], np.dtype[np.uint32]]:
        return rng.integers(0, VOCABULARY, count).astype(np.uint32)

    parent, first = (1, 1 + index * STEPS) if index else (ROOT, 1)
    steps: list[Step] = []
    for node in range(first, first + STEPS):
        last = node == first + STEPS - 1
        steps.append(
            Step(
                node=node,
                parent=parent if node == first else node - 1,
                action=ids(size.action),
                logprobs=-rng.random(size.action).astype(np.float32),
                observation=ids(0 if last else size.observation),
                spans=(VersionSpan(VERSION, 0, size.action),),
                tool="" if last else "search",
                tool_arguments="" if last else "the capital of the country where the river ends",
                cost=Cost(size.observation, 4 * size.observation, size.action, int(not last), 1.5),
            )
        )
    leaf = Leaf(steps[-1].node, {"em": float(rng.integers(0, 2))}, {"em": 1.0, "turns": float(STEPS), "searches": 2.0})
    return Subtree("", tree, index, parent, tuple(steps), (leaf,), ids(0 if index else size.prompt))


class Script:
    """All requests of one lease."""

    def __init__(self, size: SubtreeSize, seed: int) -> None:
        rng = np.random.default_rng(seed)
        keys = [(tree, index) for index in range(PLAN.branches) for tree in range(PLAN.trees)]
        self.keys = keys
        """(tree, index) of its subtrees, in the order they are sent."""
        self._subtrees = [subtree_to_pb(subtree(size, *key, rng)).SerializeToString() for key in keys]
        self._end = lease_end_to_pb(LeaseEnd("", LeaseEndReason.COMPLETE)).SerializeToString()

    def requests(self, lease: str) -> list[bytes]:
        """Encoded RolloutRequests: each subtree, then the end. In both messages the lease is field 1."""
        name = delimited(1, lease.encode())
        return [*(delimited(3, name + subtree) for subtree in self._subtrees), delimited(4, name + self._end)]

    @property
    def bytes(self) -> int:
        """Of the requests of one lease."""
        return sum(map(len, self.requests("train-0000000-abcd")))


def delimited(field: int, data: bytes) -> bytes:
    """A protobuf field that has a length."""
    return varint(field << 3 | _BYTES) + varint(len(data)) + data


def varint(number: int) -> bytes:
    r"""A number as protobuf writes it.

    Example:
        >>> varint(300)
        b'\xac\x02'
    """
    out = bytearray()
    while number > 0x7F:
        out.append(number & 0x7F | 0x80)
        number >>= 7
    return bytes([*out, number])


def encoded(**message: object) -> bytes:
    """A RolloutRequest."""
    return pb.RolloutRequest(**message).SerializeToString()  # pyright: ignore[reportArgumentType] - one of its kinds


@dataclass(frozen=True, slots=True)
class Slice:
    """What one server did in one measured time."""

    subtrees: int
    seconds: float
    cpu: float
    """Seconds of the server, all its threads."""
    p99: float
    """Seconds from writing a subtree to reading its ack, of 99 in 100."""
    rss: int
    """Bytes resident at the end."""

    @property
    def rate(self) -> float:
        """Subtrees a second."""
        return self.subtrees / self.seconds


def over(ours: Sequence[Slice], theirs: Sequence[Slice]) -> tuple[float, float]:
    """Medians over neighbouring slices: our rate over theirs, and their CPU seconds of one subtree over ours."""
    pairs = list(zip(ours, theirs, strict=True))
    rate = statistics.median(a.rate / b.rate for a, b in pairs)
    return rate, statistics.median((b.cpu / b.subtrees) / (a.cpu / a.subtrees) for a, b in pairs)


def percentile(values: Sequence[float], share: float) -> float:
    """The value that ``share`` of them do not exceed."""
    return sorted(values)[max(0, round(share * len(values)) - 1)]
