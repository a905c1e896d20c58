"""Validation of steps and leaves: lengths, version spans, log-probabilities, token ids and rewards.

Each check raises TreeError with one sentence: where (group or lease, tree, node), the field, the place in it, the value
and what is right. The arrays of all steps are looked at together; only a refusal looks for the place. How nodes hang
together is checked where they are put together: `treegrpo.core.tree.Tree`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np

from treegrpo.core.step import Leaf, Step, TokenIds
from treegrpo.errors import TreeError

LOGPROB_SLACK = 1e-4
"""How far above 0 a log-probability may be: engines round log-softmax of a near-certain token to there. It is kept as it
came (token-in, token-out); the ratio it makes is off by as little."""


def tree_label(lease: str, tree: int, group: str = "") -> str:
    """The beginning of an error message about a tree: its group if known, else its lease."""
    return f"{f'Group {group}' if group else f'Lease {lease}'}, tree {tree}"


def check_steps(steps: Sequence[Step], where: str) -> None:
    """Check that each action token has a valid log-probability and a version. Raises TreeError."""
    for step in steps:
        tokens = len(step.action)
        if len(step.logprobs) != tokens:
            raise TreeError(
                f"{where}, node {step.node}: logprobs has {len(step.logprobs)} values and action {tokens} tokens; "
                "each action token needs its log-probability.",
                "logprobs",
            )
        _check_spans(step, where)
    every = np.concatenate([step.logprobs for step in steps])
    if every.size and not (every.max() <= LOGPROB_SLACK and every.min() > -math.inf):  # NaN is no maximum
        _refuse_logprob(steps, where)


def _check_spans(step: Step, where: str) -> None:
    end = 0
    for number, span in enumerate(step.spans):
        if span.start != end or span.end <= span.start:
            raise TreeError(
                f"{where}, node {step.node}: spans[{number}] covers tokens {span.start} to {span.end}, but token {end} comes "
                "next; version spans cover the action in order.",
                "spans",
            )
        end = span.end
    if end != len(step.action):
        raise TreeError(
            f"{where}, node {step.node}: spans cover {end} tokens and action has {len(step.action)}; "
            "each action token needs its policy version.",
            "spans",
        )


def _refuse_logprob(steps: Sequence[Step], where: str) -> None:
    for step in steps:
        wrong = np.flatnonzero(~(np.isfinite(step.logprobs) & (step.logprobs <= LOGPROB_SLACK)))
        if wrong.size:
            raise TreeError(
                f"{where}, node {step.node}: logprobs[{wrong[0]}] is {float(step.logprobs[wrong[0]]):.6g}; "
                "a log-probability is finite and at most 0.",
                "logprobs",
            )


def check_leaves(leaves: Sequence[Leaf], steps: Mapping[int, Step], where: str) -> None:
    """Check that each leaf has a step of its own that acted and did not fail, and finite numbers. Raises TreeError."""
    seen: set[int] = set()
    for leaf in leaves:
        here = f"{where}, node {leaf.node}"
        if leaf.node not in steps:
            raise TreeError(f"{here}: the leaf is not one of its steps.", "leaf")
        if leaf.node in seen:
            raise TreeError(f"{here} has two leaves; an episode ends once.", "leaf")
        if (status := steps[leaf.node].status).failed:
            raise TreeError(f"{here}: the leaf has status {status.value}; a failed step has no reward.", "status")
        if not len(steps[leaf.node].action):
            raise TreeError(f"{here}: the leaf has an empty action; an episode ends with what the policy did.", "action")
        seen.add(leaf.node)
        for field, numbers in (("rewards", leaf.rewards), ("metrics", leaf.metrics)):
            for key, value in numbers.items():
                if not math.isfinite(value):
                    raise TreeError(f"{here}: {field}[{key!r}] is {value}; it must be finite.", field)
        if not math.isfinite(leaf.reward):
            raise TreeError(f"{here}: rewards add up to {leaf.reward}; their sum must be finite.", "rewards")


def check_vocabulary(prompt: TokenIds, steps: Sequence[Step], vocabulary: int, where: str) -> None:
    """Check that every id is between 0 and ``vocabulary`` − 1. Raises TreeError."""
    every = np.concatenate([prompt, *(part for step in steps for part in (step.action, step.observation))])
    if not every.size or every.max() < vocabulary:
        return
    _refuse_id(prompt, "prompt", vocabulary, where)
    for step in steps:
        _refuse_id(step.action, "action", vocabulary, f"{where}, node {step.node}")
        _refuse_id(step.observation, "observation", vocabulary, f"{where}, node {step.node}")


def _refuse_id(ids: TokenIds, field: str, vocabulary: int, where: str) -> None:
    wrong = np.flatnonzero(ids >= vocabulary)
    if wrong.size:
        raise TreeError(
            f"{where}: {field}[{wrong[0]}] is {ids[wrong[0]]}; the model's vocabulary has {vocabulary} ids, from 0 on. "
            "Samplers and learner need the same model.",
            field,
        )
