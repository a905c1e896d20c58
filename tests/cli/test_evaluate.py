"""`treegrpo eval`: what it says of questions that came to no answer."""

from __future__ import annotations

import pytest

from services.cli.evaluate import EvalAnswer, describe_failures
from treegrpo.core.question import Question
from treegrpo.core.step import Leaf
from treegrpo.errors import RunError

pytestmark = pytest.mark.pure

QUESTION = Question("id", "made", (), ("a",))
ANSWERED, FAILED = EvalAnswer(QUESTION, Leaf(0, {"em": 1.0}, {})), EvalAnswer(QUESTION, None, "ToolError: HTML instead of JSON")


def test_questions_without_an_answer_are_said_with_the_last_reason() -> None:
    assert describe_failures([ANSWERED, ANSWERED]) == ""
    sentence = "1 of 2 questions have no answer; the last: ToolError: HTML instead of JSON."
    assert describe_failures([FAILED, ANSWERED]) == sentence


def test_an_evaluation_without_any_answer_is_an_error() -> None:
    with pytest.raises(RunError, match="2 of 2 questions have no answer; the last: no error was named"):
        describe_failures([FAILED, EvalAnswer(QUESTION, None)])
