"""Truncates text to a token limit, with few tokenisations of little text."""

from __future__ import annotations

from collections.abc import Callable

CHARS_PER_TOKEN = 8
"""Size of the first guess; it doubles while more fits."""
ATTEMPTS = 16
"""Tokenisations once the end is known to lie in a window: half of them halve it."""


def fitting_length(text: str, max_tokens: int, count: Callable[[str], int]) -> int:
    """The length in characters of the longest prefix of ``text`` found with at most ``max_tokens`` tokens.

    Tokens grow about evenly with characters, so the second guess is nearly right. No more text is counted than twice what
    fits or ``max_tokens * CHARS_PER_TOKEN`` characters.

    Args:
        text: any text.
        max_tokens: the limit.
        count: tokens of a prefix of ``text``, with the text that is added around it.
    """
    low, low_tokens, high = 0, 0, min(len(text), max_tokens * CHARS_PER_TOKEN)
    while (high_tokens := count(text[:high])) <= max_tokens:
        if high == len(text) or high_tokens == max_tokens:
            return high
        low, low_tokens, high = high, high_tokens, min(len(text), 2 * high)
    low_tokens = low_tokens or count("")
    for attempt in range(ATTEMPTS):
        if high - low <= 1 or low_tokens == max_tokens:
            break
        interpolate = attempt % 2 == 0 and high_tokens > low_tokens
        share = (max_tokens - low_tokens + 0.5) / (high_tokens - low_tokens) if interpolate else 0.5
        middle = min(max(low + int((high - low) * share), low + 1), high - 1)
        if (tokens := count(text[:middle])) <= max_tokens:
            low, low_tokens = middle, tokens
        else:
            high, high_tokens = middle, tokens
    return low
