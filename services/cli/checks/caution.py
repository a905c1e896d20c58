"""What a check of a run found that is no fault."""

from __future__ import annotations


class Caution(str):
    """A sentence that should be said before a run begins."""

    __slots__ = ()
