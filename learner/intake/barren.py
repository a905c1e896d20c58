"""When rolling out leads nowhere: no answer from many leases in a row is an error, not something to wait for."""

from __future__ import annotations

from learner.intake.groups import OpenGroup
from treegrpo.errors import RunError
from treegrpo.lease import LeaseEnd

LEASES = 64
"""In a row without a single leaf."""


class Barren:
    """Counts leases that came to nothing and are to blame for it. One that was returned or lost says nothing of the task."""

    def __init__(self) -> None:
        self._count = 0
        self._error = ""

    def judge(self, group: OpenGroup, end: LeaseEnd) -> RunError | None:
        """A lease ended: the reason to give up the run, or None."""
        if group.has_leaves:
            self._count = 0
        elif group.blamed and not end.reason.silent:
            self._count += 1
            self._error = end.error or self._error
        if self._count < LEASES:
            return None
        reason = f"the last error is: {self._error}" if self._error else "none of them named an error"
        return RunError(
            f"The last {LEASES} leases led to no finished episode; {reason}. Does the retriever answer, and do the prompts "
            "fit rollout.max_context? The samplers' logs say more."
        )
