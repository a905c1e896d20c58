"""Trees, leaves and questions that are larger than the run's plan."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from learner.intake.questions import load_questions
from tests.intake.builders import PLAN, book, chain, grant, step
from treegrpo.errors import DataError, TreeError
from treegrpo.limits import QUESTION_BYTES
from treegrpo.size import NUMBERS, TEXT_LENGTH
from treegrpo.step import Leaf, Subtree


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
    "a metric's name": (lambda lease: with_leaf(lease, metrics={"x" * 65: 0.0}), "metrics", "a name of more than 64 letters"),
}


@pytest.mark.parametrize("name", LARGE)
def test_what_is_larger_than_its_plan_is_refused_and_changes_nothing(name: str) -> None:
    make, field, says = LARGE[name]
    made = book()
    lease = grant(made)
    with pytest.raises(TreeError) as refusal:
        made.accept(make(lease))
    assert (refusal.value.field, says in str(refusal.value)) == (field, True), str(refusal.value)
    assert made.accept(chain(lease))


def test_depth_is_counted_from_the_root() -> None:
    made = book()
    lease = grant(made)
    assert made.accept(chain(lease))
    three = (step(11, 1), step(12, 11), step(13, 12))
    assert made.accept(Subtree(lease, 0, 1, 1, three, (Leaf(13, {"em": 1.0}),)))
    with pytest.raises(TreeError, match="subtree 2 ends 5 steps below the root"):
        made.accept(Subtree(lease, 0, 2, 12, (step(21, 12), step(22, 21)), (Leaf(22, {"em": 1.0}),)))


def test_a_question_that_is_too_long_is_refused_with_its_row(tmp_path: Path) -> None:
    row = {
        "prompt": [{"role": "user", "content": "x" * (QUESTION_BYTES + 1)}],
        "reward_model": {"ground_truth": {"target": ["a"]}},
    }
    (tmp_path / "train.jsonl").write_text(json.dumps(row))
    with pytest.raises(
        DataError, match=rf"row 1 has {QUESTION_BYTES + 2} bytes of prompt and answers; {QUESTION_BYTES} are the most"
    ):
        load_questions(tmp_path / "train.jsonl")
