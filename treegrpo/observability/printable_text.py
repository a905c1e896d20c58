r"""Escapes control characters of foreign text for a terminal or a log.

Family names, question ids, paths, error texts of peers could otherwise move the cursor, colour a line, or begin
a line that looks like one of ours.

Example:
    >>> printable("red: \x1b[31m, a line that is none:\nerror: nothing")
    'red: \\x1b[31m, a line that is none:\\nerror: nothing'
"""

from __future__ import annotations

import json
import re
from typing import Any

UNPRINTABLE = re.compile("[\x00-\x1f\x7f-\x9f\u061c\u200b\u200e\u200f\u2028-\u202e\u2060-\u206f\ufeff\ufff9-\ufffb\ud800-\udfff]")
"""Control characters (C0, C1), line and paragraph separators, what turns the direction of writing, what has no width, and
halves of a UTF-16 pair."""
SHORT = {"\n": r"\n", "\r": r"\r", "\t": r"\t"}


def printable(text: str) -> str:
    """``text`` in one line; characters that cannot be shown are escaped as in a Python string."""
    return UNPRINTABLE.sub(lambda found: SHORT.get(found[0]) or _escape(found[0]), text)


def clipped(text: str, characters: int) -> str:
    """``text``, cut after ``characters`` of them, and how much is missing."""
    return text if len(text) <= characters else f"{text[:characters]} … ({len(text) - characters} more letters)"


def printable_json(value: Any) -> str:
    """``value`` as JSON in one line that is also TOML; letters of all languages are not escaped."""
    return UNPRINTABLE.sub(lambda found: f"\\u{ord(found[0]):04x}", json.dumps(value, ensure_ascii=False))


def _escape(character: str) -> str:
    number = ord(character)
    return f"\\x{number:02x}" if number < 0x100 else f"\\u{number:04x}"
