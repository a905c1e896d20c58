"""The questions of a run: read from data files, drawn in a seeded order, epoch after epoch."""

from __future__ import annotations

import json
import random
from bisect import insort
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import BaseModel, ConfigDict, ValidationError

from treegrpo.errors import DataError, describe
from treegrpo.limits import QUESTION_BYTES
from treegrpo.question import Message, Question


class _Message(BaseModel):
    role: str
    content: str


class _Truth(BaseModel):
    model_config = ConfigDict(coerce_numbers_to_str=True)

    target: list[str] | str


class _RewardModel(BaseModel):
    ground_truth: _Truth


class _Extra(BaseModel):
    split: str = ""
    index: int | str = ""
    family: str = ""


class _Row(BaseModel):
    """One row in Search-R1's format; columns we do not use are passed over."""

    data_source: str = ""
    prompt: list[_Message]
    reward_model: _RewardModel
    extra_info: _Extra | None = None


def load_questions(path: Path) -> list[Question]:
    """Read rows in Search-R1's format from a JSONL or parquet file.

    Raises:
        DataError: the file cannot be read, holds no question, a row lacks its prompt or its answer, or two rows share
            an id (source, split and index); the message names file and row.
    """
    questions: dict[str, Question] = {}
    for number, row in enumerate(_rows(path), start=1):
        question = _question(row, f"{path}, row {number}", number)
        if question.id in questions:
            raise DataError(f"{path}, row {number} has the id {question.id} of an earlier row; make extra_info.index unique.")
        questions[question.id] = question
    if not questions:
        raise DataError(f"{path} holds no question; check the data path.")
    return list(questions.values())


def _rows(path: Path) -> Iterator[Any]:
    try:
        if path.suffix == ".parquet":
            yield from pq.read_table(path).to_pylist()  # pyright: ignore[reportUnknownMemberType]
            return
        with path.open(encoding="utf-8") as lines:
            for number, line in enumerate((line for line in lines if line.strip()), start=1):
                try:
                    yield json.loads(line)
                except json.JSONDecodeError as error:
                    raise DataError(f"{path}, row {number} is not valid JSON ({error.msg}); write one object a line.") from error
    except OSError as error:
        raise DataError(f"The questions {path} cannot be read ({error.strerror or error}); check the data path.") from error
    except (UnicodeDecodeError, pa.ArrowInvalid) as error:
        raise DataError(f"{path} is neither JSONL nor parquet ({describe(error)}); check the data path.") from error


def _question(row: Any, where: str, number: int) -> Question:
    try:
        fields = _Row.model_validate(row)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"] if part not in ("list[str]", "str")) or "the row"
        reason = first["msg"][:1].lower() + first["msg"][1:]
        raise DataError(f"{where}: {place} is not usable ({reason}); see the data format in the README.") from error
    targets = fields.reward_model.ground_truth.target
    answers = tuple(t for t in ([targets] if isinstance(targets, str) else targets) if t.strip())
    if not answers:
        raise DataError(f"{where} has no answer; give at least one string in reward_model.ground_truth.target.")
    prompt = tuple(Message(message.role, message.content) for message in fields.prompt)
    if not any(message.content.strip() for message in prompt):
        raise DataError(f"{where} has an empty prompt; give the question in prompt[].content.")
    texts = (*(message.content for message in prompt), *answers)
    if (size := sum(len(text.encode()) for text in texts)) > QUESTION_BYTES:
        raise DataError(
            f"{where} has {size} bytes of prompt and answers; {QUESTION_BYTES} are the most, shorten or leave it out."
        )
    extra = fields.extra_info or _Extra()
    identity = f"{fields.data_source}/{extra.split}/{number if extra.index == '' else extra.index}"
    return Question(identity, fields.data_source, prompt, answers, extra.family)


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
