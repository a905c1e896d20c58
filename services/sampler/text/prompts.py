"""Whether prompts can be rendered and leave room for an answer: of one question when it is played, of a file before."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

from services.sampler.text.tokenizer import Tokenizer
from treegrpo.core.question import Question
from treegrpo.core.step import TokenIds
from treegrpo.errors import DataError, ModelError

HOPELESS = 20
"""Questions that fail one after the other, and none that does not: then the others are not tried, for each takes its time."""
SAMPLE = 4000
"""Questions of a larger file that are rendered: the longest, one with each sequence of roles, and some of all the rest."""


def check_prompt(question: Question, prompt: TokenIds, room: int) -> None:
    """Raise DataError if ``prompt`` is empty, or leaves no room in a context of ``room`` tokens."""
    if not 0 < len(prompt) < room:
        raise DataError(
            f"The prompt of question {question.id} has {len(prompt)} tokens, which leaves no room in a context of {room}; "
            "raise rollout.max_context or leave the question out."
        )


@dataclass(frozen=True, slots=True)
class PromptReport:
    """What came of rendering questions."""

    lengths: tuple[int, ...]
    """In tokens, of those that could be rendered."""
    unfit: tuple[str, ...]
    """Why each of those that leave no room, or nothing, does not fit."""
    failed: tuple[str, ...]
    """Why each of the others could not be rendered."""
    alike: bool
    """Different questions became one prompt."""

    @property
    def count(self) -> int:
        return len(self.lengths) + len(self.failed)


def render_all(tokenizer: Tokenizer, questions: Sequence[Question], room: int) -> PromptReport:
    """Render ``questions``, a choice of them where there are many, as they will be for episodes of ``room`` tokens."""
    lengths: list[int] = []
    unfit: list[str] = []
    failed: list[str] = []
    rendered: dict[tuple[str, ...], bytes] = {}
    for question in _chosen(questions):
        if len(failed) == HOPELESS and not lengths:
            break
        try:
            prompt = tokenizer.render(question.prompt)
        except ModelError as error:  # the template's word about this question, for the report
            failed.append(str(error))
            continue
        lengths.append(len(prompt))
        rendered[tuple(message.content.strip() for message in question.prompt)] = hashlib.sha256(prompt.tobytes()).digest()
        try:
            check_prompt(question, prompt, room)
        except DataError as error:  # for the report
            unfit.append(str(error))
    alike = len(rendered) > 1 and len(set(rendered.values())) == 1
    return PromptReport(tuple(lengths), tuple(unfit), tuple(failed), alike)


def _chosen(questions: Sequence[Question]) -> Sequence[Question]:
    if len(questions) <= SAMPLE:
        return questions
    by_size = sorted(questions, key=lambda question: sum(len(message.content) for message in question.prompt))
    roles = {tuple(message.role for message in question.prompt): question for question in questions}
    return [*by_size[-SAMPLE // 2 :], *by_size[:: 2 * len(by_size) // SAMPLE + 1], *list(roles.values())[:SAMPLE]]
