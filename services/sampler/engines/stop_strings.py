"""Stop strings: finds the token that completes one, without decoding the whole completion at every step."""

from __future__ import annotations

from collections.abc import Sequence

from services.sampler.text.tokenizer import Tokenizer


class StopStrings:
    """Which token completes a stop string, for any tokenizer: strings may begin and end inside tokens.

    A token can only complete a string if its own text has the string's last character; only then a short tail of the
    completion is decoded. The text of each token is cached for the lifetime of the engine.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._text: dict[int, str] = {}

    def is_completed(self, ids: Sequence[int], stop: tuple[str, ...]) -> bool:
        """Whether the last of ``ids`` completes one of ``stop``, given that none before it did."""
        if not stop:
            return False
        text = self._text_of(ids[-1])
        candidates = [string for string in stop if self._may_end(string, text)]
        if not candidates:
            return False
        # A token is at least one byte; a few more tokens keep a character that spans the cut from being garbled.
        tail = self._tokenizer.decode(ids[-max(len(string.encode()) for string in candidates) - 4 :])
        return any(string in tail for string in candidates)

    def _text_of(self, token: int) -> str:
        if token not in self._text:
            self._text[token] = self._tokenizer.decode([token])
        return self._text[token]

    @staticmethod
    def _may_end(string: str, text: str) -> bool:
        # A lone token does not show the bytes of a split character, nor the space that some tokenizers put before it.
        last = string[-1]
        return last in text or not last.isascii() or last.isspace()
