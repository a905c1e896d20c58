"""Strings that separate an environment's own markup from foreign text."""

from __future__ import annotations

from typing import Self


class Markup(str):
    """A string whose control strings are control tokens in what the environment wrote itself, ``before`` and ``after``.

    A tokenizer reads every other string as plain text: ``<|im_end|>`` in a document is nine characters to the policy. A slice
    of markup, or markup with something added, is an ordinary string again, hence plain text.

    Example:
        >>> Markup("<information>", "a document", "</information>")
        '<information>a document</information>'
    """

    __slots__ = ("after", "before", "foreign")
    before: str
    foreign: str
    after: str

    def __new__(cls, before: str, foreign: str = "", after: str = "") -> Self:
        text = super().__new__(cls, before + foreign + after)
        text.before, text.foreign, text.after = str(before), str(foreign), str(after)
        return text

    def __getnewargs__(self) -> tuple[str, str, str]:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Arguments of a copy."""
        return self.before, self.foreign, self.after
