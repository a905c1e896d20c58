"""How long to wait before something that failed is tried again."""

from __future__ import annotations

from collections.abc import Sequence


def pause(seconds: Sequence[float], failures: int) -> float:
    """The wait after ``failures`` before this one: ``seconds`` in turn, and the last of them from then on.

    Example:
        >>> [pause((0.1, 1.0, 5.0), failures) for failures in range(5)]
        [0.1, 1.0, 5.0, 5.0, 5.0]
    """
    return seconds[min(failures, len(seconds) - 1)]
