"""How an answer is judged: normalisation, exact match and F1 of open question answering.

Pure functions over texts. Every score looks at an answer and its gold answers, never at a prompt.
"""

from __future__ import annotations

import re
import string
import unicodedata
from collections import Counter
from collections.abc import Iterable
from typing import Literal

RewardShape = Literal["penalty", "tree_grpo"]

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_WHOLE = frozenset(("yes", "no", "noanswer"))
"""Answers of which no part counts."""
_STRUCTURE, _ANSWERED = 0.2, 0.1
"""structure_format_score and final_format_score of Tree-GRPO's scripts."""
_SYMBOLS = "´ʹʻʼʽˈ′″−"
"""Marks that people type for an apostrophe, a dash or an accent, and Unicode counts among letters or symbols."""
_SELECTORS = range(0xFE00, 0xFE10)
"""They choose between looks of one letter."""
_FULLWIDTH = range(0xFF01, 0xFF5F)
"""ASCII as wide as an ideograph."""
_LIGATURES = range(0xFB00, 0xFB07)


class _Plain(dict[int, str]):
    """Letter → what is compared of it, letter by letter: nothing of punctuation of any script, and of what cannot be seen."""

    def __missing__(self, number: int) -> str:
        letter = chr(number - 0xFEE0 if number in _FULLWIDTH else number)
        dropped = letter in string.punctuation or letter in _SYMBOLS or number in _SELECTORS
        if dropped or unicodedata.category(letter) in _DROPPED:
            plain = ""
        else:
            plain = unicodedata.normalize("NFKC", letter) if number in _LIGATURES else letter
        self[number] = plain
        return plain


_DROPPED = frozenset(("Pc", "Pd", "Ps", "Pe", "Pi", "Pf", "Po", "Cf"))
_PLAIN = _Plain()
_COMPOSED_LETTERS = 4096
"""A longer text is compared as it is written: composing many marks on one letter takes quadratic time."""


def normalise(text: str) -> str:
    """Lower-case, composed (NFC), without punctuation, without the articles a/an/the, white space collapsed.

    Typographic quotes and dashes, and punctuation of other scripts, are punctuation as much as plain ones; fullwidth letters and
    digits are plain ones, ligatures their letters. A text of articles or punctuation alone keeps them:
    nothing said must not equal the answer "A", nor "!" the answer "?".

    Example:
        >>> normalise("The  U.S. Dollar!")
        'us dollar'
        >>> normalise("?")
        '?'
    """
    lower = text.lower()
    if not lower.isascii() and len(lower) <= _COMPOSED_LETTERS:
        lower = unicodedata.normalize("NFC", lower)
    plain = lower.translate(_PLAIN)
    return " ".join(_ARTICLES.sub(" ", plain).split() or plain.split() or lower.split())


def exact_match(answer: str, targets: Iterable[str]) -> float:
    """1.0 if ``answer`` equals any of ``targets`` after normalisation, else 0.0."""
    said = normalise(answer)
    return float(any(said == normalise(target) for target in targets))


def f1(answer: str, targets: Iterable[str]) -> float:
    """The best token-multiset F1 of ``answer`` over ``targets``.

    The best, not the last: one more gold answer can only raise the score. As in HotpotQA's evaluation, "yes", "no" and
    "noanswer" are right or wrong as a whole. Two texts without any token score 1.0.
    """
    said = normalise(answer)
    words = Counter(said.split())
    length = words.total()
    return max((_f1(said, words, length, normalise(target)) for target in targets), default=0.0)


def _f1(said: str, words: Counter[str], length: int, gold: str) -> float:
    """F1 of a normalised answer; its ``words`` are counted once for all gold answers."""
    if said == gold or not {said, gold}.isdisjoint(_WHOLE):
        return float(said == gold)
    gold_words = gold.split()
    common = sum(min(count, words[word]) for word, count in Counter(gold_words).items())
    return 2 * common / (length + len(gold_words))


def format_reward(shape: RewardShape, judged: float, *, answered: bool, kept: bool, reward: str, penalty: float) -> float:
    """What the format adds to the judgement of an answer, or takes off.

    | shape `tree_grpo`, of Tree-GRPO's code | format kept | format broken |
    |---|---|---|
    | right (F1: above 0) | 0 | -0.2 |
    | wrong | 0.2 | 0.1 for `em`, 0 for `f1` |
    | no answer | | 0 |

    Args:
        shape: `penalty` takes ``penalty`` off whatever broke the format, once.
        judged: ``em`` or ``f1`` of the answer, 0 without one.
        answered: the episode has an answer.
        kept: every turn is well-formed and the last one answers.
        reward: which of the two is trained on.
        penalty: λ_f.
    """
    if shape == "penalty":
        return 0.0 if kept else -penalty
    if judged > 0:
        return 0.0 if kept else -_STRUCTURE
    if kept:
        return _STRUCTURE
    return _ANSWERED if answered and reward == "em" else 0.0
