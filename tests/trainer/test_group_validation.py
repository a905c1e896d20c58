"""Groups are examined before they become tensors; the journal they come from may be anybody's."""

from __future__ import annotations

import threading
import time
from pathlib import Path
from typing import Any

import msgpack
import numpy as np
import pytest

from learner.trainer.algorithm.group_validation import check_group, unpack_groups
from learner.trainer.intake_client import IntakeClient
from learner.trainer.loop import Trainer
from tests.intake.builders import VOCABULARY, chain, question, step
from tests.shared.invalid_subtrees import EVERY
from tests.trainer.builders import configure, forked, group, write_tiny
from tests.trainer.fake_intake import FakeIntake
from treegrpo.core.step import ROOT, Leaf, Step, StepStatus, Subtree
from treegrpo.core.tree import Group, Tree
from treegrpo.errors import TreeError
from treegrpo.net.local_socket import socket_path
from treegrpo.observability.metrics import TrainerMetrics
from treegrpo.wire.trainer_protocol import Publish, pack_group

PROMPT = np.arange(3, dtype=np.uint32)


def packed(name: str, *subtrees: Subtree) -> bytes:
    return pack_group(Group(name, question(0)), list(subtrees))


@pytest.mark.parametrize("name", EVERY)
def test_a_group_that_is_wrong_is_left_out_and_the_others_are_not(name: str) -> None:
    broken = EVERY[name]
    wrong = packed("q-17", chain("a"), broken.of("a"))
    groups, refused = unpack_groups([packed("q-1", chain("a")), wrong, packed("q-2", chain("b"))], VOCABULARY)
    assert [one.id for one in groups] == ["q-1", "q-2"]
    (sentence,) = refused
    assert sentence.startswith(f"Group q-17, tree {broken.says}")


@pytest.mark.parametrize(
    "torn", [b"", b"\xc1", b"\x07", packed("q", chain("a"))[:-5], msgpack.packb({"id": "q", "question": b"\xff"})]
)
def test_a_group_whose_bytes_are_torn_is_left_out(torn: bytes) -> None:
    groups, (sentence,) = unpack_groups([torn, packed("q-1", chain("a"))], VOCABULARY)
    assert [one.id for one in groups] == ["q-1"]
    assert "its bytes cannot be read" in sentence


def made(*steps: Step, leaves: dict[int, Leaf] | None = None, prompt: Any = PROMPT, **filed: Step) -> Group:
    """One tree put together without the checks of `Tree.append_subtree`."""
    by_node = {one.node: one for one in steps} | {int(name[1:]): one for name, one in filed.items()}
    return Group("q-17", question(0), {0: Tree(prompt, by_node, leaves or {})})


LEAF = Leaf(1, {"em": 1.0})
UNSOUND: dict[str, tuple[Group, str, str]] = {
    "no prompt": (made(step(1, 0), prompt=PROMPT[:0]), "prompt", ": it has no prompt"),
    "empty tree": (made(), "steps", ": it is empty"),
    "unknown parent": (made(step(1, 0), step(2, 9)), "parent", ", node 2: unknown parent 9."),
    "cycle": (made(step(1, 0), step(2, 4), step(3, 2), step(4, 3)), "parent", ", node 2: its parents lead back to it"),
    "own parent": (made(step(1, 1)), "parent", ", node 1: its parents lead back to it"),
    "a step at the root": (made(step(0, 1), step(1, 0)), "node", ", node 0: its step says it is node 0; node 0 is the root"),
    "a step under another's name": (made(_5=step(1, 0)), "node", ", node 5: its step says it is node 1"),
    "leaf with children": (made(step(1, 0), step(2, 1), leaves={1: LEAF}), "parent", ", node 2: parent 1 is where an episode"),
    "after a failure": (
        made(step(1, 0, status=StepStatus.TOOL_ERROR), step(2, 1)), "parent", ", node 2: parent 1 is where an episode"
    ),
    "leaf that is no step": (made(step(2, 0), leaves={1: LEAF}), "leaf", ", node 1: the leaf is not one of its steps"),
    "leaf under another's name": (made(step(1, 0), step(2, 0), leaves={2: LEAF}), "leaf", ", node 2: its leaf says it ends"),
}  # fmt: skip


@pytest.mark.parametrize("name", UNSOUND)
def test_a_tree_that_was_put_together_elsewhere_is_examined_whole(name: str) -> None:
    wrong, field, reports_error = UNSOUND[name]
    with pytest.raises(TreeError) as refusal:
        check_group(wrong, VOCABULARY)
    assert str(refusal.value).startswith(f"Group q-17, tree 0{reports_error}")
    assert refusal.value.field == field


def test_what_is_sound_is_let_through_whatever_the_order_of_its_steps() -> None:
    check_group(made(step(3, 2), step(2, 1), step(1, 0), leaves={3: Leaf(3, {"em": 1.0})}), VOCABULARY)
    check_group(group(forked()), 64)
    failed = Subtree("a", 0, 0, ROOT, (step(1, 0, actions=0, status=StepStatus.ENGINE_ERROR),), (), PROMPT)
    check_group(group([failed]), VOCABULARY)


def test_a_chain_of_ten_thousand_steps_takes_linear_time_and_no_recursion() -> None:
    depth = 10_000
    steps = [step(node, node - 1, actions=1, observations=0) for node in range(1, depth + 1)]
    deep = made(*steps[::-1], leaves={depth: Leaf(depth, {"em": 1.0})})
    began = time.perf_counter()
    check_group(deep, VOCABULARY)
    assert time.perf_counter() - began < 5.0
    round_trip = made(*steps[1:], step(1, depth))
    with pytest.raises(TreeError, match="a cycle"):
        check_group(round_trip, VOCABULARY)


@pytest.mark.usefixtures("one_thread")
def test_the_run_goes_on_past_groups_that_are_left_out(tmp_path: Path) -> None:
    write_tiny(tmp_path / "model")
    (tmp_path / "run").mkdir()
    config = configure(tmp_path, steps=4, batch=2)
    metrics = TrainerMetrics()
    wrong = FakeIntake(socket_path(config.run.dir), beyond=frozenset({0, 2, 3}), torn=frozenset({5}))
    with wrong as intake, IntakeClient.connect(intake.path, threading.Event()) as client:
        Trainer(config, client, metrics).train()
    assert [report["groups_refused"] for report in intake.reports] == [1, 2, 1, 0]
    assert [report["groups"] for report in intake.reports] == [1, 0, 1, 2]
    assert [report["leaves"] for report in intake.reports] == [6, 0, 6, 12]
    assert [publish.position for publish in intake.of(Publish)] == [0, 2, 4, 6, 8]
    assert metrics.registry.get_sample_value("treegrpo_groups_refused_total") == 4
