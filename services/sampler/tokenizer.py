"""Text and token ids. Only environments and prompts need text; what the policy produced stays ids."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

import numpy as np

from treegrpo.errors import ModelError
from treegrpo.question import Message
from treegrpo.step import TokenIds

FILES = ("tokenizer.json", "tokenizer.model", "vocab.json")


class Tokenizer:
    """A Hugging Face tokenizer with the few calls this project makes."""

    def __init__(self, tokenizer: Any, eos: frozenset[int]) -> None:
        self._tokenizer = tokenizer
        self.eos = eos
        """Ids that end a sequence: the tokenizer's own and those of config.json and generation_config.json."""

    @classmethod
    def open(cls, path: Path) -> Self:
        """Read the tokenizer of a model directory.

        Raises:
            ModelError: its files are missing or cannot be read.
        """
        if not any((path / name).is_file() for name in FILES):
            raise ModelError(f"{path} has no tokenizer ({', '.join(FILES)}); save it beside the model.")
        from transformers import AutoTokenizer, PreTrainedTokenizerFast

        # AutoTokenizer picks a class by the model's type, which may split text in its own way: tokenizer.json goes first.
        reader: Any = PreTrainedTokenizerFast if (path / "tokenizer.json").is_file() else AutoTokenizer
        try:
            tokenizer = reader.from_pretrained(path, local_files_only=True)
        except Exception as error:  # a broken file surfaces as any of a dozen types
            raise ModelError(f"The tokenizer in {path} cannot be read ({error}); restore it from the model's source.") from error
        own: int | None = tokenizer.eos_token_id
        eos = {*([] if own is None else [own]), *_eos_in(path / "config.json"), *_eos_in(path / "generation_config.json")}
        return cls(tokenizer, frozenset(eos))

    def __len__(self) -> int:
        """Number of ids, added tokens included."""
        return len(self._tokenizer)

    def encode(self, text: str) -> TokenIds:
        """The ids of ``text``; no special token is added."""
        return np.array(self._tokenizer.encode(text, add_special_tokens=False), np.uint32)

    def decode(self, ids: Sequence[int] | TokenIds) -> str:
        """The text of ``ids``, special tokens included, nothing tidied up."""
        plain = [int(token) for token in ids]
        return self._tokenizer.decode(plain, skip_special_tokens=False, clean_up_tokenization_spaces=False)

    def render(self, messages: Sequence[Message]) -> TokenIds:
        """Prompt ids: the chat template up to where the policy goes on, or the plain contents if there is no template."""
        if not self._tokenizer.chat_template:
            return self.encode("\n".join(message.content for message in messages))
        chat = [{"role": message.role, "content": message.content} for message in messages]
        text: str = self._tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
        return self.encode(text)


def _eos_in(file: Path) -> list[int]:
    """``eos_token_id`` of a JSON file: a number, a list or nothing."""
    if not file.is_file():
        return []
    found: Any = json.loads(file.read_text(encoding="utf-8")).get("eos_token_id")
    if found is None:
        return []
    return [found] if isinstance(found, int) else list(found)
