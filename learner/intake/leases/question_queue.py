"""The question queue: draws the questions of a run in a seeded order, epoch after epoch."""

from __future__ import annotations

import random
from bisect import insort
from typing import Any

from treegrpo.core.question import Question


class QuestionQueue:
    """An endless seeded sequence of draws: every question once an epoch, each epoch in an order of its own.

    A draw's number says which question it is, now and after a restart. A draw that came to nothing is requeued and
    goes before all new ones, the oldest first: a question that takes long is not passed over for short ones.
    """

    def __init__(self, questions: list[Question], seed: int) -> None:
        self._questions = questions
        self._seed = seed
        self._order: tuple[int, list[int]] = (-1, [])
        self._next = 0
        self._requeued: list[int] = []
        """Ascending."""

    @property
    def next_draw(self) -> int:
        """The number of the next draw, until it is taken."""
        return self._requeued[0] if self._requeued else self._next

    def requeue_draw(self, draw: int) -> None:
        """Put a draw whose leases had no result before all new ones."""
        insort(self._requeued, draw)

    def mark_drawn(self, draw: int) -> None:
        """Note that a draw was made, now or before a restart."""
        self._next = max(self._next, draw + 1)
        if draw in self._requeued:
            self._requeued.remove(draw)

    def __getitem__(self, draw: int) -> Question:
        """The question of a draw."""
        epoch, place = divmod(draw, len(self._questions))
        if self._order[0] != epoch:
            order = list(range(len(self._questions)))
            random.Random(f"{self._seed}/{epoch}").shuffle(order)
            self._order = (epoch, order)
        return self._questions[self._order[1][place]]

    def snapshot_draws(self) -> dict[str, Any]:
        """Plain data for `restore_draws`."""
        return {"next": self._next, "returned": list(self._requeued)}

    def restore_draws(self, row: dict[str, Any]) -> None:
        """Restore what `snapshot_draws` gave, with the same questions and seed."""
        self._next, self._requeued = row["next"], list(row["returned"])
