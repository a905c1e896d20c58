"""Fuzz targets that parse foreign bytes, without a network. Each may raise its documented errors, and nothing else."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import msgpack
from google.protobuf.message import DecodeError
from hypothesis import strategies as st
from pydantic import SecretStr

from learner.intake.coordinator.sampler_sessions import SamplerSessions
from learner.intake.rpc.request_limits import read_request
from learner.intake.wal.framing import BrokenFrameError, has_later_commit, read_frame
from tests.fuzz import retriever_answers, sample_messages, text_targets
from tests.fuzz.mutations import packed, protobufs, raw
from tests.intake.builders import PLAN, accept, grant, make_table
from treegrpo.core.budget import Budget
from treegrpo.core.lease import LeaseKind
from treegrpo.errors import ContractError
from treegrpo.observability import metrics_server
from treegrpo.v1 import rollout_pb2 as pb
from treegrpo.wire.codec import lease_end_from_pb, lease_from_pb, plan_from_pb, subtree_from_pb, version_from_pb
from treegrpo.wire.control import ControlPlane, Member
from treegrpo.wire.size_limits import check_end
from treegrpo.wire.trainer_protocol import decode_message, encode_message, pack_group, unpack_group


@dataclass(frozen=True)
class PureTarget:
    """A function under test."""

    name: str
    cases: int
    """Of the 100,000 of all."""
    made: st.SearchStrategy[Any]
    feed: Callable[[Any], None]
    watch: bool = True
    """Whether all of it is work on an event loop; one that prepares something first measures its stalls itself."""


def request(data: bytes) -> None:
    """A sampler's message, into a book as far as it gets: what is accepted can be written down and read again."""
    table = make_table()
    group = table.open_leases[grant(table)]
    with suppress(ContractError):
        read = read_request(data)
        if read.HasField("subtree") and accept(table, subtree_from_pb(read.subtree, "g")):
            assert unpack_group(pack_group(group.group, group.subtrees)).cost == group.group.cost
        if read.HasField("lease_end"):
            end = lease_end_from_pb(read.lease_end)
            check_end(end, PLAN)
            if end.lease in table.open_leases and end.reason.from_sampler:
                table.end_lease(group.with_rejected_cost(end))
    assert table.ledger.imbalance(LeaseKind.TRAIN) == Budget()
    msgpack.packb(table.snapshot_table())


def response(data: bytes) -> None:
    """The learner's message, at a sampler."""
    with suppress(ContractError, DecodeError):
        read = pb.RolloutResponse.FromString(data)
        if read.HasField("lease"):
            lease_from_pb(read.lease)
        if read.HasField("welcome"):
            plan_from_pb(read.welcome.plan)
            str(version_from_pb(read.welcome.version))


def handoff(data: bytes) -> None:
    with suppress(ContractError):
        encode_message(decode_message(data))


def group(data: bytes) -> None:
    with suppress(ContractError):
        unpack_group(data)


def journal(data: bytes) -> None:
    file = sample_messages.stream(data)
    try:
        while read_frame(file) is not None:
            pass
    except BrokenFrameError as broken:
        has_later_commit(file, 0, broken.end)


def presence() -> Callable[[tuple[int, bytes]], None]:
    """One listener for all cases: what it holds has to stay small."""
    plane = ControlPlane("127.0.0.1:1", "r", Member("learner", "learner", 1, run="r"))
    here = SamplerSessions({"s7/0000000000000007"}, lambda _: None)
    topics = (
        "members/sampler/s7@0000000000000007",
        "state",
        "weights",
        "owner",
        "members/learner/learner@0000000000000001",
        "members",
        "",
    )

    def hear(case: tuple[int, bytes]) -> None:
        which, payload = case
        plane._handle_message(topics[which % len(topics)], payload)  # pyright: ignore[reportPrivateUsage]
        here.apply_last_wills(plane.members.values())
        assert len(plane.members) < 9

    return hear


def page() -> Callable[[bytes], None]:
    server = metrics_server._MetricsServer(  # pyright: ignore[reportPrivateUsage]
        lambda: b"page", lambda: True, SecretStr("word"), lambda _: None, metrics_server.LIMITS
    )

    def ask(data: bytes) -> None:
        assert server._answer(data).startswith(b"HTTP/1.1 ")  # pyright: ignore[reportPrivateUsage]

    return ask


STATE_WORDS: list[Any] = ["running", "paused", "1.42"]
CONTROL_MESSAGES = st.one_of(
    packed(sample_messages.PRESENCE), packed(STATE_WORDS, lambda word: word.encode() if isinstance(word, str) else b"\xff")
)
PURE_TARGETS = [
    PureTarget("prompt", 5_000, text_targets.TEXTS, text_targets.prompt),
    PureTarget("observe", 5_000, text_targets.TEXTS, text_targets.observation),
    PureTarget("rows", 5_000, text_targets.ROWS, text_targets.rows(text_targets.questions, text_targets.ROW)),
    PureTarget("corpus", 2_000, text_targets.ROWS, text_targets.rows(text_targets.documents, text_targets.DOCUMENT)),
    PureTarget("lines", 3_000, text_targets.TEXTS, text_targets.lines),
    PureTarget("request", 12_000, protobufs(sample_messages.REQUESTS), request),
    PureTarget("response", 10_000, protobufs(sample_messages.RESPONSES), response),
    PureTarget("handoff", 10_000, packed(sample_messages.HANDOFF), handoff),
    PureTarget("group", 8_000, packed(sample_messages.GROUPS), group),
    PureTarget("journal", 10_000, raw([*sample_messages.FRAMES, sample_messages.SEGMENT]), journal),
    PureTarget("presence", 10_000, st.tuples(st.integers(0, 9), CONTROL_MESSAGES), presence()),
    PureTarget("search-qa", 2_000, retriever_answers.REPLIES, retriever_answers.search(), watch=False),
    PureTarget("scrape", 2_000, raw(sample_messages.SCRAPES), page()),
]
