"""How an answer is judged: normalisation, exact match and F1 of open question answering.

Pure functions over texts. Every score looks at an answer and its gold answers, never at a prompt.
"""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Iterable

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_NO_PUNCTUATION = str.maketrans("", "", string.punctuation)


def normalise(text: str) -> str:
    """Lower-case, without punctuation, without the articles a/an/the, white space collapsed.

    A text of articles alone keeps them: nothing said must not equal the answer "A".

    Example:
        >>> normalise("The  U.S. Dollar!")
        'us dollar'
    """
    plain = text.lower().translate(_NO_PUNCTUATION)
    return " ".join(_ARTICLES.sub(" ", plain).split() or plain.split())


def exact_match(answer: str, targets: Iterable[str]) -> float:
    """1.0 if ``answer`` equals any of ``targets`` after normalisation, else 0.0."""
    said = normalise(answer)
    return float(any(said == normalise(target) for target in targets))


def f1(answer: str, targets: Iterable[str]) -> float:
    """The best token-multiset F1 of ``answer`` over ``targets``.

    The best, not the last: one more gold answer can only raise the score. Two texts without any token score 1.0.
    """
    said = normalise(answer).split()
    return max((_f1(said, normalise(target).split()) for target in targets), default=0.0)


def _f1(said: list[str], gold: list[str]) -> float:
    common = (Counter(said) & Counter(gold)).total()
    if not said or not gold:
        return float(said == gold)
    return 2 * common / (len(said) + len(gold))
