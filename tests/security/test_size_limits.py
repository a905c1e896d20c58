"""Trees, leaves and questions that are larger than the run's plan."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from learner.intake.leases.question_file import load_questions
from learner.intake.rpc.request_limits import MAX_FIELDS
from tests.intake.builders import PLAN, accept, chain, grant, make_table, step
from tests.intake.process_harness import SamplerPeer
from tests.intake.server_harness import serve_intake
from treegrpo.core.budget import Cost
from treegrpo.core.step import Leaf, Subtree
from treegrpo.errors import DataError, TreeError
from treegrpo.net.limits import QUESTION_BYTES
from treegrpo.v1 import tree_pb2
from treegrpo.wire.codec import subtree_to_pb
from treegrpo.wire.size_limits import NUMBERS, TEXT_LENGTH


def long(lease: str) -> Subtree:
    steps = tuple(step(node, node - 1) for node in range(1, PLAN.max_turns + 3))
    return replace(chain(lease), steps=steps, leaves=())


def with_step(lease: str, **changes: object) -> Subtree:
    whole = chain(lease)
    return replace(whole, steps=(replace(whole.steps[0], **changes), *whole.steps[1:]))  # type: ignore[arg-type]


def with_leaf(lease: str, **changes: object) -> Subtree:
    whole = chain(lease)
    return replace(whole, leaves=(replace(whole.leaves[0], **changes),))  # type: ignore[arg-type]


LARGE: dict[str, tuple[Callable[[str], Subtree], str, str]] = {
    "depth": (long, "steps", f"ends 5 steps below the root, and its plan's episodes have {PLAN.max_turns + 1} at most"),
    "prompt": (
        lambda lease: replace(chain(lease), prompt=np.zeros(PLAN.max_context, np.uint32)),
        "tokens",
        f"and its plan's episodes have {PLAN.max_context} at most",
    ),
    "observation": (lambda lease: with_step(lease, observation=np.zeros(PLAN.max_context, np.uint32)), "tokens", "143 tokens"),
    "action": (lambda lease: replace(chain(lease), steps=(step(1, 0, actions=17),), leaves=()), "action", "action has 17 tokens"),
    "tool": (lambda lease: with_step(lease, tool_arguments="x" * (TEXT_LENGTH + 1)), "tool", "longer than 65536 letters"),
    "rewards": (
        lambda lease: with_leaf(lease, rewards={str(number): 0.0 for number in range(NUMBERS + 1)}),
        "rewards",
        "rewards has more than 64 numbers",
    ),
    "a large reward": (lambda lease: with_leaf(lease, rewards={"em": 1e10}), "rewards", "rewards has a number beyond 1e+09"),
    "a cost": (lambda lease: with_step(lease, cost=Cost(decoded=1 << 40)), "cost", "which no step of its plan can cost"),
    "a metric's name": (lambda lease: with_leaf(lease, metrics={"x" * 65: 0.0}), "metrics", "a name of more than 64 letters"),
}


@pytest.mark.parametrize("name", LARGE)
def test_what_is_larger_than_its_plan_is_refused_and_changes_nothing(name: str) -> None:
    make, field, says = LARGE[name]
    table = make_table()
    lease = grant(table)
    with pytest.raises(TreeError) as refusal:
        accept(table, make(lease))
    assert (refusal.value.field, says in str(refusal.value)) == (field, True), str(refusal.value)
    assert accept(table, chain(lease))


def test_depth_is_counted_from_the_root() -> None:
    table = make_table()
    lease = grant(table)
    assert accept(table, chain(lease))
    three = (step(11, 1), step(12, 11), step(13, 12))
    assert accept(table, Subtree(lease, 0, 1, 1, three, (Leaf(13, {"em": 1.0}),)))
    with pytest.raises(TreeError, match="subtree 2 ends 5 steps below the root"):
        accept(table, Subtree(lease, 0, 2, 12, (step(21, 12), step(22, 21)), (Leaf(22, {"em": 1.0}),)))


def fork(lease: str, leaves: int, deep: int = 1, parent: int = 0) -> Subtree:
    """A step, and below it so many branches of ``deep`` steps, each with a leaf."""
    steps, ends = [step(1, parent)], list[int]()
    for branch in range(leaves):
        for level in range(deep):
            node = 100 + 10 * branch + level
            steps.append(step(node, node - 1 if level else 1))
        ends.append(steps[-1].node)
    return replace(chain(lease), steps=tuple(steps), leaves=tuple(Leaf(node, {"em": 1.0}) for node in ends))


def test_a_subtree_may_have_several_leaves_and_more_steps_than_an_episode() -> None:
    """The contract says so; what bounds it is each of its paths."""
    table = make_table()
    accept(table, fork(grant(table), leaves=4, deep=PLAN.max_turns))
    with pytest.raises(TreeError, match=f"ends {PLAN.max_turns + 2} steps below the root"):
        accept(table, fork(grant(table), leaves=2, deep=PLAN.max_turns + 1))


def test_a_subtree_has_no_more_leaves_than_a_group_of_its_plan() -> None:
    table = make_table()
    lease = grant(table)
    with pytest.raises(TreeError, match=f"more leaves or steps than all {PLAN.leaves} episodes"):
        accept(table, fork(lease, leaves=PLAN.leaves + 1))
    assert accept(table, fork(lease, leaves=PLAN.leaves))


def test_tokens_are_counted_from_the_prompt_on() -> None:
    """Many branches below each other are no way to a long path."""
    table = make_table()
    lease = grant(table)
    long = replace(step(1, 0), observation=np.zeros(PLAN.max_context - 30, np.uint32))
    assert accept(table, replace(chain(lease), steps=(long, step(2, 1)), leaves=(Leaf(2, {"em": 1.0}),)))
    with pytest.raises(TreeError, match=r"subtree 1 has a path of 1\d\d tokens, and its plan's episodes have 128 at most"):
        accept(table, replace(chain(lease, index=1, parent=1), steps=(step(11, 1, actions=16, observations=10), step(12, 11))))


def test_a_question_that_is_too_long_is_refused_with_its_row(tmp_path: Path) -> None:
    row = {
        "prompt": [{"role": "user", "content": "x" * (QUESTION_BYTES + 1)}],
        "reward_model": {"ground_truth": {"target": ["a"]}},
    }
    (tmp_path / "train.jsonl").write_text(json.dumps(row))
    with pytest.raises(DataError, match=rf"row 1 has \d+ bytes of text; {QUESTION_BYTES} are the most"):
        load_questions(tmp_path / "train.jsonl")


async def test_a_subtree_of_very_many_steps_is_refused_before_it_is_decoded(tmp_path: Path) -> None:
    """Thousands of steps of a few bytes held the event loop for a third of a second, each time."""
    async with serve_intake(make_table(), tmp_path) as intake, SamplerPeer.join(intake.address) as sampler:
        await sampler.set_demand(1)
        lease = (await sampler.receive("lease")).id
        sent = subtree_to_pb(chain(lease))
        for number in range(MAX_FIELDS // 4):
            sent.steps.add(node=number + 100, status=tree_pb2.STEP_STATUS_OK)
        for table in (lease, "train-9999999"):
            sent.lease = table
            began = time.process_time()
            await sampler.send_request(subtree=sent)
            refusal = (await sampler.receive("ack")).refusal
            assert "more leaves or steps than all" in refusal or "is not open" in refusal
            assert time.process_time() - began < 0.25
        assert intake.sample("subtrees_refused_total", reason="steps") == 1
        assert len(intake.coordinator.lease_table.open_leases[lease].rejected) == 1
