"""Codec: converts the classes of `treegrpo.core` to protobuf messages and back.

Decoding checks what a peer could get wrong in the bytes, and raises ContractError; what they mean is checked where they are
assembled (`Tree.append_subtree`). Encoding never fails on the texts of tools and errors: lone surrogates are replaced. The
journal keeps a subtree as the bytes of its message: one schema, with protobuf's rules for change.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np

from treegrpo.core.budget import Budget, Cost
from treegrpo.core.lease import Lease, LeaseEnd, LeaseEndReason, LeaseKind, Plan
from treegrpo.core.question import Message, Question
from treegrpo.core.step import Leaf, Logprobs, PolicyVersion, Step, StepStatus, Subtree, TokenIds, VersionSpan
from treegrpo.core.validation import tree_label
from treegrpo.errors import ContractError, TreeError
from treegrpo.net.limits import SENTENCE_CHARACTERS
from treegrpo.storage.surrogates import replace_surrogates
from treegrpo.v1 import rollout_pb2, tree_pb2

IDS = np.dtype("<u4")
LOGPROBS = np.dtype("<f4")

_STATUS = {
    StepStatus.OK: tree_pb2.STEP_STATUS_OK,
    StepStatus.TRUNCATED: tree_pb2.STEP_STATUS_TRUNCATED,
    StepStatus.ENGINE_ERROR: tree_pb2.STEP_STATUS_ENGINE_ERROR,
    StepStatus.TOOL_ERROR: tree_pb2.STEP_STATUS_TOOL_ERROR,
    StepStatus.ENVIRONMENT_ERROR: tree_pb2.STEP_STATUS_ENVIRONMENT_ERROR,
}
_KIND = {LeaseKind.TRAIN: rollout_pb2.LEASE_KIND_TRAIN, LeaseKind.EVAL: rollout_pb2.LEASE_KIND_EVAL}
_REASON = {
    LeaseEndReason.COMPLETE: rollout_pb2.LEASE_END_REASON_COMPLETE,
    LeaseEndReason.STOPPED: rollout_pb2.LEASE_END_REASON_STOPPED,
    LeaseEndReason.BUDGET: rollout_pb2.LEASE_END_REASON_BUDGET,
    LeaseEndReason.FAILED: rollout_pb2.LEASE_END_REASON_FAILED,
    LeaseEndReason.LOST: rollout_pb2.LEASE_END_REASON_LOST,
    LeaseEndReason.RETURNED: rollout_pb2.LEASE_END_REASON_RETURNED,
    LeaseEndReason.INTERRUPTED: rollout_pb2.LEASE_END_REASON_INTERRUPTED,
}
_STATUS_OF = {v: k for k, v in _STATUS.items()}
_KIND_OF = {v: k for k, v in _KIND.items()}
_REASON_OF = {v: k for k, v in _REASON.items()}


def _ids(data: bytes, field: str, where: str) -> TokenIds:
    if len(data) % IDS.itemsize:
        raise TreeError(f"{where}: {field} is {len(data)} bytes long, not a multiple of uint32 ids.", field)
    return np.frombuffer(data, IDS)


def _logprobs(data: bytes, where: str) -> Logprobs:
    if len(data) % LOGPROBS.itemsize:
        raise TreeError(f"{where}: logprobs is {len(data)} bytes long, not a multiple of float32 values.", "logprobs")
    return np.frombuffer(data, LOGPROBS)


def version_to_pb(version: PolicyVersion) -> tree_pb2.PolicyVersion:
    return tree_pb2.PolicyVersion(lineage=version.lineage, step=version.step)


def version_from_pb(pb: tree_pb2.PolicyVersion) -> PolicyVersion:
    return _version(pb.lineage, pb.step)


_version = lru_cache(maxsize=64)(PolicyVersion)
"""Every step names one, and there are few."""


def cost_to_pb(cost: Cost) -> tree_pb2.Cost:
    return tree_pb2.Cost(
        prefilled=cost.prefilled, cached=cost.cached, decoded=cost.decoded, tool_calls=cost.tool_calls, seconds=cost.seconds
    )


def cost_from_pb(pb: tree_pb2.Cost) -> Cost:
    return Cost(pb.prefilled, pb.cached, pb.decoded, pb.tool_calls, pb.seconds)


def step_to_pb(step: Step) -> tree_pb2.Step:
    return tree_pb2.Step(
        node=step.node,
        parent=step.parent,
        action=step.action.astype(IDS).tobytes(),
        logprobs=step.logprobs.astype(LOGPROBS).tobytes(),
        observation=step.observation.astype(IDS).tobytes(),
        spans=[tree_pb2.VersionSpan(version=version_to_pb(s.version), start=s.start, end=s.end) for s in step.spans],
        status=_STATUS[step.status],
        tool=replace_surrogates(step.tool),
        tool_arguments=replace_surrogates(step.tool_arguments),
        valid=step.valid,
        cost=cost_to_pb(step.cost),
    )


def step_from_pb(pb: tree_pb2.Step, tree: str) -> Step:
    """Decode a step of ``tree``, which an error names. Raises TreeError."""
    where = f"{tree}, node {pb.node}"
    status = _STATUS_OF.get(pb.status)
    if status is None:
        raise TreeError(f"{where}: status is {pb.status}, which this version of the contract does not know.", "status")
    spans = tuple([VersionSpan(version_from_pb(s.version), s.start, s.end) for s in pb.spans])
    action, logprobs = _ids(pb.action, "action", where), _logprobs(pb.logprobs, where)
    observation, cost = _ids(pb.observation, "observation", where), cost_from_pb(pb.cost)
    return Step(
        pb.node, pb.parent, action, logprobs, observation, spans, status, pb.tool, pb.tool_arguments, pb.valid, cost
    )  # fmt: skip


def subtree_to_pb(subtree: Subtree) -> tree_pb2.Subtree:
    return tree_pb2.Subtree(
        lease=subtree.lease,
        tree=subtree.tree,
        index=subtree.index,
        parent=subtree.parent,
        steps=[step_to_pb(step) for step in subtree.steps],
        leaves=[tree_pb2.Leaf(node=leaf.node, rewards=leaf.rewards, metrics=leaf.metrics) for leaf in subtree.leaves],
        prompt=subtree.prompt.astype(IDS).tobytes(),
    )


def subtree_from_pb(pb: tree_pb2.Subtree, group: str = "") -> Subtree:
    """Decode a subtree; `Tree.append_subtree` validates it. Raises TreeError, which names ``group`` if given."""
    where = tree_label(pb.lease, pb.tree, group)
    return Subtree(
        lease=pb.lease,
        tree=pb.tree,
        index=pb.index,
        parent=pb.parent,
        steps=tuple([step_from_pb(step, where) for step in pb.steps]),
        leaves=tuple([Leaf(leaf.node, dict(leaf.rewards), dict(leaf.metrics)) for leaf in pb.leaves]),
        prompt=_ids(pb.prompt, "prompt", where),
    )


def subtree_to_bytes(subtree: Subtree) -> bytes:
    """Encode a subtree as journal, snapshots and trainer get it."""
    return subtree_to_pb(subtree).SerializeToString()


def question_to_pb(question: Question) -> rollout_pb2.Question:
    return rollout_pb2.Question(
        id=question.id,
        source=question.source,
        prompt=[rollout_pb2.Message(role=m.role, content=m.content) for m in question.prompt],
        targets=question.targets,
        family=question.family,
    )


def question_from_pb(pb: rollout_pb2.Question) -> Question:
    prompt = tuple(Message(m.role, m.content) for m in pb.prompt)
    return Question(pb.id, pb.source, prompt, tuple(pb.targets), pb.family)


def plan_to_pb(plan: Plan) -> rollout_pb2.Plan:
    return rollout_pb2.Plan(
        trees=plan.trees,
        rounds=plan.rounds,
        expansions=plan.expansions,
        max_turns=plan.max_turns,
        max_action_tokens=plan.max_action_tokens,
        max_context=plan.max_context,
        temperature=plan.temperature,
    )


def plan_from_pb(pb: rollout_pb2.Plan) -> Plan:
    if not (pb.trees and pb.max_action_tokens and pb.max_context):
        raise ContractError("A plan without trees, action tokens or context asks for nothing.")
    return Plan(pb.trees, pb.rounds, pb.expansions, pb.max_turns, pb.max_action_tokens, pb.max_context, pb.temperature)


def lease_to_pb(lease: Lease) -> rollout_pb2.Lease:
    return rollout_pb2.Lease(
        id=lease.id,
        kind=_KIND[lease.kind],
        question=question_to_pb(lease.question),
        plan=plan_to_pb(lease.plan),
        grant=rollout_pb2.Budget(tokens=lease.grant.tokens, tool_calls=lease.grant.tool_calls),
        seed=lease.seed,
        min_version=version_to_pb(lease.min_version),
        accepted=[subtree_to_pb(subtree) for subtree in lease.accepted],
    )


def lease_from_pb(pb: rollout_pb2.Lease) -> Lease:
    if pb.kind not in _KIND_OF:
        raise ContractError(f"Lease {pb.id} is of kind {pb.kind}, which this version of the contract does not know.")
    return Lease(
        id=pb.id,
        kind=_KIND_OF[pb.kind],
        question=question_from_pb(pb.question),
        plan=plan_from_pb(pb.plan),
        grant=Budget(pb.grant.tokens, pb.grant.tool_calls),
        seed=pb.seed,
        min_version=version_from_pb(pb.min_version),
        accepted=tuple(subtree_from_pb(subtree) for subtree in pb.accepted),
    )


def lease_end_to_pb(end: LeaseEnd) -> rollout_pb2.LeaseEnd:
    error = replace_surrogates(end.error[:SENTENCE_CHARACTERS])
    return rollout_pb2.LeaseEnd(
        lease=end.lease, reason=_REASON[end.reason], forgone=end.forgone, unaccounted=cost_to_pb(end.unaccounted), error=error
    )


def lease_end_from_pb(pb: rollout_pb2.LeaseEnd) -> LeaseEnd:
    if pb.reason not in _REASON_OF:
        raise ContractError(f"Lease {pb.lease} ended for reason {pb.reason}, which this version of the contract does not know.")
    return LeaseEnd(pb.lease, _REASON_OF[pb.reason], pb.forgone, cost_from_pb(pb.unaccounted), pb.error)
