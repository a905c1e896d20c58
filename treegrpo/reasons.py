"""What a library's error says, fit for one of our sentences: one line, whole sentences, no more than is needed."""

from __future__ import annotations

import re

LENGTH = 300
"""Characters that are kept, to the end of the last sentence that fits."""
_SENTENCE = re.compile(r"(?<=[.!?])\s")


def reason_of(error: BaseException) -> str:
    r"""The text of ``error``, cut between sentences, else between words, so that no address or path is cut.

    Example:
        >>> reason_of(ValueError("No such file.\nSee https://example.org/a/long/page for more."))
        'No such file. See https://example.org/a/long/page for more'
    """
    text = " ".join(str(error).split()) or type(error).__name__
    if len(text) > LENGTH:
        kept = _joined(_SENTENCE.split(text), LENGTH)
        text = kept or f"{_joined(text.split(' '), LENGTH)} …"
    return text.rstrip(".")


def _joined(parts: list[str], length: int) -> str:
    """The first of ``parts`` that fit together, with blanks between them."""
    kept = ""
    for part in parts:
        longer = f"{kept} {part}".lstrip()
        if len(longer) > length:
            break
        kept = longer
    return kept
