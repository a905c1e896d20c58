"""Replaces control strings of messages by placeholders while a chat template is rendered, so that its own stay apart.

A placeholder is an unguessable number. Ordinary text stays where it is, so that a template may strip, change or test it:

    messages   What does <|end|> mean?
    rendered   <|user|>What does 5914…8203000000 mean?<|end|>
    pieces     "<|user|>What does ", "<|end|>" (the message's), " mean?<|end|>"
"""

from __future__ import annotations

import re
import secrets
from collections.abc import Callable, Sequence

from services.sampler.text.control_tokens import ControlTokens
from treegrpo.errors import ModelError

_WIDTH = 7
"""Digits of a placeholder's number within a prompt: a question has fewer letters."""
_OTHER_DIGITS = str.maketrans("0123456789", "5678901234")

Pieces = list[tuple[str, bool]]
"""Texts, each with whether its control strings are tokens."""


def render_pieces(contents: Sequence[str], control: ControlTokens, render: Callable[[list[str]], str]) -> Pieces:
    """Render ``contents`` in pieces: the template's own text, and the control strings of the contents.

    Raises:
        ModelError: the template cut a placeholder, which shows where two renderings with other digits differ.
    """
    key = _unused_digits(contents)
    placeholders = Placeholders(control, key)
    pieces = placeholders.pieces(render([placeholders.with_placeholders(content) for content in contents]))
    if placeholders.texts:
        others = Placeholders(control, key.translate(_OTHER_DIGITS))
        if others.pieces(render([others.with_placeholders(content) for content in contents])) != pieces:
            raise ModelError("The chat template cuts a message in the middle of a control string; leave such rows out.")
    return pieces


class Placeholders:
    """The placeholders of one prompt: each is ``key`` and a number."""

    def __init__(self, control: ControlTokens, key: str) -> None:
        self._control = control
        self._key = key
        self.texts: list[str] = []
        """What each stands for, by its number."""

    def with_placeholders(self, content: str) -> str:
        """``content`` with a placeholder for each of its control strings."""
        parts, done = list[str](), 0
        for start, end in self._control.find(content):
            parts += [content[done:start], self._placeholder(content[start:end])]
            done = end
        return self._guard_ends("".join([*parts, content[done:]]))

    def pieces(self, rendered: str) -> Pieces:
        """The rendered text with the placeholders replaced by their control strings."""
        parts = re.split(f"{self._key}([0-9]{{{_WIDTH}}})", rendered)
        return [(self.texts[int(part)], False) if position % 2 else (part, True) for position, part in enumerate(parts)]

    def _guard_ends(self, content: str) -> str:
        """``content``, with empty placeholders at ends that the template's text could extend to a control string."""
        core = content.strip()
        if not self._control.may_extend(core):
            return content
        start = content.index(core)
        return content[:start] + self._placeholder("") + core + self._placeholder("") + content[start + len(core) :]

    def _placeholder(self, text: str) -> str:
        self.texts.append(text)
        return f"{self._key}{len(self.texts) - 1:0{_WIDTH}}"


def _unused_digits(contents: Sequence[str]) -> str:
    """Digits that no content has, nor their translation: no usual filter of a template changes them."""
    while True:
        key = str(secrets.randbelow(9 * 10**39) + 10**39)
        if not any(digits in content for content in contents for digits in (key, key.translate(_OTHER_DIGITS))):
            return key
