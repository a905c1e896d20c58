"""Gives up questions: after `MAX_ATTEMPTS` leases of a draw that were lost or failed. Pure.

A group that is given up is closed with the leaves it has, or set aside if it has none: it is listed in set_aside.jsonl with
its reason, and another question takes its place.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

from learner.intake.leases.circuit_breaker import NoProgressBreaker
from learner.intake.leases.rollout_group import GroupState, RolloutGroup

MAX_ATTEMPTS = 3
"""Leases of one draw that may be lost or fail: one may meet a bad machine, a second bad luck; then it is the question."""


def used_all_attempts(group: RolloutGroup) -> bool:
    """Whether a group has used all its attempts and is not leased again."""
    return group.attempts >= MAX_ATTEMPTS


def was_given_up(group: RolloutGroup) -> bool:
    """Whether a group was given up: it used all its attempts, or was closed too late."""
    return group.state is GroupState.SET_ASIDE or (group.state is GroupState.READY and used_all_attempts(group))


class QuestionAttempts:
    """Counts which samplers failed at which question, so that one sampler of several cannot set a question aside alone."""

    def __init__(self, breaker: NoProgressBreaker) -> None:
        self._breaker = breaker
        self._failed: dict[tuple[int, str], Counter[str]] = {}
        """By draw and question: how often each sampler has."""

    def is_excused(self, group: RolloutGroup, name: str, connected: Iterable[str]) -> bool:
        """Whether a failed lease does not count against its question.

        Its sampler is put aside, or has failed at it before, and another of those that are ``connected`` has not. If no other is,
        one may still come: then up to ``lone_repeats`` of its failures at one question do not count.
        """
        failed = self._failed.setdefault((group.draw, group.lease.question.id), Counter())
        others = set(connected) - {name}
        untried = {other for other in others if not self._breaker.is_put_aside(other)} - failed.keys()
        others_may_do_better = bool(untried) if others else failed[name] <= self._breaker.limits.lone_repeats
        excused = others_may_do_better and (failed[name] > 0 or self._breaker.is_put_aside(name))
        failed[name] += 1
        return excused

    def forget_question(self, group: RolloutGroup) -> None:
        """Drop the failures of a finished question."""
        self._failed.pop((group.draw, group.lease.question.id), None)
