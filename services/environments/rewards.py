"""Scores answers: normalisation, exact match and F1 of open question answering.

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
_WHOLE_ANSWERS = frozenset(("yes", "no", "noanswer"))
"""Answers that are right or wrong as a whole."""
_STRUCTURE_SCORE, _FINAL_FORMAT_SCORE = 0.2, 0.1
"""structure_format_score and final_format_score of Tree-GRPO's scripts."""
_SYMBOLS = "´ʹʻʼʽˈ′″−"
"""Characters typed for an apostrophe, a dash or an accent that Unicode classifies as letters or symbols."""
_SELECTORS = range(0xFE00, 0xFE10)
"""Variation selectors, which choose a glyph of the character before them."""
_FULLWIDTH = range(0xFF01, 0xFF5F)
"""Fullwidth forms of ASCII."""
_LIGATURES = range(0xFB00, 0xFB07)


class _AnswerCharTable(dict[int, str]):
    """Maps a character to what is compared of it, for `str.translate`: punctuation and invisible characters to nothing."""

    def __missing__(self, number: int) -> str:
        char = chr(number - 0xFEE0 if number in _FULLWIDTH else number)
        dropped = char in string.punctuation or char in _SYMBOLS or number in _SELECTORS
        if dropped or unicodedata.category(char) in _DROPPED:
            plain = ""
        else:
            plain = unicodedata.normalize("NFKC", char) if number in _LIGATURES else char
        self[number] = plain
        return plain


_DROPPED = frozenset(("Pc", "Pd", "Ps", "Pe", "Pi", "Pf", "Po", "Cf"))
_ANSWER_CHARS = _AnswerCharTable()
_COMPOSED_CHARACTERS = 4096
"""A longer text is compared as it is written: composing many marks on one character takes quadratic time."""


def normalise(text: str) -> str:
    """Lower-case, composed (NFC), without punctuation, without the articles a/an/the, white space collapsed.

    Typographic quotes and dashes, and punctuation of other scripts, are punctuation as much as plain ones; fullwidth letters and
    digits are plain ones, ligatures their letters. A text of articles or punctuation alone keeps them:
    an empty answer must not equal the answer "A", nor "!" the answer "?".

    Example:
        >>> normalise("The  U.S. Dollar!")
        'us dollar'
        >>> normalise("?")
        '?'
    """
    lower = text.lower()
    if not lower.isascii() and len(lower) <= _COMPOSED_CHARACTERS:
        lower = unicodedata.normalize("NFC", lower)
    plain = lower.translate(_ANSWER_CHARS)
    return " ".join(_ARTICLES.sub(" ", plain).split() or plain.split() or lower.split())


def exact_match(answer: str, targets: Iterable[str]) -> float:
    """1.0 if ``answer`` equals any of ``targets`` after normalisation, else 0.0."""
    normalised = normalise(answer)
    return float(any(normalised == normalise(target) for target in targets))


def f1(answer: str, targets: Iterable[str]) -> float:
    """The best token-multiset F1 of ``answer`` over ``targets``.

    The best, not the last: one more gold answer can only raise the score. As in HotpotQA's evaluation, "yes", "no" and
    "noanswer" are right or wrong as a whole. Two texts without any token score 1.0.
    """
    normalised = normalise(answer)
    words = Counter(normalised.split())
    length = words.total()
    return max((_f1(normalised, words, length, normalise(target)) for target in targets), default=0.0)


def _f1(normalised: str, words: Counter[str], length: int, gold: str) -> float:
    """F1 of a normalised answer; its ``words`` are counted once for all gold answers."""
    if normalised == gold or not {normalised, gold}.isdisjoint(_WHOLE_ANSWERS):
        return float(normalised == gold)
    gold_words = gold.split()
    common = sum(min(count, words[word]) for word, count in Counter(gold_words).items())
    return 2 * common / (length + len(gold_words))


def format_reward(shape: RewardShape, score: float, *, answered: bool, well_formed: bool, reward: str, penalty: float) -> float:
    """The format component of the reward, which is added to the score of an answer.

    | shape `tree_grpo`, of Tree-GRPO's code | well-formed | not well-formed |
    |---|---|---|
    | right (F1: above 0) | 0 | -0.2 |
    | wrong | 0.2 | 0.1 for `em`, 0 for `f1` |
    | no answer | | 0 |

    Args:
        shape: `penalty` subtracts ``penalty`` once from a malformed transcript.
        score: ``em`` or ``f1`` of the answer, 0 without one.
        answered: the episode has an answer.
        well_formed: every turn is well-formed and the last one answers.
        reward: which of the two is trained on.
        penalty: λ_f.
    """
    if shape == "penalty":
        return 0.0 if well_formed else -penalty
    if score > 0:
        return 0.0 if well_formed else -_STRUCTURE_SCORE
    if well_formed:
        return _STRUCTURE_SCORE
    return _FINAL_FORMAT_SCORE if answered and reward == "em" else 0.0
