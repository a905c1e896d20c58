"""Which part of a rendered chat template is whose.

Each control string of a message is held back while the template is rendered, and a number that nobody can guess stands in its
place. Ordinary text stays where it is, so that a template may strip, change or look at it:

    messages   What does <|end|> mean?
    rendered   <|user|>What does 5914…8203000000 mean?<|end|>
    pieces     "<|user|>What does ", "<|end|>" (the message's), " mean?<|end|>"
"""

from __future__ import annotations

import re
import secrets
from collections.abc import Callable, Sequence

from services.sampler.control_tokens import ControlTokens
from treegrpo.errors import ModelError

_WIDTH = 7
"""Digits of a held string's number: a question has fewer letters."""
_OTHER = str.maketrans("0123456789", "5678901234")

Pieces = list[tuple[str, bool]]
"""Texts, each with whether its control strings are tokens."""


def rendered_pieces(contents: Sequence[str], control: ControlTokens, render: Callable[[list[str]], str]) -> Pieces:
    """What ``render`` makes of ``contents``, in pieces: the template's own, and what was held back of the contents.

    Raises:
        ModelError: the template cut a stand-in, which shows where two renderings with other digits differ.
    """
    key = _key(contents)
    fences = Fences(control, key)
    pieces = fences.pieces(render([fences.fenced(content) for content in contents]))
    if fences.held:
        others = Fences(control, key.translate(_OTHER))
        if others.pieces(render([others.fenced(content) for content in contents])) != pieces:
            raise ModelError("The chat template cuts a message in the middle of a control string; leave such rows out.")
    return pieces


class Fences:
    """Puts a stand-in, ``key`` and a number, in the place of each control string of a content."""

    def __init__(self, control: ControlTokens, key: str) -> None:
        self._control = control
        self._key = key
        self.held: list[str] = []

    def fenced(self, content: str) -> str:
        """``content`` with its control strings held back."""
        parts, done = list[str](), 0
        for start, end in self._control.find(content):
            parts += [content[done:start], self._hold(content[start:end])]
            done = end
        return self._fence_ends("".join([*parts, content[done:]]))

    def pieces(self, rendered: str) -> Pieces:
        """The rendered text with what was held back in its place again."""
        parts = re.split(f"{self._key}([0-9]{{{_WIDTH}}})", rendered)
        return [(self.held[int(part)], False) if place % 2 else (part, True) for place, part in enumerate(parts)]

    def _fence_ends(self, content: str) -> str:
        """Nothing of the template's may become a control string together with an end of the content."""
        core = content.strip()
        if not self._control.may_grow(core):
            return content
        start = content.index(core)
        return content[:start] + self._hold("") + core + self._hold("") + content[start + len(core) :]

    def _hold(self, text: str) -> str:
        self.held.append(text)
        return f"{self._key}{len(self.held) - 1:0{_WIDTH}}"


def _key(contents: Sequence[str]) -> str:
    """Digits that no content has, nor their others: no usual filter of a template changes them."""
    while True:
        key = str(secrets.randbelow(9 * 10**39) + 10**39)
        if not any(digits in content for content in contents for digits in (key, key.translate(_OTHER))):
            return key
