"""Encodes text such that only chosen parts of it can produce control tokens.

A tokenizer's added tokens (``<|im_end|>``, ``[INST]``, ``<tool_call>``) are matched in any text, also in foreign one. Here each
control string has a secret name, new in every process, and the library matches that name instead:

    rendered   <|user|>What does <|end|> mean?<|end|>          the first <|end|> is a message's, the second the template's
    encoded    ctl92f…01xWhat does <|end|> mean?ctl92f…00x     in one go, so that merges across the seams stay

Text that was not renamed cannot match. Everything else is the library's own work: merges, prefixes, stripping of white space.
"""

from __future__ import annotations

import json
import re
import secrets
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from tokenizers import AddedToken
from tokenizers import Tokenizer as Backend
from tokenizers.models import WordLevel

from treegrpo.core.step import TokenIds
from treegrpo.errors import ModelError, describe
from treegrpo.storage.surrogates import replace_surrogates

_BYTE = re.compile(r"<0x[0-9A-Fa-f]{2}>")
_LOWER = {upper: upper + 32 for upper in range(ord("A"), ord("Z") + 1)}
"""ASCII alone: the length stays."""


def is_control_token(token: AddedToken, template: str) -> bool:
    """Whether an added token is more than a word of the vocabulary: special, markup, or written by the chat ``template``.

    A special token of one character is one too: in foreign text that character is unknown, for the model has no other id for it.
    """
    text = token.content
    if token.special:
        return True
    if not text.strip() or _BYTE.fullmatch(text):
        return False
    word = len(text) == 1 or all(char.isalnum() or char in " -'▁" for char in text)
    return not word or (len(text) > 1 and text in template)


class ControlTokens:
    """Encodes text in pieces: control strings are tokens in those that allow it, and plain text in the others."""

    def __init__(self, backend: Backend, template: str = "") -> None:
        """``template``: the source of the chat template."""
        nonce = secrets.token_hex(16)
        added = [token for token in backend.get_added_tokens_decoder().values() if is_control_token(token, template)]
        self._names = {token.content: f"ctl{nonce}{place:06d}x" for place, token in enumerate(added)}
        self._backend = _renamed(backend, self._names)
        self._ids = _id_table(backend, self._backend, self._names)
        self._exact = _finder(added)
        self._lowered = [token.content.translate(_LOWER) for token in added]
        self._fold = _finder([AddedToken(text, normalized=False) for text in self._lowered])
        self._prefixes = {text[:end] for text in self._lowered for end in range(1, len(text))}
        self._suffixes = {text[start:] for text in self._lowered for start in range(1, len(text))}
        self._longest = max(map(len, self._lowered), default=0)

    def encode(self, pieces: Iterable[tuple[str, bool]]) -> TokenIds:
        """The ids of the joined pieces; in each that is ``True``, control strings are control tokens."""
        text = "".join(
            self._with_names(replace_surrogates(text)) if control else replace_surrogates(text) for text, control in pieces
        )
        ids = np.array(self._backend.encode(text, add_special_tokens=False).ids, np.uint32)
        return ids if self._ids is None else self._ids[ids]

    def find(self, text: str) -> list[tuple[int, int]]:
        """Start and end of each control string, in any case, since a template may change it."""
        return _found(self._fold, text.translate(_LOWER))

    def may_extend(self, text: str) -> bool:
        """Whether something before or after ``text`` could make a control string of an end of it, or of all of it."""
        lowered = text.translate(_LOWER)
        lengths = range(1, min(self._longest, len(text) + 1))
        return any(lowered[:length] in self._suffixes or lowered[-length:] in self._prefixes for length in lengths) or (
            0 < len(text) < self._longest and any(lowered in whole for whole in self._lowered)
        )

    def _with_names(self, text: str) -> str:
        """``text`` with the secret name of each control string in its place."""
        parts, done = list[str](), 0
        for start, end in _found(self._exact, text):
            parts += [text[done:start], self._names[text[start:end]]]
            done = end
        return "".join([*parts, text[done:]])


def _finder(added: Sequence[AddedToken]) -> Backend:
    """Finds control strings as the library does: leftmost, longest, in one pass."""
    finder = Backend(WordLevel({"": 0}, unk_token=""))
    finder.add_tokens([AddedToken(token.content, single_word=token.single_word, normalized=False) for token in added])
    return finder


def _found(finder: Backend, text: str) -> list[tuple[int, int]]:
    encoding = finder.encode(text, add_special_tokens=False)
    return [span for token, span in zip(encoding.ids, encoding.offsets, strict=True) if token]


def _renamed(backend: Backend, names: dict[str, str]) -> Backend:
    """The same tokenizer, with another name for each control token, also in the model's own vocabulary."""
    data: dict[str, Any] = json.loads(backend.to_str())
    for token in data["added_tokens"]:
        token["content"] = names.get(token["content"], token["content"])
    data |= {"truncation": None, "padding": None, "post_processor": None}
    model: dict[str, Any] = data["model"]
    if isinstance(vocabulary := model["vocab"], dict):
        model["vocab"] = {names.get(text, text): number for text, number in vocabulary.items()}
    else:
        model["vocab"] = [[names.get(text, text), score] for text, score in vocabulary]
    if model.get("unk_token") is not None:
        model["unk_token"] = names.get(model["unk_token"], model["unk_token"])
    if "merges" in model:  # none may make a control token of ordinary letters, nor go on from one
        pairs = [pair.split(" ", 1) if isinstance(pair, str) else pair for pair in model["merges"]]
        model["merges"] = [pair for pair in pairs if not ({"".join(pair), *pair} & names.keys())]
    try:
        return Backend.from_str(json.dumps(data))
    except Exception as error:  # the library raises nothing narrower
        raise ModelError(
            f"The tokenizer cannot be used with its control tokens apart ({describe(error)}); use another."
        ) from error


def _id_table(old: Backend, new: Backend, names: dict[str, str]) -> TokenIds | None:
    """The old tokenizer's id for each of the new one's; None if they are the same."""
    before, after = old.get_vocab(with_added_tokens=True), new.get_vocab(with_added_tokens=True)
    texts = {name: text for text, name in names.items()}
    known = {number: before[texts.get(text, text)] for text, number in after.items()}
    if all(number == meant for number, meant in known.items()):
        return None
    table = np.arange(max(known) + 1, dtype=np.uint32)
    table[list(known)] = list(known.values())
    return table
