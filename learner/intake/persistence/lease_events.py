"""The events of the lease table as records of the journal, and back.

{"event": "granted", "lease": bytes, "draw": 12, "holder": "s1/00ff…"}
{"event": "accepted", "subtree": bytes}
{"event": "refused", "lease": "train-0000007-…", "tree": 0, "index": 3, "cost": […], "reason": "age", "why": "Group …"}
{"event": "ended", "end": bytes}
{"event": "closed", "draw": 12}                          at the staleness bound, before its lease ended
{"event": "taken", "draws": [9, 12], "stale": []}        given to the trainer at the next positions, in this order
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import astuple, replace

from learner.intake.leases.lease_table import LeaseTable
from learner.intake.monitoring.recorder import RunRecorder
from learner.intake.wal.framing import Record
from treegrpo.core.budget import Cost
from treegrpo.core.lease import Lease, LeaseEnd
from treegrpo.v1 import rollout_pb2, tree_pb2
from treegrpo.wire.codec import lease_end_from_pb, lease_end_to_pb, lease_from_pb, lease_to_pb, subtree_from_pb


def grant_event(lease: Lease, draw: int, holder: str) -> Record:
    """The event of a grant, without the group's accepted subtrees, which are in the journal already."""
    message = lease_to_pb(replace(lease, accepted=()))
    return {"event": "granted", "lease": message.SerializeToString(), "draw": draw, "holder": holder}


def subtree_event(subtree: bytes) -> Record:
    """The event of an accepted subtree; ``subtree``: its message."""
    return {"event": "accepted", "subtree": subtree}


def rejection_event(lease: str, key: tuple[int, int], cost: Cost, reason: str, why: str) -> Record:
    """The event of a rejected subtree of an open lease, whose cost is settled when the lease ends."""
    tree, index = key
    of = {"lease": lease, "tree": tree, "index": index}
    return {"event": "refused", **of, "cost": list(astuple(cost)), "reason": reason, "why": why}


def lease_end_event(end: LeaseEnd, *, excused: bool = False) -> Record:
    """The event of a lease end; ``excused``: it does not count against its question."""
    record: Record = {"event": "ended", "end": lease_end_to_pb(end).SerializeToString()}
    return {**record, "excused": True} if excused else record


def group_close_event(draw: int) -> Record:
    return {"event": "closed", "draw": draw}


def positions_event(draws: Sequence[int], stale: Sequence[int]) -> Record:
    return {"event": "taken", "draws": list(draws), "stale": list(stale)}


def replay_event(table: LeaseTable, recorder: RunRecorder, event: Record) -> None:
    """Apply an event of the journal to the table. Raises ContractError if it contradicts earlier events."""
    match event["event"]:
        case "granted":
            lease = lease_from_pb(rollout_pb2.Lease.FromString(event["lease"]))
            table.grant_lease(lease, event["draw"], event["holder"], now=None)
        case "accepted":
            subtree = subtree_from_pb(tree_pb2.Subtree.FromString(event["subtree"]))
            if (group := table.replay_subtree(subtree, event["subtree"])) is not None:
                recorder.record_subtree(group, subtree)
        case "refused":
            key = (event["tree"], event["index"])
            table.require_open_lease(event["lease"]).reject_subtree(key, Cost(*event["cost"]), event["reason"], event["why"])
        case "closed":
            recorder.record_group_close(table.close_group(event["draw"]), "overdue")
        case "taken":
            for group in table.assign_positions(event["draws"], event["stale"]):
                recorder.record_group_close(group, "stale")
        case _:
            end = lease_end_from_pb(rollout_pb2.LeaseEnd.FromString(event["end"]))
            recorder.record_lease_end(table.end_lease(end, excused=event.get("excused", False)), end)
