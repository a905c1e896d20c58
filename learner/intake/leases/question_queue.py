"""The questions of a run: read from data files, drawn in a seeded order, epoch after epoch."""

from __future__ import annotations

import random
from bisect import insort
from pathlib import Path
from typing import Any

from learner.intake.leases.question_rows import COLUMNS, has_index, read_question
from treegrpo.core.question import Question
from treegrpo.errors import DataError
from treegrpo.storage.row_files import read_rows


def load_questions(path: Path) -> list[Question]:
    """Read the questions of a file of rows (docs/data.md).

    Raises:
        DataError: the file cannot be read, holds no question, a row lacks its prompt or its answer, or two rows share
            an id (source, split and index); the message names file and row.
    """
    rows = [row for _, row in read_rows(path, COLUMNS)]
    mixed = any(map(has_index, rows))  # then a row's number could be another's index
    questions: dict[str, Question] = {}
    for number, row in enumerate(rows, start=1):
        question = read_question(row, f"{path}, row {number}", f"row {number}" if mixed else str(number))
        if question.id in questions:
            raise DataError(f"{path}, row {number} has the id {question.id} of an earlier row; make extra_info.index unique.")
        questions[question.id] = question
    if not questions:
        raise DataError(f"{path} holds no question; check the data path.")
    return list(questions.values())


class QuestionQueue:
    """An endless seeded sequence of draws: every question once an epoch, each epoch in an order of its own.

    A draw's number says which question it is, now and after a restart. A draw that came to nothing is put back and
    goes before all new ones, the oldest first: a question that takes long is not passed over for short ones.
    """

    def __init__(self, questions: list[Question], seed: int) -> None:
        self._questions = questions
        self._seed = seed
        self._order: tuple[int, list[int]] = (-1, [])
        self._next = 0
        self._returned: list[int] = []
        """Ascending."""

    @property
    def next_draw(self) -> int:
        """The number of the next draw, until it is taken."""
        return self._returned[0] if self._returned else self._next

    def put_back(self, draw: int) -> None:
        insort(self._returned, draw)

    def take(self, draw: int) -> None:
        """This draw is made, now or before a restart."""
        self._next = max(self._next, draw + 1)
        if draw in self._returned:
            self._returned.remove(draw)

    def __getitem__(self, draw: int) -> Question:
        """The question of a draw."""
        epoch, place = divmod(draw, len(self._questions))
        if self._order[0] != epoch:
            order = list(range(len(self._questions)))
            random.Random(f"{self._seed}/{epoch}").shuffle(order)
            self._order = (epoch, order)
        return self._questions[self._order[1][place]]

    def state(self) -> dict[str, Any]:
        """Plain data to be restored from."""
        return {"next": self._next, "returned": list(self._returned)}

    def restore(self, state: dict[str, Any]) -> None:
        """Become what `state` was taken of, with the same questions and seed."""
        self._next, self._returned = state["next"], list(state["returned"])
