"""The type of a check that is made before a run starts, and of its warnings."""

from __future__ import annotations

from collections.abc import Callable, Iterable


class CheckWarning(str):
    """The result of a check that should be printed before a run starts, and does not prevent it."""

    __slots__ = ()


Check = Callable[[], str]
"""Returns what it found, as a `CheckWarning` where that should be printed; raises an error with the remedy."""


def run_checks(checks: Iterable[Check]) -> list[CheckWarning]:
    """Run all checks and return their warnings. The first that fails raises."""
    return [found for check in checks if isinstance(found := check(), CheckWarning)]
