"""The longest beginning of a text that fits into so many tokens, found with few tokenisations of little text."""

from __future__ import annotations

from collections.abc import Callable

LETTERS_A_TOKEN = 8
"""What is looked at first; twice as much, and so on, if more fits."""
ATTEMPTS = 16
"""Tokenisations after the end is known to lie in a window: half of them halve it."""


def fitting_length(text: str, most: int, count: Callable[[str], int]) -> int:
    """Letters of a beginning of ``text`` that has ``most`` tokens at most, and as many if that can be found.

    Tokens grow about evenly with letters, so the second guess is nearly right. No more text is counted than twice what fits
    or ``most * LETTERS_A_TOKEN`` letters.

    Args:
        text: any text.
        most: tokens.
        count: tokens of a beginning of ``text``, with whatever else belongs to it.
    """
    low, low_tokens, high = 0, 0, min(len(text), most * LETTERS_A_TOKEN)
    while (high_tokens := count(text[:high])) <= most:
        if high == len(text) or high_tokens == most:
            return high
        low, low_tokens, high = high, high_tokens, min(len(text), 2 * high)
    low_tokens = low_tokens or count("")
    for attempt in range(ATTEMPTS):
        if high - low <= 1 or low_tokens == most:
            break
        share = (most - low_tokens + 0.5) / (high_tokens - low_tokens) if attempt % 2 == 0 and high_tokens > low_tokens else 0.5
        middle = min(max(low + int((high - low) * share), low + 1), high - 1)
        if (tokens := count(text[:middle])) <= most:
            low, low_tokens = middle, tokens
        else:
            high, high_tokens = middle, tokens
    return low
