"""Checks that prompts can be rendered and fit the context: of one question when it is leased, of a data file beforehand."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

from services.sampler.text.tokenizer import Tokenizer
from treegrpo.core.question import Question
from treegrpo.core.step import TokenIds
from treegrpo.errors import DataError, ModelError

MAX_LEADING_FAILURES = 20
"""After this many failures and no success the remaining questions are skipped, since each takes its time."""
MAX_QUESTIONS = 4000
"""Questions of a larger file that are rendered: the longest, one with each sequence of roles, and some of all the rest."""


def check_prompt(question: Question, prompt: TokenIds, context: int) -> None:
    """Raise DataError if ``prompt`` is empty, or leaves no room for an answer in a context of ``context`` tokens."""
    if not 0 < len(prompt) < context:
        raise DataError(
            f"The prompt of question {question.id} has {len(prompt)} tokens, which leaves no room in a context of {context}; "
            "raise rollout.max_context or leave the question out."
        )


@dataclass(frozen=True, slots=True)
class PromptReport:
    """The result of rendering the questions of a file."""

    lengths: tuple[int, ...]
    """In tokens, of those that could be rendered."""
    unfit: tuple[str, ...]
    """The error of each that is empty or leaves no room in the context."""
    failed: tuple[str, ...]
    """The error of each that could not be rendered."""
    all_identical: bool
    """Different questions became the same prompt."""

    @property
    def count(self) -> int:
        return len(self.lengths) + len(self.failed)


def render_prompts(tokenizer: Tokenizer, questions: Sequence[Question], context: int) -> PromptReport:
    """Render ``questions``, a sample where there are many, as for episodes of ``context`` tokens."""
    lengths: list[int] = []
    unfit: list[str] = []
    failed: list[str] = []
    rendered: dict[tuple[str, ...], bytes] = {}
    for question in _sample(questions):
        if len(failed) == MAX_LEADING_FAILURES and not lengths:
            break
        try:
            prompt = tokenizer.render(question.prompt)
        except ModelError as error:  # the template fails on this question: for the report
            failed.append(str(error))
            continue
        lengths.append(len(prompt))
        rendered[tuple(message.content.strip() for message in question.prompt)] = hashlib.sha256(prompt.tobytes()).digest()
        try:
            check_prompt(question, prompt, context)
        except DataError as error:  # for the report
            unfit.append(str(error))
    all_identical = len(rendered) > 1 and len(set(rendered.values())) == 1
    return PromptReport(tuple(lengths), tuple(unfit), tuple(failed), all_identical)


def _sample(questions: Sequence[Question]) -> Sequence[Question]:
    if len(questions) <= MAX_QUESTIONS:
        return questions
    by_size = sorted(questions, key=lambda question: sum(len(message.content) for message in question.prompt))
    roles = {tuple(message.role for message in question.prompt): question for question in questions}
    return [
        *by_size[-MAX_QUESTIONS // 2 :],
        *by_size[:: 2 * len(by_size) // MAX_QUESTIONS + 1],
        *list(roles.values())[:MAX_QUESTIONS],
    ]
